// SPDX-License-Identifier: MIT OR Apache-2.0
//! Seeds that once failed, each with a line of why. They are run by `cargo test` and by every
//! `fvd-sim run`. A seed draws other plans when the workload changes; it stays as a sample then. What
//! keeps each bug from coming back for certain is the planted fault that makes it again.

/// Seed, and what it found.
pub const REGRESSIONS: &[(u64, &str)] = &[
    (6, "growth inside the last page asked the host to zero nothing"),
    (35, "a torn header copy 1 was left as it was while the next update overwrote copy 2 (HeaderNotRepaired)"),
    (2031, "the same after a cut in a header update"),
    (715, "check compared the header with a file that an update had failed to write"),
    (2081, "a sync that passed was believed though another one had failed and dropped its data (SyncBesideFailed)"),
    (7975, "the same between a checkpoint and a flush"),
    (4042, "a write up to the old end of the disk filled up its host sector after the disk had grown"),
    (5005, "growth on storage that does not read as zero showed what lay behind the old end (GrowthKeepsRest)"),
    (5028, "a base that failed to answer was taken for none when the image got its bitmap (BaseErrorIsNone)"),
    (7034, "a read-only check took a header copy that a cut tore for damage"),
    (41426565118001, "write-zeroes up to an unaligned end of the covered part filled the front of its last block from the base"),
    (23, "a page of the table, in place by a checkpoint cut short, names storage that only a later commit's reach covers"),
    (52, "a header update that ended after a commit had raised the reach took it back in memory"),
    (318, "a disk grew while the freeing of its last chunk was not committed, and a cut brought the chunk's old bytes back"),
    (193165271166750, "a batch that failed left its page-map bit set, and the next one wrote it before the page (PageMapAhead)"),
    (208463749988971, "the same where the last chunk had got other storage since"),
    (7326, "growth zeroed up to the end of a file that a torn write had left at an odd length"),
    (48874904385864, "the host answered a read of the table with ENOSPC: the write waited for storage of which nothing was known"),
];
