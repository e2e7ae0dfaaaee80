// SPDX-License-Identifier: MIT OR Apache-2.0
//! The simulator's own random numbers: the same on every machine and in every release, because a
//! seed in a bug report must mean the same for ever.

/// SplitMix64, used to seed and to derive independent streams.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// xorshift64*.
#[derive(Clone, Debug)]
pub struct Prng(u64);

impl Prng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed) | 1)
    }

    /// An independent stream: `what` tells streams of one seed apart.
    pub fn stream(seed: u64, what: u64) -> Self {
        Self::new(mix(seed) ^ mix(what.wrapping_mul(0xd1b5_4a32_d192_ed03)))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 11) % n.max(1)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of `of`.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
