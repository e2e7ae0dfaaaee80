// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd`: makes, describes and checks FVD images on this machine, without QEMU.
#![forbid(unsafe_code)]

mod amend;
mod check;
mod convert;
mod create;
mod dump;
mod info;
mod map;
mod progress;
mod size;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fvd_engine::host::LogLevel;
use fvd_host::Options;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// FVD (Fast Virtual Disk) images: create, describe, check.
#[derive(Parser)]
#[command(name = "fvd", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make an image; what is at FILE is overwritten unless it is in use
    Create(create::Create),
    /// Describe an image, without opening its base
    Info(info::Info),
    /// Change options of an image that exists; all of them are looked at before any changes
    Amend(amend::Amend),
    /// Check an image, and repair it. Exit status, by what is left: 0 sound, 2 damaged, 3 space leaked only, 1 could not be checked
    Check(check::Check),
    /// Copy a disk into a new image, of another format or layout if wished
    Convert(convert::Convert),
    /// List where the content of the disk is: in the image (data), in the base, or nowhere (zero)
    Map(map::Map),
    /// Print metadata as it stands in the file, damaged or not; takes no locks and writes nothing
    Dump(dump::Dump),
}

/// How results are printed.
#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// Options of every command that opens an image.
#[derive(Args)]
struct Opening {
    /// Take no locks: allows an image in use, of which the picture may be out of date or torn
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl Opening {
    fn options(&self) -> Options {
        Options { read_only: true, no_lock: self.force_share, ..host_options() }
    }
}

fn host_options() -> Options {
    Options { log: Some(Arc::new(|level, text: &str| note(level, text))), ..Options::default() }
}

fn note(level: LogLevel, text: &str) {
    let level = match level {
        LogLevel::Error => "error: ",
        LogLevel::Warning => "warning: ",
        LogLevel::Info => "",
    };
    eprintln!("fvd: {level}{}", printable(text));
}

/// What stopped a command: text for people, and the exit status.
struct Failure {
    text: String,
    status: u8,
}

impl Failure {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), status: 1 }
    }

    /// An error about the image at `path`; names it unless the text does so already.
    fn about(path: &Path, error: &fvd_engine::Error) -> Self {
        let name = path.display().to_string();
        if error.text.contains(&format!("'{name}'")) { Self::new(&error.text) } else { Self::new(format!("'{name}': {}", error.text)) }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        // Whoever reads the output has seen enough.
        let text = if error.kind() == std::io::ErrorKind::BrokenPipe { String::new() } else { format!("cannot print: {error}") };
        Self::new(text)
    }
}

type Outcome = Result<u8, Failure>;

/// Text from an image is a stranger's: nothing in it may steer a terminal.
fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

fn main() -> ExitCode {
    // Not clap's own status for mistakes in the command line, which is 2: that means damage here.
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    let outcome = match cli.command {
        Command::Create(args) => create::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Amend(args) => amend::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Dump(args) => dump::run(&args),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            if !failure.text.is_empty() {
                eprintln!("fvd: {}", printable(&failure.text));
            }
            ExitCode::from(failure.status)
        }
    }
}

/// The file an image command is about.
#[derive(Args)]
struct Target {
    /// The image
    file: PathBuf,
}
