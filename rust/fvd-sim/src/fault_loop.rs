// SPDX-License-Identifier: MIT OR Apache-2.0
//! Resource-fault loops, in SQLite's manner: the N-th host operation of a phase of an image's life
//! fails, once or for ever, for N = 1, 2, … until a run in which nothing is left to fail. Random
//! failures find what is common; these loops leave out no operation, so that each error path of
//! the engine is taken at least once.

mod case;
mod script;

use crate::campaign::caught;
use crate::world::{FAILED_KINDS, Reach};
use case::{Case, Outcome};
use fvd_engine::Kind;
use fvd_engine::faults::Fault;
use script::{VARIANTS, Variant};
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A loop that gets here does not end by itself.
const MOST: u64 = 100_000;

/// What fails, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One operation, with EIO.
    Eio,
    /// It and all later ones, with EIO.
    EioForever,
    /// One operation, whichever it is, with ENOSPC.
    Enospc,
    /// Whatever needs space, from this operation on, with ENOSPC.
    Full,
    /// Whatever is asked of the base, from this operation on, with EIO.
    BaseForever,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Eio, Self::EioForever, Self::Enospc, Self::Full, Self::BaseForever];

    fn name(self) -> &'static str {
        match self {
            Self::Eio => "eio",
            Self::EioForever => "eio-forever",
            Self::Enospc => "enospc",
            Self::Full => "full",
            Self::BaseForever => "base-forever",
        }
    }

    /// Whether the next operation works again.
    fn passes(self) -> bool {
        matches!(self, Self::Eio | Self::Enospc)
    }

    fn reach(self) -> Reach {
        match self {
            Self::Full => Reach::Space,
            Self::BaseForever => Reach::Base,
            _ => Reach::All,
        }
    }

    fn errno(self) -> i64 {
        if matches!(self, Self::Enospc | Self::Full) { -28 } else { -5 }
    }

    /// What the guest must be told.
    fn kind(self) -> Kind {
        if matches!(self, Self::Enospc | Self::Full) { Kind::NoSpace } else { Kind::Host(5) }
    }
}

/// What ends a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// A close, without further failures.
    Close,
    /// A power cut.
    Cut,
}

impl After {
    fn name(self) -> &'static str {
        if self == Self::Close { "close" } else { "cut" }
    }
}

/// Which cases are run; all where nothing is said.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Choice {
    /// Only on this host.
    #[arg(long)]
    pub variant: Option<String>,
    /// Only this phase.
    #[arg(long)]
    pub phase: Option<String>,
    /// Only this mode.
    #[arg(long)]
    pub mode: Option<String>,
    /// Only with this end: close or cut.
    #[arg(long)]
    pub after: Option<String>,
    /// Only this operation fails, counted from 1.
    #[arg(long)]
    pub at: Option<u64>,
    /// Both ends take turns, instead of each N with each.
    #[arg(long)]
    pub quick: bool,
    /// Prints every event of a case that fails.
    #[arg(long)]
    pub trace: bool,
}

fn wanted(only: Option<&String>, name: &str) -> bool {
    only.is_none_or(|only| only == name)
}

/// What the loops did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Cases run.
    pub cases: u64,
    /// Operations made to fail, by kind.
    pub failed: [u64; FAILED_KINDS.len()],
    /// The first broken promise, with the command that shows it again.
    pub violation: Option<String>,
}

impl Totals {
    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.failed.iter_mut().zip(other.failed).for_each(|(a, b)| *a += b);
        self.violation = self.violation.take().or(other.violation);
    }

    fn kinds(&self) -> String {
        let mut out = String::new();
        for (kind, count) in FAILED_KINDS.iter().zip(self.failed) {
            let _ = write!(out, " {kind} {count}");
        }
        out
    }
}

