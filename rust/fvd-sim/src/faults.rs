// SPDX-License-Identifier: MIT OR Apache-2.0
//! The planted faults, one after the other: each must be caught by the ordinary workload, and
//! without them nothing is.

use fvd_engine::faults::Fault;
use fvd_sim::campaign::run_seeds;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Seeds between the starts of two ranges.
const APART: u64 = 1 << 32;

/// Runs them all, several at a time, and prints a line for each. False if one is missed, or
/// something else fails.
pub fn command(start: u64, ranges: u64, limit: Duration, jobs: u64, only: Option<Fault>) -> bool {
    println!("{ranges} ranges of seeds from {start}, {} s for each fault and range", limit.as_secs());
    println!("{:<28} {:<7} seeds needed, seconds needed (by range)", "fault", "");
    let faults: Vec<_> = Fault::ALL.into_iter().filter(|f| only.is_none_or(|only| only == *f)).collect();
    let (next, missed, most) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(1));
    let work = || {
        while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (caught, seeds) = try_fault(*fault, start, ranges, limit);
            missed.fetch_add(u64::from(!caught), Ordering::Relaxed);
            most.fetch_max(seeds, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| (0..jobs.max(1)).for_each(|_| drop(scope.spawn(work))));
    // The same seeds without any fault: otherwise "caught" would mean nothing.
    let mut clean = true;
    for range in 0..ranges {
        let from = start + range * APART;
        let summary = run_seeds(from..from + most.load(Ordering::Relaxed), None, Some(limit));
        if let Some(failure) = summary.failure {
            clean = false;
            println!("without a fault: FAILED seed {}: {}", failure.seed, failure.text);
        }
    }
    let missed = missed.load(Ordering::Relaxed);
    println!("{} faults, missed: {missed}; the same seeds without a fault: {}", faults.len(), if clean { "nothing is caught" } else { "FAILED" });
    missed == 0 && clean
}

/// Runs one on every range and prints its line. Whether it was caught on each, and the most seeds
/// that took.
fn try_fault(fault: Fault, start: u64, ranges: u64, limit: Duration) -> (bool, u64) {
    let (mut seeds, mut times, mut caught, mut text) = (Vec::new(), Vec::new(), true, String::new());
    for range in 0..ranges {
        let from = start + range * APART;
        let begun = Instant::now();
        let summary = run_seeds(from..from + APART, Some(fault), Some(limit));
        caught &= summary.failure.is_some();
        seeds.push(summary.seeds);
        times.push(format!("{:.2}", begun.elapsed().as_secs_f64()));
        if let Some(failure) = summary.failure.filter(|_| text.is_empty()) {
            text = failure.text;
        }
    }
    let verdict = if caught { "caught" } else { "missed" };
    println!("{:<28} {verdict:<7} {seeds:?} [{}] {}", format!("{fault:?}"), times.join(", "), text.lines().next().unwrap_or_default());
    (caught, seeds.into_iter().max().unwrap_or_default())
}
