// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd map`.

use crate::{Failure, Opening, Outcome, Output, Target};
use clap::Args;
use fvd_engine::Place;
use fvd_engine::host::FileId;
use fvd_host::{Options, disk::Disk};
use std::io::{BufWriter, Write};

/// Runs are asked for in steps of this, so that no request is long: bytes.
const STEP: u64 = 1 << 40;

#[derive(Args)]
pub struct Map {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    opening: Opening,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// Guest bytes that lie together.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    start: u64,
    len: u64,
    place: Place,
}

impl Run {
    /// Takes `next` in if it simply goes on.
    fn join(&mut self, next: &Run) -> bool {
        let goes_on = match (self.place, next.place) {
            (Place::Data { file, offset }, Place::Data { file: next_file, offset: next_offset }) => file == next_file && offset + self.len == next_offset,
            (a, b) => a == b,
        };
        if goes_on {
            self.len += next.len;
        }
        goes_on
    }

    fn name(&self) -> &'static str {
        match self.place {
            Place::Data { .. } => "data",
            Place::Zero => "zero",
            Place::Base => "base",
        }
    }

    fn offset(&self) -> Option<u64> {
        match self.place {
            Place::Data { offset, .. } => Some(offset),
            _ => None,
        }
    }
}

pub fn run(args: &Map) -> Outcome {
    let path = &args.target.file;
    let about = |error: fvd_engine::Error| Failure::about(path, &error);
    // What lies where is metadata: the data file is not opened.
    let options = Options { metadata_only: true, ..args.opening.options() };
    let disk = Disk::open(path, &options).map_err(about)?;
    let header = disk.info().map_err(about)?.header;
    let size = header.virtual_size;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut printer = Printer { output: args.output, first: true };
    printer.begin(&mut out)?;
    let mut joined: Option<Run> = None;
    let mut at = 0;
    while at < size {
        let status = disk.status(at, (size - at).min(STEP)).map_err(about)?;
        // Before its first write an image leaves all to a base that may still come.
        let place = if status.place == Place::Base && header.base_name.is_empty() { Place::Zero } else { status.place };
        let next = Run { start: at, len: status.len, place };
        at += status.len;
        if joined.as_mut().is_some_and(|run| run.join(&next)) {
            continue;
        }
        if let Some(run) = joined.replace(next) {
            printer.run(&mut out, &run)?;
        }
    }
    if let Some(run) = joined {
        printer.run(&mut out, &run)?;
    }
    printer.end(&mut out)?;
    out.flush()?;
    Ok(0)
}

struct Printer {
    output: Output,
    first: bool,
}

impl Printer {
    fn begin(&self, out: &mut impl Write) -> std::io::Result<()> {
        match self.output {
            Output::Human => writeln!(out, "{:<18} {:<18} {:<6} Image offset", "Start", "Length", "Place"),
            Output::Json => write!(out, "["),
        }
    }

    fn run(&mut self, out: &mut impl Write, run: &Run) -> std::io::Result<()> {
        if self.output == Output::Human {
            let offset = run.offset().map_or("-".into(), |offset| format!("{offset:#x}"));
            return writeln!(out, "{:<#18x} {:<#18x} {:<6} {offset}", run.start, run.len, run.name());
        }
        let comma = if std::mem::take(&mut self.first) { "" } else { ",\n" };
        write!(out, "{comma}{{ \"start\": {}, \"length\": {}, \"place\": \"{}\"", run.start, run.len, run.name())?;
        if let Some(offset) = run.offset() {
            write!(out, ", \"offset\": {offset}")?;
            if matches!(run.place, Place::Data { file: FileId::Data, .. }) {
                write!(out, ", \"file\": \"data\"")?;
            }
        }
        write!(out, "}}")
    }

    fn end(&self, out: &mut impl Write) -> std::io::Result<()> {
        if self.output == Output::Json { writeln!(out, "]") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_only_where_they_go_on() {
        let data = |start, len, offset| Run { start, len, place: Place::Data { file: FileId::Image, offset } };
        let mut run = data(0, 10, 100);
        assert!(run.join(&data(10, 5, 110)));
        assert!(!run.join(&data(15, 5, 200)));
        assert_eq!(run, data(0, 15, 100));
        let mut zero = Run { start: 0, len: 5, place: Place::Zero };
        assert!(zero.join(&Run { start: 5, len: 5, place: Place::Zero }));
        assert!(!zero.join(&Run { start: 10, len: 5, place: Place::Base }));
        assert_eq!(zero.len, 10);
    }
}
