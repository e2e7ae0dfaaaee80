// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything about a run that its seed decides once: the image, the host, how requests are mixed.
//! Swarm testing: each seed switches some kinds of requests off and pulls some knobs far out, since
//! a mixture of everything seldom goes far in any direction.

use crate::clock::{Latency, MS, SECOND};
use crate::world::Answer;
use crate::prng::Prng;
use fvd_engine::host::Limits;

/// Kinds of requests, for weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// A write.
    Write,
    /// A write that is durable at its end.
    Fua,
    /// Write-zeroes.
    Zero,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
    /// A read.
    Read,
    /// Block status.
    Status,
    /// The disk grows.
    Grow,
    /// The base's name changes.
    ChangeBase,
    /// A check.
    Check,
    /// A request beyond the end of the disk.
    Beyond,
    /// Time passes.
    Sleep,
    /// The base comes or goes.
    Attach,
    /// All that is under way ends first.
    Drain,
    /// Every block goes back to the base.
    Empty,
    /// The disk shrinks.
    Shrink,
    /// The growth step changes.
    Amend,
}

/// Number of [`Kind`]s.
pub const KINDS: usize = 17;

/// What the base is to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseIs {
    /// There is none.
    None,
    /// It is there when the image is made.
    Known,
    /// It is named when the image is made, and attached later.
    Named,
    /// It is attached to an image that was made without one.
    Surprise,
}

/// The choices.
#[derive(Clone, Debug)]
pub struct Options {
    /// The seed they come from.
    pub seed: u64,
    /// Bytes of a cell, and of the smallest request.
    pub cell: u64,
    /// Cells of the disk when it is made.
    pub cells: u64,
    /// Where the guest's windows begin, and how long they are.
    pub starts: Vec<u64>,
    /// See [`Options::starts`].
    pub window: u64,
    /// What the base is.
    pub base: BaseIs,
    /// Bytes of the base when the image is made, and from the second session on.
    pub base_bytes: [u64; 2],
    /// Copy-on-write unit: bytes; 0: the default.
    pub block_size: u32,
    /// Chunk of a compact image: bytes; 0: the image is flat.
    pub chunk_size: u32,
    /// Chunks in a growth step.
    pub step_chunks: u64,
    /// Storage that does not grow: bytes behind the metadata, of a compact image.
    pub fixed_room: u64,
    /// What comes of it when the engine says that it is nearly used up.
    pub answer: Answer,
    /// Writes that find no storage wait for it.
    pub wait_for_space: bool,
    /// Writes of metadata fail, and checkpoints are many and short: batches that fail are followed by others.
    pub batches_fail: bool,
    /// Journal: bytes.
    pub journal_size: u64,
    /// Blocks that are zero in the base are found at creation.
    pub holes: bool,
    /// The data area is written at creation.
    pub preallocate: bool,
    /// What the host's image file and base can do.
    pub limits: [Limits; 2],
    /// Guest data lies in a file of its own: what that can do.
    pub data: Option<Limits>,
    /// Queues of the image.
    pub queues: usize,
    /// Requests under way, at most.
    pub depth: usize,
    /// Sessions after the creation.
    pub sessions: usize,
    /// Requests of a session, at most.
    pub requests: u64,
    /// How often each [`Kind`] is drawn.
    pub weights: [u64; KINDS],
    /// In how many of 100 cases reads and writes go the way QEMU takes.
    pub shim_percent: u64,
    /// In how many of 100 cases a request is near the last one.
    pub hot_percent: u64,
    /// In how many of 100 cases a request is of one to three cells.
    pub small_percent: u64,
    /// In how many of 100 cases an operation ends before `submit` returns.
    pub inline_percent: u64,
    /// Journal units after which a checkpoint starts; 0: half the journal.
    pub checkpoint_after: u64,
    /// Pages of a checkpoint's batch; 0: as many as there is room for.
    pub batch_pages: usize,
    /// Longest time that metadata stays uncommitted.
    pub commit_interval_ns: u64,
    /// Latency of the image and of the base.
    pub latency: [Latency; 2],
    /// In how many of 100 sessions something fails.
    pub fail_percent: u64,
    /// In how many of 100 sessions the power goes.
    pub cut_percent: u64,
    /// Chunks keep their storage when they are discarded.
    pub discard_no_unref: bool,
    /// A discard leaves the data as it was, in how many of 100 cases.
    pub discard_ignored_percent: u64,
    /// See [`crate::world::Setup::zeroing_is_dear`].
    pub zeroing_is_dear: bool,
}

