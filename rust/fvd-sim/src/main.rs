// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd-sim`: runs seeds, replays one, shrinks what fails, and proves by planted faults that it can
//! fail.
#![forbid(unsafe_code)]

mod faults;
mod small;

use clap::{Parser, Subcommand};
use fvd_engine::faults::Fault;
use fvd_sim::campaign::{Failure, Summary, cpu_seconds, run_caught, run_seeds};
use fvd_sim::prng::mix;
use fvd_sim::run::Totals;
use fvd_sim::{fault_loop, seeds, shrink, workload};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Deterministic simulator of the FVD engine: one seed decides everything.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the regression seeds and a range of others.
    Run {
        /// The seeds, `A..B`; without, fresh ones from the clock on.
        #[arg(long)]
        seeds: Option<Range>,
        /// Threads.
        #[arg(long, default_value_t = 1)]
        jobs: u64,
        /// Ends after so many seconds.
        #[arg(long)]
        seconds: Option<u64>,
    },
    /// Runs one seed again.
    Replay {
        /// The seed.
        #[arg(long)]
        seed: u64,
        /// Prints every event, of the shrunk plan where the seed fails and it is shrunk.
        #[arg(long)]
        trace: bool,
        /// With this planted fault.
        #[arg(long)]
        fault: Option<String>,
        /// Does not shrink a failure.
        #[arg(long)]
        no_shrink: bool,
    },
    /// Runs each seed twice and compares the hashes of all events.
    Determinism {
        /// The seeds, `A..B`.
        #[arg(long, default_value = "0..1000")]
        seeds: Range,
    },
    /// Runs the planted faults: each must be caught on each range of seeds.
    Faults {
        /// Fresh ranges of seeds.
        #[arg(long, default_value_t = 5)]
        ranges: u64,
        /// Seconds for a fault and a range.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The first range starts here; without, at a number from the clock.
        #[arg(long)]
        start: Option<u64>,
        /// Threads: so many faults at a time.
        #[arg(long, default_value_t = 1)]
        jobs: u64,
        /// Only this one.
        #[arg(long)]
        only: Option<String>,
    },
    /// Lets the N-th host operation fail, for N = 1, 2, … until nothing is left to fail.
    FaultLoop {
        /// Which cases.
        #[command(flatten)]
        choice: fault_loop::Choice,
        /// Threads.
        #[arg(long, default_value_t = 1)]
        jobs: usize,
        /// With this planted fault.
        #[arg(long)]
        fault: Option<String>,
    },
    /// Every sequence of a few operations, every crash point, every subset of what was not flushed.
    Exhaustive {
        /// Operations in a sequence, at most.
        #[arg(long, default_value_t = 3)]
        depth: u32,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// With this planted fault.
        #[arg(long)]
        fault: Option<String>,
        /// Only this sequence: names of operations, separated by commas.
        #[arg(long)]
        sequence: Option<String>,
        /// Only this variant, counted from 1.
        #[arg(long)]
        variant: Option<usize>,
    },
}

/// `A..B`.
#[derive(Clone, Copy, Debug)]
struct Range {
    from: u64,
    to: u64,
}

impl std::str::FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |s: &str| s.parse().map_err(|_| format!("'{s}' is no number"));
        let (from, to) = text.split_once("..").ok_or("expected A..B")?;
        Ok(Self { from: number(from)?, to: number(to)? })
    }
}

/// A place to start among the seeds that no run had before.
fn fresh() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    mix(now.as_nanos() as u64) >> 16
}

