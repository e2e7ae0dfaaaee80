// SPDX-License-Identifier: MIT OR Apache-2.0
//! Simulated time: how long operations take.

use crate::prng::Prng;

/// Nanoseconds in a microsecond, a millisecond and a second.
pub const US: u64 = 1000;
/// See [`US`].
pub const MS: u64 = 1000 * US;
/// See [`US`].
pub const SECOND: u64 = 1000 * MS;

/// How long a kind of operation takes.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// At least: nanoseconds.
    pub least: u64,
    /// On top of it, at most.
    pub spread: u64,
    /// One in so many takes a hundred times as long; 0: none.
    pub slow_one_in: u64,
    /// One in so many stalls for half a minute; 0: none.
    pub stall_one_in: u64,
}

impl Latency {
    /// Everything takes no time: operations end in the order in which they were asked for.
    pub const NONE: Self = Self { least: 0, spread: 0, slow_one_in: 0, stall_one_in: 0 };

    /// Latency of a disk, drawn from a seed.
    pub fn disk(prng: &mut Prng) -> Self {
        Self { least: prng.pick(&[0, 10, 50]) * US, spread: prng.pick(&[1, 20, 200, 2000]) * US, slow_one_in: prng.pick(&[0, 0, 10, 50]), stall_one_in: 0 }
    }

    /// A disk on which operations overtake each other by far.
    pub const UNEVEN: Self = Self { least: 50 * US, spread: 2 * MS, slow_one_in: 4, stall_one_in: 0 };

    /// Latency of a base that is far away.
    pub fn network(prng: &mut Prng) -> Self {
        let disk = Self::disk(prng);
        Self { least: disk.least + prng.pick(&[0, 1, 30]) * MS, stall_one_in: prng.pick(&[0, 0, 0, 40]), ..disk }
    }

    /// One operation's time.
    pub fn draw(&self, prng: &mut Prng) -> u64 {
        if self.spread == 0 {
            return self.least;
        }
        let normal = self.least + prng.below(self.spread);
        if self.stall_one_in != 0 && prng.one_in(self.stall_one_in) {
            30 * SECOND
        } else if self.slow_one_in != 0 && prng.one_in(self.slow_one_in) {
            normal * 100
        } else {
            normal
        }
    }
}