/// What many requests meet in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Crowd {
    None,
    Blocks,
    Chunks,
}

/// The checkpoint waits until a commit finds no room in the journal.
const WHEN_FULL: u64 = 1 << 20;

/// Blocks a bitmap page has bits for.
const PAGE_BLOCKS: u64 = fvd_format::page::PAYLOAD_BITS;

impl Options {
    /// The choices of `seed`.
    pub fn draw(seed: u64) -> Self {
        let mut prng = Prng::stream(seed, 1);
        let p = &mut prng;
        // Many small commits while the journal is full.
        let tight = p.one_in(12);
        let cell = if tight { 512 } else { p.pick(&[512, 512, 512, 512, 64, 128]) };
        let block_size = if tight { 4096 } else { p.pick(&[4096, 4096, 4096, 8192, 16384, 65536, 0]) };
        // Requests that meet in a few chunks of several blocks, or in a few blocks while the image gets
        // its first bitmap.
        let crowd = if tight {
            Crowd::None
        } else {
            p.pick(&[Crowd::None, Crowd::None, Crowd::None, Crowd::None, Crowd::None, Crowd::None, Crowd::Chunks, Crowd::Blocks, Crowd::Blocks])
        };
        let block_size = match crowd {
            Crowd::None => block_size,
            Crowd::Blocks => 16384,
            Crowd::Chunks => p.pick(&[4096, 4096, 0]),
        };
        let chunk_size = match crowd {
            Crowd::None if p.chance(50) => p.pick(&[4 << 10, 4 << 10, 4 << 10, 4 << 10, 8 << 10, 8 << 10, 16 << 10, 64 << 10]),
            Crowd::Chunks => p.pick(&[16 << 10, 16 << 10, 64 << 10]),
            _ => 0,
        };
        let block_size = if chunk_size > 0 { block_size.min(chunk_size) } else { block_size };
        let block = u64::from(if block_size == 0 { 4096 } else { block_size });
        let (cells, starts, window) = if tight {
            let sectors = p.between(1000, 2500);
            (sectors, vec![0], sectors)
        } else if crowd == Crowd::Blocks {
            let cells = p.between(1, 3 * block / 512) * (512 / cell);
            (cells, vec![0], cells)
        } else if chunk_size > 0 && (crowd == Crowd::Chunks || p.chance(70)) {
            chunks(p, cell, u64::from(chunk_size), crowd == Crowd::Chunks)
        } else {
            disk(p, cell, block)
        };
        let bytes = cells * cell;
        let base = if crowd == Crowd::Blocks {
            BaseIs::Surprise
        } else {
            p.pick(&[BaseIs::Known, BaseIs::Known, BaseIs::Known, BaseIs::Named, BaseIs::Surprise, BaseIs::None])
        };
        let sectors = bytes / 512;
        let base_sectors = match p.below(5) {
            0 | 1 => sectors,
            2 => sectors / 2 + p.below(17),
            3 => sectors * 2,
            _ => sectors.saturating_sub(3),
        };
        let later = match p.below(8) {
            0 => base_sectors + p.below(40),
            1 => base_sectors.saturating_sub(p.below(40)),
            _ => base_sectors,
        };
        let mut limits = host_limits(p, bytes);
        let mut weights = [30, 3, 8, 5, 14, 16, 3, 1, 0, 1, 1, 3, 0, 2, 0, 1, 0];
        for (kind, weight) in weights.iter_mut().enumerate().take(Kind::Amend as usize) {
            let keep = kind == Kind::Write as usize || p.chance(75);
            *weight *= if keep { p.pick(&[1, 1, 1, 3]) } else { 0 };
        }
        if p.one_in(if crowd == Crowd::Chunks { 3 } else { 8 }) {
            // A disk that keeps changing its size.
            (weights[Kind::Grow as usize], weights[Kind::Shrink as usize]) = (5, 6);
        }
        weights[Kind::ChangeBase as usize] = u64::from(p.one_in(6));
        weights[Kind::Empty as usize] = u64::from(base != BaseIs::None && p.one_in(8));
        weights[Kind::Attach as usize] = u64::from(base != BaseIs::None && p.one_in(8));
        let mut checkpoint_after = p.pick(&[0, 1, 2, 4, 9, 30, WHEN_FULL]);
        if tight {
            limits[0].write_granule = 65536;
            checkpoint_after = WHEN_FULL;
            for (kind, weight) in [(Kind::Write, 20), (Kind::Fua, 30), (Kind::Flush, 15)] {
                weights[kind as usize] = weight;
            }
        }
        match crowd {
            Crowd::None => {}
            Crowd::Blocks => {
                limits[0].request_alignment = limits[0].request_alignment.min(512);
                limits[0].memory_alignment = limits[0].memory_alignment.min(512);
                // The bitmap comes while little else happens.
                weights = [0; KINDS];
                for (kind, weight) in [(Kind::Write, 60), (Kind::Zero, 5), (Kind::Read, 10), (Kind::Flush, 2), (Kind::Empty, 2)] {
                    weights[kind as usize] = weight;
                }
            }
            Crowd::Chunks => {
                weights[Kind::Write as usize] = 30;
                weights[Kind::Discard as usize] = 10;
            }
        }
        // Not drawn, so that what seeds mean does not change.
        weights[Kind::Amend as usize] = if chunk_size > 0 && seed % 4 == 0 { 3 } else { 0 };
        let mut options = Self {
            seed,
            cell,
            cells,
            starts,
            window,
            base,
            base_bytes: [base_sectors * 512, later * 512],
            block_size,
            chunk_size,
            step_chunks: p.pick(&[1, 1, 2, 4, 20]),
            fixed_room: p.pick(&[0, 64 << 10, 256 << 10, 4 << 20]),
            journal_size: p.pick(&[1 << 20, 1 << 20, 1 << 20, (1 << 20) + (128 << 10)]),
            holes: base == BaseIs::Known && p.chance(30),
            preallocate: crowd == Crowd::Blocks || p.chance(if limits[0].grows_zeroed { 5 } else { 50 }) && bytes <= 4 << 20,
            data: data_limits(seed, bytes, crowd),
            limits,
            queues: p.pick(&[1, 1, 2, 3]),
            depth: if crowd != Crowd::None { 16 } else { p.pick(&[1, 2, 4, 8, 16]) },
            sessions: if crowd == Crowd::Blocks { 3 } else { p.between(4, 12) as usize },
            requests: if tight { 240 } else { p.pick(&[20, 60, 120, 240]) },
            weights,
            shim_percent: p.pick(&[0, 50, 50, 50, 100]),
            hot_percent: p.pick(&[0, 25, 60]),
            small_percent: if crowd == Crowd::Blocks { 60 } else { 0 },
            inline_percent: p.pick(&[0, 0, 0, 30, 100]),
            checkpoint_after,
            batch_pages: p.pick(&[0, 1, 1, 2]),
            commit_interval_ns: p.pick(&[5 * SECOND, 5 * SECOND, MS, 100 * MS]),
            latency: [if crowd == Crowd::None { Latency::disk(p) } else { Latency::UNEVEN }, Latency::network(p)],
            fail_percent: p.pick(&[0, 0, 30, 60]),
            cut_percent: p.pick(&[50, 80, 100]),
            discard_ignored_percent: p.pick(&[0, 0, 50, 100]),
            zeroing_is_dear: false,
            discard_no_unref: p.one_in(5),
            answer: Answer {
                grows_by: if p.chance(50) { p.pick(&[16 << 10, 64 << 10, 256 << 10]) } else { 0 },
                after_ns: p.pick(&[0, 0, MS, 300 * MS]),
                refuses_percent: p.pick(&[0, 0, 0, 30]),
            },
            wait_for_space: p.chance(50),
            batches_fail: false,
        };
        if options.starts.len() > 1 && p.chance(30) {
            (options.batches_fail, options.checkpoint_after, options.batch_pages) = (true, p.pick(&[1, 1, 3]), p.pick(&[1, 1, 2]));
        }
        // Nor this.
        options.zeroing_is_dear = seed % 5 < if options.data_limits().grows_zeroed { 1 } else { 3 };
        // Nor this: small requests in many short sessions that the power ends, so that growth steps are cut short.
        if seed % 7 == 5 && chunk_size > 0 && crowd == Crowd::None && options.data_limits().grows_zeroed {
            (options.step_chunks, options.small_percent, options.cut_percent, options.requests, options.sessions) = (4, 100, 100, 20, 12);
        }
        // Reads by lookups while all chunks are given away and taken again.
        if crowd == Crowd::Chunks && base != BaseIs::None && p.chance(40) {
            options.weights[Kind::Empty as usize] = 8;
            options.weights[Kind::Read as usize] += 20;
            options.shim_percent = 100;
        }
        options
    }

