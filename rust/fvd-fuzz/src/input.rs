// SPDX-License-Identifier: MIT OR Apache-2.0
//! Decisions taken from a fuzzer's bytes. Past the end everything is 0, so that any prefix of an
//! input is an input.

/// The bytes that are left.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `n` bytes.
    pub(crate) fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(n.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let bytes = self.bytes(N);
        out[..bytes.len()].copy_from_slice(bytes);
        out
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number that is often near something: a power of two, a few more or less.
    pub(crate) fn number(&mut self) -> u64 {
        let kind = self.u8();
        match kind >> 6 {
            0 => u64::from(kind & 63),
            1 => (1u64 << (kind & 63)).wrapping_add_signed(i64::from(self.u8() as i8)),
            2 => u64::from(self.u16()) << (kind & 15),
            _ => self.u64(),
        }
    }
}
