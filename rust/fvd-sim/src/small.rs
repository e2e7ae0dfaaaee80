// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd-sim exhaustive`: the small scope, with progress and a summary for each variant.

use fvd_engine::faults::Fault;
use fvd_sim::campaign::cpu_seconds;
use fvd_sim::exhaustive::alphabet::{ALPHABET, letter};
use fvd_sim::exhaustive::{Summary, VARIANTS, Variant, run, run_one, sequences};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Every sequence of up to `depth` letters, or only `sequence`, in all variants or in one. False if any fails.
pub fn command(depth: u32, jobs: usize, fault: Option<Fault>, sequence: Option<&str>, variant: Option<usize>) -> bool {
    let letters = match sequence.map(parse).transpose() {
        Ok(letters) => letters,
        Err(text) => {
            eprintln!("{text}");
            return false;
        }
    };
    let variants = match variant {
        None => &VARIANTS[..],
        Some(number) if (1..=VARIANTS.len()).contains(&number) => &VARIANTS[number - 1..number],
        Some(number) => {
            eprintln!("there is no variant {number}, only 1 to {}", VARIANTS.len());
            return false;
        }
    };
    println!("alphabet of {} operations, up to {depth} of them: {} sequences in each of {} variants", ALPHABET.len(), sequences(depth), variants.len());
    println!("{:<44} {:>9} {:>10} {:>12} {:>12} {:>12} {:>10}", "variant", "sequences", "cuts", "files tried", "distinct", "2nd cuts", "seconds");
    let (mut fine, mut recoveries, all, cpu) = (true, 0, Instant::now(), cpu_seconds());
    for &variant in variants {
        let begun = Instant::now();
        let summary = match &letters {
            Some(letters) => run_one(variant, letters, fault),
            None => run(variant, depth, jobs, fault, &progress(depth, begun)),
        };
        fine &= print(variant, &summary, begun, fault);
        recoveries += summary.recoveries;
    }
    let seconds = all.elapsed().as_secs_f64();
    let cpu = cpu_seconds().zip(cpu).map_or(seconds, |(now, then)| now - then);
    let rate = |seconds: f64| recoveries as f64 / seconds;
    println!("recoveries {recoveries} in {seconds:.1} s ({cpu:.1} s of CPU): {:.0}/s, {:.0} a CPU second; jobs {jobs}", rate(seconds), rate(cpu));
    fine
}

fn parse(text: &str) -> Result<Vec<usize>, String> {
    let names = || ALPHABET.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
    text.split(',').map(|name| letter(name).ok_or_else(|| format!("there is no operation '{name}'; there are: {}", names()))).collect()
}

/// A line a minute, or what is on the terminal.
fn progress(depth: u32, begun: Instant) -> impl Fn(usize) + Sync {
    let last = AtomicU64::new(0);
    move |number| {
        let now = begun.elapsed().as_secs() / if std::io::stderr().is_terminal() { 1 } else { 60 };
        if last.fetch_max(now, Ordering::Relaxed) < now {
            eprintln!("  sequence {number} of {}, {} s", sequences(depth), begun.elapsed().as_secs());
        }
    }
}

fn print(variant: Variant, summary: &Summary, begun: Instant, fault: Option<Fault>) -> bool {
    let layout = match variant {
        Variant { chunk: 0, .. } => "",
        Variant { device: false, .. } => "compact, ",
        Variant { device: true, .. } => "compact, device, ",
    };
    let name = format!("{layout}{}, {}-byte host", if variant.synced { "flushes between" } else { "no flushes" }, variant.alignment);
    let tally = &summary.tally;
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{name:<44} {:>9} {:>10} {:>12} {:>12} {:>12} {:>10.1}",
        tally.sequences,
        tally.cuts,
        tally.files,
        summary.distinct,
        summary.second[0],
        seconds
    );
    println!(
        "  files opened {}, of distinct metadata {} (recovery cut in each), left by these cuts {}; most changes at a cut {}, sampled {}",
        summary.opened, summary.metadata, summary.second[1], tally.most, tally.sampled
    );
    println!("  recoveries {} ({:.0}/s)", summary.recoveries, summary.recoveries as f64 / seconds);
    if let Some(text) = &summary.failure {
        let with = fault.map_or(String::new(), |fault| format!(" with {fault:?}"));
        println!("FAILED{with}: {text}\n  again: fvd-sim exhaustive --sequence NAMES (the operations named above)");
    }
    summary.failure.is_none()
}