    /// What the file with guest data can do.
    pub fn data_limits(&self) -> Limits {
        self.data.unwrap_or(self.limits[0])
    }

    /// Bytes of the disk when it is made.
    pub fn disk_bytes(&self) -> u64 {
        self.cells * self.cell
    }
}

/// Cells of the disk, where the guest's windows begin, and their length.
fn disk(p: &mut Prng, cell: u64, block: u64) -> (u64, Vec<u64>, u64) {
    let block_cells = block / cell;
    if p.one_in(5) {
        // Several pages of bitmap: windows around their borders.
        let pages = p.between(1, 3);
        let border = PAGE_BLOCKS * block_cells;
        let window = (8 * block_cells).clamp(32, 128);
        let cells = pages * border + p.between(window, 600) / (512 / cell) * (512 / cell);
        let starts = (0..=pages).map(|i| (i * border).saturating_sub(window / 2)).collect();
        return (cells, starts, window);
    }
    let sectors = match p.below(10) {
        0 => p.between(1, 16),
        1..5 => p.between(17, 200),
        _ => p.between(64, 900),
    };
    let cells = sectors * (512 / cell) / if cell < 512 { 4 } else { 1 };
    let cells = cells.max(512 / cell).next_multiple_of(512 / cell);
    (cells, vec![0], cells)
}

