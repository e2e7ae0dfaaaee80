// SPDX-License-Identifier: MIT OR Apache-2.0
#![no_main]

// The body judges what opening takes.
#[global_allocator]
static ALLOCATOR: fvd_fuzz::heap::Counting = fvd_fuzz::heap::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fvd_fuzz::image_open(data));
