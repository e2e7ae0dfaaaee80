// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd check`.

use crate::info::print_line;
use crate::progress::Printer;
use crate::size::human;
use crate::{Failure, Opening, Outcome, Output, Target, host_options};
use clap::{Args, ValueEnum};
use fvd_engine::{CheckReport, Kind, Repair};
use fvd_host::{Options, disk::Disk};
use serde_json::json;
use std::path::Path;

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Give back space that nothing uses
    Leaks,
    /// Leaks, and everything damaged; what is lost is told
    All,
}

#[derive(Args)]
pub struct Check {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    opening: Opening,
    /// Repair what is found; the image must not be in use
    #[arg(short, long, value_enum, value_name = "WHAT", conflicts_with = "force_share")]
    repair: Option<What>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Show progress even if standard error is no terminal
    #[arg(long)]
    progress: bool,
}

pub fn run(args: &Check) -> Outcome {
    let path = &args.target.file;
    let mut printer = Printer::stderr(format!("checking '{}'", path.display()), args.progress);
    let options = match args.repair {
        // A data file that is missing or too short is told, as other damage is.
        None => Options { metadata_only: true, allow_data: true, ..args.opening.options() },
        // Read-write: an image that was not closed recovers first.
        Some(_) => Options { allow_data: true, ..host_options() },
    };
    let repair = args.repair.map_or(Repair::None, |what| match what {
        What::Leaks => Repair::Leaks,
        What::All => Repair::All,
    });
    let result = Disk::open_with(path, &options, &mut |progress| printer.tick(progress)).and_then(|disk| {
        let mut report = disk.check(repair, &mut |progress| printer.tick(progress))?;
        if report.corruptions_fixed + report.leaked_fixed > 0 {
            // Looked at once more: what counts is what is left now.
            let again = disk.check(Repair::None, &mut |progress| printer.tick(progress))?;
            let CheckReport { findings, corruptions_fixed, leaked_fixed, lost, lost_bytes, .. } = report;
            report = CheckReport { corruptions_fixed, leaked_fixed, lost, lost_bytes, ..again };
            report.findings.splice(0..0, findings);
        }
        Ok((report, disk.close()))
    });
    printer.finish();
    let (report, closed) = result.map_err(|error| {
        // An image too damaged to be opened is damaged, not unchecked.
        let status = if error.kind == Kind::Corrupt { 2 } else { 1 };
        Failure { status, ..Failure::about(path, &error) }
    })?;
    match args.output {
        Output::Human => print_text(&report)?,
        Output::Json => print_json(path, &report)?,
    }
    // What was found is told all the same.
    closed.map_err(|error| Failure::about(path, &error))?;
    Ok(match (report.corruptions, report.leaked) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    })
}

fn print_text(report: &CheckReport) -> Result<(), Failure> {
    for finding in &report.findings {
        print_line(&format!("damaged: {finding}"))?;
    }
    let unlisted = (report.corruptions + report.corruptions_fixed).saturating_sub(report.findings.len() as u64);
    if unlisted > 0 {
        print_line(&format!("damaged: {unlisted} more"))?;
    }
    for (offset, len) in &report.lost {
        print_line(&format!("lost: {len} guest bytes from {offset} on: what they held cannot be told"))?;
    }
    let unlisted = report.lost_bytes - report.lost.iter().map(|(_, len)| len).sum::<u64>();
    if unlisted > 0 {
        print_line(&format!("lost: {unlisted} more guest bytes"))?;
    }
    if report.corruptions_fixed > 0 {
        print_line(&format!("{} damaged structures were repaired", report.corruptions_fixed))?;
    }
    if report.leaked_fixed > 0 {
        print_line(&format!("{} used by nothing were given back", human(report.leaked_fixed)))?;
    }
    if report.corruptions > 0 {
        print_line(&format!("{} damaged structures: data may be wrong or missing", report.corruptions))?;
    }
    if report.leaked > 0 {
        print_line(&format!("{} are used by nothing; no data is affected", human(report.leaked)))?;
    }
    if report.corruptions == 0 && report.leaked == 0 {
        print_line("No errors were found on the image.")?;
    }
    let percent = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
    if report.chunks_total > 0 {
        let (total, allocated) = (report.chunks_total, report.chunks_allocated);
        let (used, scattered) = (percent(allocated, total), percent(report.chunks_fragmented, allocated));
        print_line(&format!("{allocated}/{total} chunks = {used:.2}% allocated, {scattered:.2}% fragmented"))?;
    }
    if report.blocks_total > 0 {
        let present = percent(report.blocks_present, report.blocks_total);
        print_line(&format!("{}/{} blocks = {present:.2}% no longer need the base", report.blocks_present, report.blocks_total))?;
    }
    print_line(&format!("Image end offset: {}", report.image_end))
}

fn print_json(path: &Path, report: &CheckReport) -> Result<(), Failure> {
    let mut value = json!({
        "filename": path.display().to_string(),
        "format": "fvd",
        "check-errors": 0,
        "corruptions": report.corruptions,
        "corruptions-fixed": report.corruptions_fixed,
        "leaked-bytes": report.leaked,
        "leaked-bytes-fixed": report.leaked_fixed,
        "lost-bytes": report.lost_bytes,
        "lost": report.lost.iter().map(|(offset, length)| json!({ "offset": offset, "length": length })).collect::<Vec<_>>(),
        "total-blocks": report.blocks_total,
        "present-blocks": report.blocks_present,
        "image-end-offset": report.image_end,
        "findings": report.findings,
    });
    if report.chunks_total > 0 {
        // The names that qemu-img check has for them.
        value["total-clusters"] = report.chunks_total.into();
        value["allocated-clusters"] = report.chunks_allocated.into();
        value["fragmented-clusters"] = report.chunks_fragmented.into();
    }
    let text = serde_json::to_string_pretty(&value).expect("a value of ours");
    for line in text.lines() {
        print_line(line)?;
    }
    Ok(())
}