/// The same for a disk of a few chunks, all of them in use; the last one is often partial.
fn chunks(p: &mut Prng, cell: u64, chunk: u64, few: bool) -> (u64, Vec<u64>, u64) {
    // Two or three, so that requests meet in one, or more.
    let count = if few || p.one_in(4) { p.between(2, 3) } else { p.between(1, 6) * (32768 / chunk).max(1) };
    let sectors = (count * chunk / 512).saturating_sub(p.pick(&[0, 0, 1, 7, 33])).max(1);
    let cells = sectors * (512 / cell);
    let cells = if cell < 512 { cells.min(1200).next_multiple_of(512 / cell) } else { cells };
    (cells, vec![0], cells)
}

/// What the data file can do, in one image of four that has one. Drawn apart, so that a seed is otherwise the
/// same with and without.
fn data_limits(seed: u64, disk_bytes: u64, crowd: Crowd) -> Option<Limits> {
    let mut prng = Prng::stream(seed, 5);
    let mut limits = prng.one_in(4).then(|| host_limits(&mut prng, disk_bytes)[0]);
    if let Some(limits) = limits.as_mut().filter(|_| crowd == Crowd::Blocks) {
        limits.request_alignment = limits.request_alignment.min(512);
        limits.memory_alignment = limits.memory_alignment.min(512);
    }
    limits
}

/// What the host's files can do.
fn host_limits(p: &mut Prng, disk_bytes: u64) -> [Limits; 2] {
    let request_alignment = p.pick(&[1, 512, 512, 4096]);
    let memory_alignment = if request_alignment == 1 { 1 } else { p.pick(&[1, 512, 4096]).min(request_alignment) };
    let image = Limits {
        request_alignment,
        memory_alignment,
        write_granule: p.pick(&[4096, 4096, 4096, 16384, 512, 65536]),
        // Garbage must be real bytes: not on a disk of hundreds of MiB.
        grows_zeroed: disk_bytes > 4 << 20 || !p.one_in(6),
        cheap_zeroing: p.chance(50),
        can_fua: false,
    };
    let align = p.pick(&[1, 512, 4096]);
    [image, Limits { request_alignment: align, memory_alignment: if align == 1 { 1 } else { p.pick(&[1, 512]) }, ..Limits::default() }]
}
