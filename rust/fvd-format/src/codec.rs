// SPDX-License-Identifier: MIT OR Apache-2.0
//! Little-endian fields at fixed offsets. Offsets are constants of the format, never input.

/// Reads a `u16` at `at`.
pub fn get_u16(buf: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(buf[at..at + 2].try_into().expect("two bytes"))
}

/// Reads a `u32` at `at`.
pub fn get_u32(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(buf[at..at + 4].try_into().expect("four bytes"))
}

/// Reads a `u64` at `at`.
pub fn get_u64(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(buf[at..at + 8].try_into().expect("eight bytes"))
}

/// Writes a `u16` at `at`.
pub fn put_u16(buf: &mut [u8], at: usize, value: u16) {
    buf[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes a `u32` at `at`.
pub fn put_u32(buf: &mut [u8], at: usize, value: u32) {
    buf[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Writes a `u64` at `at`.
pub fn put_u64(buf: &mut [u8], at: usize, value: u64) {
    buf[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Whether all bytes are 0. Without an early end, so that the compiler takes many bytes at a time.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |any, &b| any | b) == 0
}

/// A NUL-padded string field: `None` if it has no terminating NUL or bytes after the first NUL.
pub fn get_str(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|&b| b == 0)?;
    if !is_zero(&field[end..]) {
        return None;
    }
    String::from_utf8(field[..end].to_vec()).ok()
}

/// Writes `text` NUL-padded. The caller has checked that it is shorter than the field.
pub fn put_str(field: &mut [u8], text: &str) {
    assert!(text.len() < field.len(), "string field too short for its text");
    field.fill(0);
    field[..text.len()].copy_from_slice(text.as_bytes());
}
