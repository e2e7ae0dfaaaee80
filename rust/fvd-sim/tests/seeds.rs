// SPDX-License-Identifier: MIT OR Apache-2.0
//! The simulator as a test: regression seeds, fresh seeds, every event alike in a second run, and a
//! sample of the planted faults.

use fvd_engine::faults::Fault;
use fvd_sim::campaign::{run_caught, run_seeds};
use fvd_sim::{seeds, shrink, workload};
use std::time::Duration;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn regression_seeds_stay_fixed() {
    for (seed, why) in seeds::REGRESSIONS {
        let report = run_caught(&workload::plan(*seed), None, false);
        assert_eq!(report.violation, None, "seed {seed}, which once found: {why}");
    }
}

#[test]
fn fresh_seeds_find_nothing() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let from = number("FVD_SEED", now);
    let count = number("FVD_SEEDS", 300);
    println!("seeds from {from}");
    let summary = run_seeds((0..count).map(|i| from.wrapping_add(i)), None, None);
    assert!(summary.failure.is_none(), "replay: fvd-sim replay --seed N --trace; {:?}", summary.failure);
    assert!(summary.totals.recoveries > 0 && summary.totals.branches > 0 && summary.totals.repeated > 0 && summary.totals.ordered > 0 && summary.totals.damaged > 0, "an idle check: {:?}", summary.totals);
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..number("FVD_TWICE", 200) {
        let [one, two] = [0, 1].map(|_| run_caught(&workload::plan(seed), None, false));
        assert_eq!((one.hash, one.totals), (two.hash, two.totals), "seed {seed}");
    }
}

#[test]
fn what_fails_in_a_branch_shrinks_to_that_branch() {
    let fault = Some(Fault::RecoveryDropsPages);
    let found = (0..60).map(workload::plan).find(|plan| run_caught(plan, fault, false).violation.is_some_and(|text| text.contains("in the branch")));
    let plan = found.expect("a seed whose first failure is in a branch");
    let short = shrink::shrink(&plan, fault, Duration::from_secs(10));
    assert!(run_caught(&short, fault, false).violation.is_some() && short.steps() < plan.steps());
    assert!(short.sessions.iter().map(|session| session.branches.len()).sum::<usize>() <= 1, "{}", short.describe());
}

#[test]
fn mistakes_are_noticed() {
    // All of them: `fvd-sim faults`.
    for fault in [Fault::NoDataSync, Fault::NoDoubleWrite, Fault::CleanWithoutCheckpoint, Fault::LookupBeyondRun] {
        assert!(run_seeds(0..60, Some(fault), None).failure.is_some(), "{fault:?} is not noticed");
    }
}
