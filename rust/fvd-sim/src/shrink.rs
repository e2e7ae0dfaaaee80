// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a failing plan short: whatever can be left out and it still fails, is left out.

use crate::campaign::run_caught;
use crate::plan::{Plan, Session};
use crate::world::Failures;
use fvd_engine::faults::Fault;
use std::time::{Duration, Instant};

/// Shrinks `plan`, which fails, for at most `limit`. Any failure will do: the shortest way to one
/// of them says most.
pub fn shrink(plan: &Plan, fault: Option<Fault>, limit: Duration) -> Plan {
    let start = Instant::now();
    let mut best = plan.clone();
    let fails = |plan: &Plan| start.elapsed() < limit && run_caught(plan, fault, false).violation.is_some();
    // What comes after the failure matters least.
    while best.sessions.len() > 1 {
        let mut shorter = best.clone();
        shorter.sessions.pop();
        if !fails(&shorter) {
            break;
        }
        best = shorter;
    }
    loop {
        let before = size(&best);
        knobs(&mut best, &fails);
        sessions(&mut best, &fails);
        for session in 0..best.sessions.len() {
            steps(&mut best, session, &fails);
        }
        if size(&best) == before || start.elapsed() >= limit {
            return best;
        }
    }
}

fn size(plan: &Plan) -> (usize, usize, usize) {
    let extras = plan.sessions.iter().filter(|s| s.failures != Failures::default() || s.damage.is_some()).count();
    let branches: usize = plan.sessions.iter().map(|s| s.branches.len()).sum();
    (plan.sessions.len() + plan.create_cuts.len(), plan.steps(), extras + branches)
}

/// Tries `change`, and keeps it if the plan still fails.
fn attempt(best: &mut Plan, fails: &impl Fn(&Plan) -> bool, change: impl FnOnce(&mut Plan)) -> bool {
    let mut candidate = best.clone();
    change(&mut candidate);
    let still = fails(&candidate);
    if still {
        *best = candidate;
    }
    still
}

/// One queue, no haste, no failures: whatever is not needed.
fn knobs(best: &mut Plan, fails: &impl Fn(&Plan) -> bool) {
    if !best.create_cuts.is_empty() {
        attempt(best, fails, |plan| plan.create_cuts.clear());
    }
    attempt(best, fails, |plan| {
        plan.options.queues = 1;
        plan.sessions.iter_mut().flat_map(|s| &mut s.steps).for_each(|step| step.queue = 0);
    });
    attempt(best, fails, |plan| plan.options.inline_percent = 0);
    attempt(best, fails, |plan| plan.options.depth = 1);
    attempt(best, fails, |plan| plan.options.latency = [crate::clock::Latency::NONE; 2]);
    attempt(best, fails, |plan| plan.sessions.iter_mut().flat_map(|s| &mut s.steps).for_each(|step| step.shim = false));
    for session in 0..best.sessions.len() {
        if best.sessions[session].damage.is_some() {
            attempt(best, fails, |plan| plan.sessions[session].damage = None);
        }
        if best.sessions[session].failures != Failures::default() {
            attempt(best, fails, |plan| plan.sessions[session].failures = Failures::default());
        }
    }
}

fn sessions(best: &mut Plan, fails: &impl Fn(&Plan) -> bool) {
    let mut at = best.sessions.len();
    while at > 0 {
        at -= 1;
        attempt(best, fails, |plan| {
            plan.sessions.remove(at);
        });
        if best.sessions.get(at).is_some_and(|s| s.cut.is_some()) {
            attempt(best, fails, |plan| plan.sessions[at].cut = None);
        }
        branches(best, at, fails);
    }
}

/// Leaves out the other outcomes of the session's cut, or all but one.
fn branches(best: &mut Plan, session: usize, fails: &impl Fn(&Plan) -> bool) {
    let seeds = best.sessions.get(session).map_or(Vec::new(), |s| s.branches.clone());
    if seeds.is_empty() || attempt(best, fails, |plan| plan.sessions[session].branches.clear()) || seeds.len() == 1 {
        return;
    }
    seeds.into_iter().any(|seed| attempt(best, fails, |plan| plan.sessions[session].branches = vec![seed]));
}

/// Leaves out runs of steps: halves, quarters, … single ones.
fn steps(best: &mut Plan, session: usize, fails: &impl Fn(&Plan) -> bool) {
    let count = |plan: &Plan| plan.sessions.get(session).map_or(0, |s: &Session| s.steps.len());
    let mut run = count(best).next_power_of_two();
    while run > 0 {
        let mut at = 0;
        while at < count(best) {
            let end = (at + run).min(count(best));
            let gone = attempt(best, fails, |plan| {
                plan.sessions[session].steps.drain(at..end);
            });
            if !gone {
                at = end;
            }
        }
        run /= 2;
    }
}
