// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small scope, without chance: every sequence of a few operations, every crash point, every
//! subset of what was not flushed, torn in every way that counts. `docs/simulator.md` says exactly
//! what is enumerated.

pub mod alphabet;
pub mod judge;
pub mod play;
pub mod tear;

use crate::campaign::caught;
use crate::checker::{Checker, Mode};
use crate::content::GARBAGE_BYTE;
use crate::geometry::Base;
use crate::store::Store;
use crate::world::{Leaks, Setup, World};
use alphabet::{ALPHABET, DISK, GROWTH, LONG, SHORT, spell};
use fvd_engine::faults::Fault;
use fvd_engine::host::{FILES, Limits};
use fvd_engine::{Config, CreateParams, Request};
use judge::{Judge, Known};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The longest sequences that are played end with a disk that grew so many times.
const DEPTH_MAX: u64 = 3;
/// What a device has: bytes. Room for regions built anew, and for a disk that grows.
const DEVICE: u64 = (3 << 20) + (512 << 10);

/// The image and the host that all sequences of a thread start from.
pub struct Stage {
    /// The file as creation leaves it.
    pub image: Store,
    /// A flush comes between any two operations.
    pub synced: bool,
    alignment: u32,
    grow_unit: u64,
    device: bool,
    fault: Option<Fault>,
}

/// How sequences are played.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// A flush comes between any two operations.
    pub synced: bool,
    /// The host's request alignment: 512 or 4096 bytes.
    pub alignment: u32,
    /// Chunk of a compact image: bytes; 0: it is flat.
    pub chunk: u32,
    /// The storage does not grow, is full of garbage, and zeroing it is dear.
    pub device: bool,
}

/// All variants.
pub const VARIANTS: [Variant; 6] = [
    Variant { synced: false, alignment: 512, chunk: 0, device: false },
    Variant { synced: true, alignment: 512, chunk: 0, device: false },
    Variant { synced: false, alignment: 4096, chunk: 0, device: false },
    Variant { synced: false, alignment: 512, chunk: 4096, device: false },
    Variant { synced: true, alignment: 4096, chunk: 4096, device: false },
    Variant { synced: false, alignment: 512, chunk: 8192, device: true },
];

impl Stage {
    /// Makes the image: always the same.
    pub fn new(variant: Variant, fault: Option<Fault>) -> Self {
        let grow_unit = if variant.chunk > 0 { 8192 } else { 0 };
        let mut stage = Self { image: Store::default(), synced: variant.synced, alignment: variant.alignment, grow_unit, device: variant.device, fault: None };
        let mut bytes = Store::default();
        if variant.device {
            bytes.fill_pages(0, DEVICE, GARBAGE_BYTE);
        }
        let world = World::new(stage.setup(bytes, false, false), Checker::new(Mode::Create, None));
        let params = CreateParams {
            virtual_size: Some(DISK * 512),
            block_size: 4096,
            journal_size: 1 << 20,
            base_name: "short".into(),
            base_format: "raw".into(),
            compact: variant.chunk > 0,
            chunk_size: variant.chunk,
            storage_grow_unit: stage.grow_unit,
            ..CreateParams::default()
        };
        let outcome = world.request(0, Request::Create(Box::new(params))).expect("creation ends");
        outcome.expect("creation succeeds");
        stage.image = world.disk().stable.clone();
        world.end();
        stage.fault = fault;
        stage
    }

    /// Growth step of the image when it is made: bytes; 0: it is flat.
    pub fn grow_unit(&self) -> u64 {
        self.grow_unit
    }

    /// The shorter base or the longer.
    pub fn base(&self, long: bool) -> Base {
        Base { len: 512 * if long { LONG } else { SHORT }, cell: 512, data: vec![(0, 2 * DISK)] }
    }

