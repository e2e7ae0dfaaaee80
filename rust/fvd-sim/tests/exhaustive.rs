// SPDX-License-Identifier: MIT OR Apache-2.0
//! The exhaustive mode in small, and that it can fail. All of depth 3: `fvd-sim exhaustive`.

use fvd_engine::faults::Fault;
use fvd_sim::exhaustive::{VARIANTS, run};

#[test]
fn depth_two_holds() {
    for variant in VARIANTS {
        let summary = run(variant, 2, 2, None, &|_| ());
        println!("{variant:?}: {summary:?}");
        assert_eq!(summary.failure, None);
        // Nobody trusts an idle loop.
        assert!(summary.distinct > 3000 && summary.second[1] > 3000, "{summary:?}");
    }
}

#[test]
fn planted_faults_are_caught() {
    let faults = [Fault::NoDataSync, Fault::NoJournalSync, Fault::HeaderBeforePages, Fault::NoDoubleWrite, Fault::NarrowHull, Fault::HeaderOneCopy];
    let rebuilding = [Fault::OldCommitsCount, Fault::RegionsAfterHeader, Fault::CleanWithoutCheckpoint, Fault::LastBlockLeftHalf];
    for fault in faults.into_iter().chain(rebuilding) {
        let failure = VARIANTS.iter().find_map(|variant| run(*variant, 2, 2, Some(fault), &|_| ()).failure);
        println!("{fault:?}: {failure:?}");
        assert!(failure.is_some(), "{fault:?} is missed");
    }
}
