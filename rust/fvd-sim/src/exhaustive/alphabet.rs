// SPDX-License-Identifier: MIT OR Apache-2.0
//! What sequences are made of. Each letter is an operation on a disk of four blocks of eight cells,
//! whose base ends in the middle of the third block; places are chosen so that letters meet.

use crate::plan::Act;
use fvd_engine::Repair;

/// Cells of a block: 4 KiB.
pub const BLOCK: u64 = 8;
/// Cells of the disk when it is made.
pub const DISK: u64 = 4 * BLOCK;
/// Cells by which it grows.
pub const GROWTH: u64 = 2 * BLOCK;
/// Cells by which it shrinks: the first time, the end comes into a block that the base reaches.
pub const SHRINKAGE: u64 = BLOCK + 2;
/// Cells of the first base: it ends within a block.
pub const SHORT: u64 = 2 * BLOCK + 4;
/// Cells of the longer base: it ends beyond the disk as made, within the disk as grown.
pub const LONG: u64 = 5 * BLOCK + 4;

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Requests that begin one after the other, all of them before any ends.
    Together(&'static [Act]),
    /// The same; of operations under way the newest ends first.
    Newest(&'static [Act]),
    /// The same, the way QEMU takes: a lookup, then its own I/O.
    Shim(&'static [Act]),
    /// The host attaches a longer base, and the image records it.
    Rebase,
    /// Every block goes back to the base.
    Empty,
    /// A write that took the way of QEMU is under way when the image is emptied.
    EmptyBesideShim,
    /// Metadata is committed in the background when its time has come.
    Tick,
    /// Close and open.
    Reopen,
    /// Close and open; from now on each commit is followed by a checkpoint.
    ReopenEager,
    /// The power goes, nothing that was not flushed survives, and the image is opened again.
    Crash,
}

const fn write(first: u64, count: u64) -> Act {
    Act::Write { first, count, fua: false }
}

const fn zero(first: u64, count: u64, may_unmap: bool, fua: bool) -> Act {
    Act::Zero { first, count, may_unmap, fua }
}

/// The letters: name and operation. Adding one here is all it takes; say so in `docs/simulator.md`.
pub const ALPHABET: &[(&str, Do)] = &[
    ("sector", Do::Together(&[write(9, 1)])),
    ("part", Do::Together(&[write(3, 3)])),
    ("block", Do::Together(&[write(BLOCK, BLOCK)])),
    ("two", Do::Together(&[write(BLOCK, 2 * BLOCK)])),
    ("straddle", Do::Together(&[write(6, 4)])),
    ("last", Do::Together(&[write(3 * BLOCK, BLOCK)])),
    ("edge", Do::Together(&[write(SHORT - 1, 3)])),
    ("beyond", Do::Together(&[write(26, 2)])),
    ("fua", Do::Together(&[Act::Write { first: 2, count: 3, fua: true }])),
    ("flush", Do::Together(&[Act::Flush])),
    ("discard-part", Do::Together(&[Act::Discard { first: 9, count: 3 }])),
    ("discard-block", Do::Together(&[Act::Discard { first: BLOCK, count: BLOCK }])),
    ("zero-part", Do::Together(&[zero(4, 3, false, false)])),
    ("zero-blocks", Do::Together(&[zero(0, 2 * BLOCK, false, false)])),
    ("zero-unmap", Do::Together(&[zero(BLOCK, 2 * BLOCK, true, false)])),
    ("zero-fua", Do::Together(&[zero(2 * BLOCK, BLOCK, true, true)])),
    ("grow", Do::Together(&[Act::Grow { cells: GROWTH }])),
    ("read", Do::Together(&[Act::Read { first: 0, count: DISK }])),
    ("overlap", Do::Together(&[write(8, 6), write(12, 8)])),
    ("overlap-newest", Do::Newest(&[write(8, 6), write(12, 8)])),
    ("write+zero", Do::Newest(&[write(4, 8), zero(8, 4, true, false)])),
    ("write+flush", Do::Together(&[write(10, 2), Act::Flush])),
    ("flush+write", Do::Newest(&[Act::Flush, write(10, 2)])),
    ("flush+write+flush", Do::Together(&[Act::Flush, write(11, 2), Act::Flush])),
    ("shim+flush", Do::Shim(&[write(12, 3), Act::Flush])),
    ("shim+discard", Do::Shim(&[write(9, 2), Act::Discard { first: BLOCK, count: BLOCK }])),
    ("grow+write", Do::Together(&[Act::Grow { cells: GROWTH }, write(3 * BLOCK + 4, 4)])),
    ("shrink", Do::Together(&[Act::Shrink { cells: SHRINKAGE }])),
    ("shrink+write", Do::Newest(&[Act::Shrink { cells: SHRINKAGE }, write(2 * BLOCK + 4, 6), Act::Read { first: BLOCK, count: 2 * BLOCK }])),
    ("shrink+shim", Do::Shim(&[write(3 * BLOCK - 2, 2 + BLOCK), Act::Shrink { cells: SHRINKAGE }, write(6, 4)])),
    ("repair+write", Do::Newest(&[Act::Check { repair: Repair::All }, write(10, 2)])),
    ("amend+write", Do::Newest(&[Act::Amend { chunks: 3 }, write(3 * BLOCK, BLOCK)])),
    ("rebase", Do::Rebase),
    ("empty", Do::Empty),
    ("empty+shim", Do::EmptyBesideShim),
    ("tick", Do::Tick),
    ("reopen", Do::Reopen),
    ("reopen-eager", Do::ReopenEager),
    ("crash", Do::Crash),
];

/// The letter called `name`.
pub fn letter(name: &str) -> Option<usize> {
    ALPHABET.iter().position(|(known, _)| *known == name)
}

/// A sequence as text.
pub fn spell(sequence: &[usize]) -> String {
    sequence.iter().map(|at| ALPHABET[*at].0).collect::<Vec<_>>().join(",")
}
