// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd convert`.

use crate::create::Layout;
use crate::info::print_line;
use crate::progress::Printer;
use crate::size::{human, parse};
use crate::{Failure, Outcome, host_options, printable};
use clap::{Args, ValueEnum};
use fvd_host::Options;
use fvd_host::convert::{Source, Step, Target, convert};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    /// The bytes of the disk and nothing else
    Raw,
    /// An FVD image
    Fvd,
}

#[derive(Args)]
pub struct Convert {
    /// The image to copy, with all that it has in its bases
    source: PathBuf,
    /// The image to make; what is at TARGET is overwritten unless it is in use
    target: PathBuf,
    /// Format of SOURCE [default: fvd]. An FVD image is known by its first bytes; a raw one cannot be, it must be said
    #[arg(short = 'f', long, value_enum, value_name = "FORMAT")]
    source_format: Option<Format>,
    /// Format of TARGET
    #[arg(short = 'O', long, value_enum, value_name = "FORMAT")]
    target_format: Format,
    #[command(flatten)]
    layout: Layout,
    /// Leave zeroes in data out where aligned units of SIZE hold nothing else: a power of two from 512 to 1M; 0: write all
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse, default_value = "4K")]
    sparse: u64,
    /// Take no locks on SOURCE: allows an image in use, of which the copy may be out of date or torn
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Past the page cache (O_DIRECT)
    #[arg(long)]
    direct: bool,
    /// Show progress even if standard error is no terminal
    #[arg(short, long)]
    progress: bool,
    /// Print nothing on success
    #[arg(short, long)]
    quiet: bool,
}

/// Has SIGINT and SIGTERM noted, so that an unfinished target can be removed: 0, or the signal. Whoever
/// asks twice does not want to wait for that.
fn watch_signals() -> std::io::Result<Arc<AtomicUsize>> {
    let asked = Arc::new(AtomicUsize::new(0));
    let twice = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&twice))?;
        flag::register(signal, Arc::clone(&twice))?;
        flag::register_usize(signal, Arc::clone(&asked), signal as usize)?;
    }
    Ok(asked)
}

pub fn run(args: &Convert) -> Outcome {
    let (from, to) = (args.source.display(), args.target.display());
    let params = match (args.target_format, args.layout.given()) {
        (Format::Raw, Some(option)) => return Err(Failure::new(format!("'{to}': {option} is for FVD images, not for raw ones"))),
        (Format::Raw, None) => None,
        (Format::Fvd, _) => Some(args.layout.params(None)?),
    };
    let source = Source {
        path: args.source.clone(),
        raw: args.source_format == Some(Format::Raw),
        options: Options { direct: args.direct, no_lock: args.force_share, ..host_options() },
    };
    let target = Target { path: args.target.clone(), params, options: Options { direct: args.direct, ..host_options() }, sparse: args.sparse };
    let asked = watch_signals().map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;
    let mut printer = Printer::stderr(format!("converting '{from}'"), args.progress);
    let converted = convert(&source, &target, &mut |step| {
        match step {
            Step::Creating(progress) => printer.tick(progress),
            Step::Copying { elapsed, done, size } => printer.tick_of(elapsed, done, size),
        }
        asked.load(Ordering::Relaxed) == 0
    });
    printer.finish();
    let converted = match converted {
        Ok(converted) => converted,
        Err(error) => {
            let signal = asked.load(Ordering::Relaxed);
            if signal != 0 {
                eprintln!("fvd: {}", printable(&error.text));
                // Ends the program the way the signal would have.
                let _ = signal_hook::low_level::emulate_default_handler(signal as i32);
            }
            let mut failure = Failure::new(error.text);
            if args.source_format.is_none() && failure.text.ends_with("not an FVD image") {
                failure.text += "; a raw disk is copied with -f raw";
            }
            return Err(failure);
        }
    };
    if !args.quiet {
        print_line(&format!("converted '{from}' to '{to}': {}, {} of it written", human(converted.size), human(converted.written)))?;
    }
    Ok(0)
}