/// The revision of the program: as it was built, or as the working tree says.
fn revision() -> String {
    if let Some(built) = option_env!("FVD_REVISION") {
        return built.to_owned();
    }
    let output = std::process::Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

fn fault_named(name: &str) -> Result<Fault, String> {
    Fault::ALL.into_iter().find(|f| format!("{f:?}") == name).ok_or_else(|| format!("there is no planted fault '{name}'"))
}

fn print_totals(summary: &Summary, seconds: f64) {
    let Totals { guest_ops, host_ops, cuts, branches, recoveries, repeated, replays, injected, ordered, damaged, repaired, quiet } = summary.totals;
    let cpu = cpu_seconds().unwrap_or(seconds);
    let rate = |n: u64| format!("{:.0}/s, {:.0} a CPU second", n as f64 / seconds, n as f64 / cpu);
    println!("seeds {} in {seconds:.1} s ({cpu:.1} s of CPU), revision {}", summary.seeds, revision());
    println!("guest operations {guest_ops} ({}), host operations {host_ops}", rate(guest_ops));
    println!("power cuts {cuts} and {branches} other outcomes of them, recoveries {recoveries} ({}), {repeated} of them repeated, read-only replays {replays}", rate(recoveries));
    println!("operations made to fail {injected}, metadata writes checked for order {ordered}, damaged files opened {damaged}, repaired {repaired}, silent guests {quiet}");
}

/// Says how a seed failed, how to see it again, and the shortest script found.
fn explain(failure: &Failure, fault: Option<Fault>, shorten: bool, trace: bool) {
    let with = fault.map_or(String::new(), |f| format!(" --fault {f:?}"));
    println!("FAILED seed {}: {}", failure.seed, failure.text);
    println!("revision {}; replay: fvd-sim replay --seed {}{with} --trace --no-shrink", revision(), failure.seed);
    if !shorten {
        return;
    }
    let plan = workload::plan(failure.seed);
    let short = shrink::shrink(&plan, fault, Duration::from_secs(20));
    let report = run_caught(&short, fault, trace);
    for line in &report.trace {
        println!("{line}");
    }
    println!("shrunk from {} steps in {} sessions to {} in {}:", plan.steps(), plan.sessions.len(), short.steps(), short.sessions.len());
    println!("{}=> {}", short.describe(), report.violation.unwrap_or_default());
}

fn run_command(range: Option<Range>, jobs: u64, limit: Option<Duration>) -> bool {
    let range = range.unwrap_or_else(|| {
        let from = fresh();
        Range { from, to: from + if limit.is_some() { 1 << 40 } else { 1000 } }
    });
    println!("seeds {}..{}, jobs {jobs}", range.from, range.to);
    let start = Instant::now();
    let regressions = run_seeds(seeds::REGRESSIONS.iter().map(|r| r.0), None, None);
    let next = AtomicU64::new(range.from);
    let stop = AtomicBool::new(regressions.failure.is_some());
    let mut parts = vec![regressions];
    std::thread::scope(|scope| {
        let work = || {
            let seeds = std::iter::from_fn(|| {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                (seed < range.to && !stop.load(Ordering::Relaxed)).then_some(seed)
            });
            let summary = run_seeds(seeds, None, limit.map(|limit| limit.saturating_sub(start.elapsed())));
            stop.fetch_or(summary.failure.is_some(), Ordering::Relaxed);
            summary
        };
        let threads: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        parts.extend(threads.into_iter().map(|thread| thread.join().expect("panics are caught")));
    });
    let mut all = Summary::default();
    for part in parts {
        all.seeds += part.seeds;
        all.totals.add(&part.totals);
        all.failure = all.failure.or(part.failure);
    }
    print_totals(&all, start.elapsed().as_secs_f64());
    if let Some(failure) = &all.failure {
        explain(failure, None, true, false);
    }
    all.failure.is_none()
}

fn replay_command(seed: u64, trace: bool, fault: Option<Fault>, shorten: bool) -> bool {
    let plan = workload::plan(seed);
    if trace && !shorten {
        print!("{}", plan.describe());
    }
    let report = run_caught(&plan, fault, trace);
    for line in report.trace.iter().filter(|_| !shorten) {
        println!("{line}");
    }
    println!("seed {seed}: hash {:016x}, {:?}", report.hash, report.totals);
    if let Some(text) = report.violation {
        explain(&Failure { seed, text }, fault, shorten, trace);
        return false;
    }
    println!("no failure");
    true
}

fn determinism_command(range: Range) -> bool {
    let differ = |seed: &u64| {
        let plan = workload::plan(*seed);
        run_caught(&plan, None, false).hash != run_caught(&workload::plan(*seed), None, false).hash
    };
    let first = (range.from..range.to).find(differ);
    match first {
        Some(seed) => println!("FAILED seed {seed} differs from run to run (revision {})", revision()),
        None => println!("{} seeds run twice: every event alike", range.to - range.from),
    }
    first.is_none()
}

/// Runs `f` with the fault of that name, if any.
fn with_fault(name: Option<String>, f: impl FnOnce(Option<Fault>) -> bool) -> bool {
    match name.as_deref().map(fault_named).transpose() {
        Ok(fault) => f(fault),
        Err(text) => {
            eprintln!("{text}");
            false
        }
    }
}

fn main() -> ExitCode {
    let fine = match Args::parse().command {
        Command::Run { seeds, jobs, seconds } => run_command(seeds, jobs, seconds.map(Duration::from_secs)),
        Command::Replay { seed, trace, fault, no_shrink } => with_fault(fault, |fault| replay_command(seed, trace, fault, !no_shrink)),
        Command::Exhaustive { depth, jobs, fault, sequence, variant } => {
            with_fault(fault, |fault| small::command(depth, jobs, fault, sequence.as_deref(), variant))
        }
        Command::FaultLoop { choice, jobs, fault } => with_fault(fault, |fault| fault_loop::command(&choice, fault, jobs)),
        Command::Determinism { seeds } => determinism_command(seeds),
        Command::Faults { ranges, seconds, start, jobs, only } => {
            with_fault(only, |only| faults::command(start.unwrap_or_else(fresh), ranges, Duration::from_secs(seconds), jobs, only))
        }
    };
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
