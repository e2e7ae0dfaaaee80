// SPDX-License-Identifier: MIT OR Apache-2.0
//! The planted faults, one after the other: each must be caught by the ordinary workload, and
//! without them nothing is.

use fvd_engine::faults::Fault;
use fvd_sim::campaign::run_seeds;
use std::time::{Duration, Instant};

/// Seeds between the starts of two ranges.
const APART: u64 = 1 << 32;

/// Runs them all and prints a line for each. False if one is missed, or something else fails.
pub fn command(start: u64, ranges: u64, limit: Duration, only: Option<&str>) -> bool {
    println!("{ranges} ranges of seeds from {start}, {} s for each fault and range", limit.as_secs());
    println!("{:<28} {:<7} seeds needed, seconds needed (by range)", "fault", "");
    let mut most = 1;
    let mut missed = 0;
    for fault in Fault::ALL.into_iter().filter(|f| only.is_none_or(|name| format!("{f:?}") == name)) {
        let mut seeds = Vec::new();
        let mut times = Vec::new();
        let mut caught = true;
        let mut text = String::new();
        for range in 0..ranges {
            let from = start + range * APART;
            let begun = Instant::now();
            let summary = run_seeds(from..from + APART, Some(fault), Some(limit));
            caught &= summary.failure.is_some();
            most = most.max(summary.seeds);
            seeds.push(summary.seeds);
            times.push(format!("{:.2}", begun.elapsed().as_secs_f64()));
            if let Some(failure) = summary.failure.filter(|_| text.is_empty()) {
                text = failure.text;
            }
        }
        missed += u64::from(!caught);
        let verdict = if caught { "caught" } else { "missed" };
        println!("{:<28} {verdict:<7} {seeds:?} [{}] {}", format!("{fault:?}"), times.join(", "), text.lines().next().unwrap_or_default());
    }
    // The same seeds without any fault: otherwise "caught" would mean nothing.
    let mut clean = true;
    for range in 0..ranges {
        let from = start + range * APART;
        let summary = run_seeds(from..from + most, None, Some(limit));
        if let Some(failure) = summary.failure {
            clean = false;
            println!("without a fault: FAILED seed {}: {}", failure.seed, failure.text);
        }
    }
    println!("missed: {missed}; the same seeds without a fault: {}", if clean { "nothing is caught" } else { "FAILED" });
    missed == 0 && clean
}
