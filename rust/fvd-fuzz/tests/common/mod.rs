// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory is counted.

#[global_allocator]
static ALLOCATOR: fvd_fuzz::heap::Counting = fvd_fuzz::heap::Counting;

#[test]
fn memory_is_counted() {
    let (bytes, peak) = fvd_fuzz::heap::peak_of(|| vec![1u8; 100_000]);
    assert!(peak >= bytes.len() && peak < bytes.len() + 1000, "{peak}");
}