/// Runs the cases of a choice, a host a thread; `say` gets a line for each phase.
pub fn run(choice: &Choice, fault: Option<Fault>, jobs: usize, say: &(dyn Fn(String) + Sync)) -> Totals {
    let variants: Vec<&Variant> = VARIANTS.iter().filter(|v| wanted(choice.variant.as_ref(), v.name)).collect();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        let mut totals = Totals::default();
        while let Some(variant) = variants.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| !stop.load(Ordering::Relaxed)) {
            totals.add(on_host(variant, choice, fault, say));
            stop.fetch_or(totals.violation.is_some(), Ordering::Relaxed);
        }
        totals
    };
    let mut all = Totals::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| all.add(thread.join().expect("panics are caught")));
    });
    all
}

/// All loops on one host, until a promise is broken.
fn on_host(variant: &Variant, choice: &Choice, fault: Option<Fault>, say: &(dyn Fn(String) + Sync)) -> Totals {
    let mut totals = Totals::default();
    let phases = match caught(|| script::phases(variant, fault)).and_then(|phases| phases) {
        Ok(phases) => phases,
        Err(text) => {
            totals.violation = Some(format!("{}: a run without any failure: {text}", variant.name));
            return totals;
        }
    };
    for phase in phases.iter().filter(|phase| wanted(choice.phase.as_ref(), phase.name)) {
        let mut part = Totals::default();
        for mode in Mode::ALL.into_iter().filter(|mode| wanted(choice.mode.as_ref(), mode.name())) {
            for after in [After::Close, After::Cut].into_iter().filter(|after| wanted(choice.after.as_ref(), after.name())) {
                let case = Case { phase, mode, after, at: 1, fault };
                part.add(one_loop(variant, case, choice));
                if part.violation.is_some() {
                    totals.add(part);
                    return totals;
                }
            }
        }
        say(format!("{:<13} {:<16} {:>5} cases, made to fail:{}", variant.name, phase.name, part.cases, part.kinds()));
        totals.add(part);
    }
    totals
}

/// N = 1, 2, … until nothing is left to fail.
fn one_loop(variant: &Variant, mut case: Case, choice: &Choice) -> Totals {
    let mut totals = Totals::default();
    // With both ends taking turns, one has the odd numbers.
    let by = if choice.quick { 2 } else { 1 };
    case.at = choice.at.unwrap_or(if choice.quick && case.after == After::Cut { 2 } else { 1 });
    loop {
        let outcome = caught(|| case::run(&case, choice.trace)).unwrap_or_else(|text| Outcome { violation: Some(text), ..Outcome::default() });
        let injected: u64 = outcome.failed.iter().sum();
        totals.add(Totals { cases: 1, failed: outcome.failed, violation: None });
        let endless = (case.at > MOST).then(|| "the loop does not end".to_owned());
        if let Some(text) = outcome.violation.or(endless) {
            totals.violation = Some(explain(variant, &case, &outcome.place, &text, &outcome.trace));
            return totals;
        }
        if injected == 0 || choice.at.is_some() {
            return totals;
        }
        case.at += by;
    }
}

/// A broken promise as text: where, what, and how to see it again.
fn explain(variant: &Variant, case: &Case, place: &str, text: &str, trace: &[String]) -> String {
    let (phase, mode, after, at) = (case.phase.name, case.mode.name(), case.after.name(), case.at);
    let with = case.fault.map_or(String::new(), |fault| format!(" --fault {fault:?}"));
    let mut out = String::new();
    for line in trace {
        out += line;
        out.push('\n');
    }
    out += &format!("host {}, phase {phase}, operation {at} fails ({mode}), then {after}; at {place}: {text}\n", variant.name);
    out += &format!("again: fvd-sim fault-loop --variant {} --phase {phase} --mode {mode} --after {after} --at {at}{with} --trace", variant.name);
    out
}

/// The subcommand: prints what was done; false if a promise was broken.
pub fn command(choice: &Choice, fault: Option<Fault>, jobs: usize) -> bool {
    let totals = run(choice, fault, jobs, &|line| println!("{line}"));
    println!("{} cases, operations made to fail:{}", totals.cases, totals.kinds());
    let idle = totals.failed.iter().all(|count| *count == 0);
    match &totals.violation {
        Some(text) => println!("FAILED {text}"),
        None if idle => println!("FAILED nothing was made to fail"),
        None => println!("no promise was broken"),
    }
    totals.violation.is_none() && !idle
}
