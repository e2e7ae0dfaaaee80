// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arithmetic of the copy-on-write bitmap and of the page map: which bit lies in which page.
//!
//! Bit 1 means "the block's state is in this image", 0 "in the base". Bit `n` lies in page
//! `n / 32512`, and there in 64-bit little-endian word `(n % 32512) / 64`, bit `n % 64` from the
//! least significant one (FMT-30).

use crate::page::PAYLOAD_BITS;

/// Number of blocks that `covered` bytes of guest addresses have; the last one may be partial.
pub fn blocks(covered: u64, block_size: u32) -> u64 {
    covered.div_ceil(u64::from(block_size))
}

/// Number of pages that hold `bits` bits.
pub fn pages(bits: u64) -> u64 {
    bits.div_ceil(PAYLOAD_BITS)
}

/// Page and bit within that page's payload.
pub fn locate(bit: u64) -> (u64, u64) {
    (bit / PAYLOAD_BITS, bit % PAYLOAD_BITS)
}