    /// A world with a file; `eager`: a checkpoint follows each commit.
    pub fn setup(&self, bytes: Store, long: bool, eager: bool) -> Setup {
        let mut limits = [Limits::default(); FILES];
        limits[0] = Limits { request_alignment: self.alignment, memory_alignment: 512, grows_zeroed: !self.device, cheap_zeroing: !self.device, ..Limits::default() };
        let config = Config { limits, fault: self.fault, checkpoint_after: u64::from(eager), ..Config::default() };
        let scripted = Setup::scripted(bytes, Some(self.base(long)), config);
        let leaks = Leaks { largest_disk: 512 * (DISK + DEPTH_MAX * GROWTH), largest_write: 512 * DISK, ..scripted.leaks };
        Setup { leaks, ..scripted }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sequences played.
    pub sequences: u64,
    /// Crash points.
    pub cuts: u64,
    /// Files that cuts may leave, equal ones counted each time.
    pub files: u64,
    /// Most changes that were not durable at a crash point.
    pub most: u64,
    /// Crash points at which there were too many to try every subset.
    pub sampled: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Counted over all sequences.
    pub tally: Tally,
    /// Distinct files that cuts left.
    pub distinct: u64,
    /// Distinct metadata among them: as many recoveries were cut.
    pub metadata: u64,
    /// Crash points in these recoveries, and the distinct files they left.
    pub second: [u64; 2],
    /// Files opened, each read-only and for recovery.
    pub opened: u64,
    /// Recoveries: writable opens of files that were not closed, each compared in full.
    pub recoveries: u64,
    /// The first failure, in the order of sequences.
    pub failure: Option<String>,
}

/// Every sequence of 1 to `depth` letters, short ones first.
fn sequence(mut number: usize) -> Vec<usize> {
    let letters = ALPHABET.len();
    let (mut length, mut count) = (1, letters);
    while number >= count {
        number -= count;
        (length, count) = (length + 1, count * letters);
    }
    let mut out = vec![0; length];
    for place in out.iter_mut().rev() {
        *place = number % letters;
        number /= letters;
    }
    out
}

/// How many sequences have at most `depth` letters.
pub fn sequences(depth: u32) -> usize {
    (1..=depth).map(|length| ALPHABET.len().pow(length)).sum()
}

/// Plays every sequence of up to `depth` letters in one variant. `progress` is told how many are done.
pub fn run(variant: Variant, depth: u32, jobs: usize, fault: Option<Fault>, progress: &(dyn Fn(usize) + Sync)) -> Summary {
    let known = Known::new();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let total = Mutex::new((Tally::default(), None::<(usize, String)>));
    let work = || {
        let stage = Stage::new(variant, fault);
        let judge = Judge::new(&stage, &known);
        while !stop.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= sequences(depth) {
                break;
            }
            progress(number);
            let played = play_caught(&stage, &judge, &sequence(number));
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            match played {
                Ok(tally) => total.0.add(&tally),
                Err(text) => {
                    stop.store(true, Ordering::Relaxed);
                    if total.1.as_ref().is_none_or(|(first, _)| number < *first) {
                        total.1 = Some((number, format!("sequence {}: {text}", spell(&sequence(number)))));
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(work);
        }
    });
    let (tally, failure) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary(&known, tally, failure.map(|(_, text)| text))
}

/// Plays one sequence.
pub fn run_one(variant: Variant, letters: &[usize], fault: Option<Fault>) -> Summary {
    let known = Known::new();
    let stage = Stage::new(variant, fault);
    let played = play_caught(&stage, &Judge::new(&stage, &known), letters);
    let failure = played.as_ref().err().cloned();
    summary(&known, played.unwrap_or_default(), failure)
}

fn play_caught(stage: &Stage, judge: &Judge<'_>, letters: &[usize]) -> Result<Tally, String> {
    caught(|| play::play(stage, judge, letters)).and_then(|played| played).map(|tally| Tally { sequences: 1, ..tally })
}

fn summary(known: &Known, tally: Tally, failure: Option<String>) -> Summary {
    let count = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
    Summary {
        tally,
        distinct: known.distinct(),
        metadata: known.metadata(),
        second: [count(&known.second_cuts), count(&known.second)],
        opened: count(&known.opened),
        recoveries: count(&known.recoveries),
        failure,
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.sequences += other.sequences;
        self.cuts += other.cuts;
        self.files += other.files;
        self.most = self.most.max(other.most);
        self.sampled += other.sampled;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_numbered_without_gaps() {
        let letters = ALPHABET.len();
        assert_eq!(sequence(0), [0]);
        assert_eq!(sequence(letters), [0, 0]);
        assert_eq!(sequence(sequences(2) - 1), [letters - 1, letters - 1]);
        assert_eq!(sequence(sequences(2)), [0, 0, 0]);
    }

    #[test]
    fn depth_one_holds() {
        for variant in VARIANTS {
            let begun = std::time::Instant::now();
            let summary = run(variant, 1, 1, None, &|_| ());
            println!("{summary:?} {:?}", begun.elapsed());
            assert_eq!(summary.failure, None);
            assert!(summary.distinct > 100);
        }
    }
}
