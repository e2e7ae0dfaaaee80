// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fault loops as a test: a sample of the hosts, and proof that they can fail. All of them:
//! `fvd-sim fault-loop`.

use fvd_engine::faults::Fault;
use fvd_sim::fault_loop::{Choice, Totals, run};

fn some(variant: &str, phase: &str, fault: Option<Fault>) -> Totals {
    let choice = Choice { variant: Some(variant.into()), phase: Some(phase.into()), quick: true, ..Choice::default() };
    run(&choice, fault, 1, &|_| ())
}

#[test]
fn each_operation_may_fail() {
    for (variant, phase) in
        [("512-growing", "create-again"), ("4096-growing", "pristine"), ("512-fixed", "recover-journal"), ("512-growing", "look-pages"), ("512-growing", "write")]
    {
        let totals = some(variant, phase, None);
        assert_eq!(totals.violation, None);
        // Each loop, two for each of the five modes, ends with a case in which nothing was left to fail.
        assert!(totals.cases > 50 && totals.failed.iter().sum::<u64>() >= totals.cases - 10, "an idle loop: {totals:?}");
    }
}

#[test]
fn mistakes_in_error_paths_are_noticed() {
    for (fault, phase, what) in [
        (Fault::FailedCommitForgotten, "layout", "everything was committed"),
        (Fault::RetryBehind, "layout", "CC-6"),
        (Fault::FailedSyncForgotten, "layout", "not poisoned (R11)"),
        (Fault::WritesAfterPoison, "layout", "after a failed sync"),
        (Fault::BaseErrorIsZero, "layout", "(CC-3): cell 8 is zero"),
        (Fault::BaseErrorIsNone, "pristine", "found zero"),
        (Fault::PageCountedTwice, "recover-pages", "a write was lost"),
        (Fault::CreateKeepsPageZero, "create-again", "looks like an image"),
    ] {
        let text = some("512-growing", phase, Some(fault)).violation.unwrap_or_default();
        // In a case, not in the runs that prepare them.
        assert!(text.contains("again: fvd-sim fault-loop"), "{fault:?} is not noticed: {text}");
        assert!(text.contains(what), "{fault:?} is noticed as something else: {text}");
    }
}
