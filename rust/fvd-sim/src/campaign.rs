// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many seeds: one after the other, until one fails or the time is over.

use crate::run::{Report, Totals, run};
use crate::workload;
use fvd_engine::faults::Fault;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What was broken.
    pub text: String,
}

/// What came of many seeds.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub seeds: u64,
    /// What they did.
    pub totals: Totals,
    /// The first failure.
    pub failure: Option<Failure>,
    /// A hash over the hashes of all seeds.
    pub hash: u64,
}

thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });

/// Runs `f`; a panic – of the engine, or of the simulator's own asserts – is returned as text and
/// not printed.
pub fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                hook(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    QUIET.set(before);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        format!("panic: {}", text.unwrap_or_default())
    })
}

/// Runs one plan; panics count as broken promises.
pub fn run_caught(plan: &crate::plan::Plan, fault: Option<Fault>, trace: bool) -> Report {
    caught(|| run(plan, fault, trace)).unwrap_or_else(|text| Report { violation: Some(text), ..Report::default() })
}

/// A seed takes milliseconds. One that takes so long spins where no count of steps sees it.
const SPINS: Duration = Duration::from_secs(180);

/// Ends the process if a seed does not end; each that begins is sent there.
fn watch(fault: Option<Fault>) -> Sender<u64> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let Ok(mut seed) = receiver.recv() else { return };
        loop {
            let cpu = cpu_seconds().unwrap_or_default();
            match receiver.recv_timeout(SPINS) {
                Ok(next) => seed = next,
                Err(RecvTimeoutError::Disconnected) => return,
                // Nor does a process that was stopped meanwhile.
                Err(RecvTimeoutError::Timeout) if cpu_seconds().is_some_and(|now| now - cpu < SPINS.as_secs_f64() / 4.0) => {}
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        let with = fault.map_or(String::new(), |f| format!(" --fault {f:?}"));
        println!("FAILED seed {seed}: it has not ended in {} s; replay: fvd-sim replay --seed {seed}{with} --trace --no-shrink", SPINS.as_secs());
        std::process::exit(1);
    });
    sender
}

/// Runs the seeds of an iterator until one fails or the time is over.
pub fn run_seeds(seeds: impl Iterator<Item = u64>, fault: Option<Fault>, limit: Option<Duration>) -> Summary {
    let start = Instant::now();
    let watchdog = watch(fault);
    let mut summary = Summary::default();
    for seed in seeds {
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            break;
        }
        let _ = watchdog.send(seed);
        let report = run_caught(&workload::plan(seed), fault, false);
        summary.seeds += 1;
        summary.totals.add(&report.totals);
        summary.hash = crate::prng::mix(summary.hash ^ report.hash);
        if let Some(text) = report.violation {
            summary.failure = Some(Failure { seed, text });
            break;
        }
    }
    summary
}

/// Seconds that all threads of the process ran so far: on a busy machine a second of a core is more
/// than a second.
pub fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // After the program's name, which may hold anything: state and ten more, then user and system time,
    // in hundredths of a second whatever the kernel's own tick.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<f64>);
    Some((fields.next()?.ok()? + fields.next()?.ok()?) / 100.0)
}
