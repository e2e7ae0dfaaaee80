// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd create`.

use crate::progress::Printer;
use crate::size::{human, parse};
use crate::{Failure, Outcome, host_options};
use clap::{Args, ValueEnum};
use fvd_engine::{CreateParams, Preallocation};
use fvd_format::limits::SECTOR;
use fvd_host::{Options, disk::Disk};
use std::path::PathBuf;

#[derive(Clone, Copy, Default, ValueEnum)]
enum Preallocate {
    /// Nothing but the length
    #[default]
    Off,
    /// Compact: every chunk gets its place; else as off
    Metadata,
    /// Allocated, without writing where the file system can
    Falloc,
    /// Written with zeroes
    Full,
}

/// Options that shape a new image.
#[derive(Args)]
pub struct Layout {
    /// Base image whose content the disk starts with; a relative path counts from FILE's directory
    #[arg(short, long, value_name = "BASE", requires = "backing_format")]
    backing: Option<String>,
    /// Format of the base: raw or fvd. Mandatory with a base; it is never guessed
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,
    /// Copy-on-write unit: a power of two from 4K to 2M [default: by the length of the base]
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    block_size: Option<u64>,
    /// Journal: 1M to 256M, a multiple of 64K [default: 16M]
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    journal_size: Option<u64>,
    /// Look for zeroes in the base, in runs of this many bytes or more (on: one block), so that they are never read from it
    #[arg(long, value_name = "on|off|SIZE", value_parser = parse_hole)]
    detect_sparse_hole: Option<u64>,
    /// Allocate storage when it is written, a chunk at a time, instead of laying the disk out like a raw file
    #[arg(long)]
    compact: bool,
    /// Allocation unit: a power of two from 64K to 64M [default: 1M, or what a larger block or a disk of more than 2P needs]
    #[arg(long, value_name = "SIZE", value_parser = parse, requires = "compact")]
    chunk_size: Option<u64>,
    /// Steps by which the file grows, a multiple of the chunk size [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse, requires = "compact")]
    storage_grow_unit: Option<u64>,
    /// How much of the disk's space is allocated now [default: off]
    #[arg(long, value_enum, value_name = "HOW")]
    preallocation: Option<Preallocate>,
}

#[derive(Args)]
pub struct Create {
    /// The image to make
    file: PathBuf,
    /// Size of the disk: bytes, or with K, M, G, T, P, E; without it, the size of the base
    #[arg(value_parser = parse)]
    size: Option<u64>,
    #[command(flatten)]
    layout: Layout,
    /// Only record the name of the base, which may be missing or of a format QEMU alone knows; needs SIZE
    #[arg(short = 'u', long, requires = "backing", requires = "size")]
    unsafe_backing: bool,
    /// Put the disk's content into a file of its own, as a raw image; FILE has the metadata. What is there is
    /// overwritten; a relative path counts from FILE's directory
    #[arg(long, value_name = "PATH")]
    data_file: Option<String>,
    /// Past the page cache (O_DIRECT)
    #[arg(long)]
    direct: bool,
    /// Show progress even if standard error is no terminal
    #[arg(long)]
    progress: bool,
    /// Print nothing on success
    #[arg(short, long)]
    quiet: bool,
}

impl Layout {
    /// The engine's parameters, for a disk of `size` bytes or of the base's length.
    pub fn params(&self, size: Option<u64>) -> Result<CreateParams, Failure> {
        let block_size = self.block_size.unwrap_or(0);
        let chunk_size = self.chunk_size.unwrap_or(0);
        Ok(CreateParams {
            virtual_size: size,
            block_size: u32::try_from(block_size).map_err(|_| Failure::new(format!("block size {block_size} is larger than 2M")))?,
            journal_size: self.journal_size.unwrap_or(0),
            base_name: self.backing.clone().unwrap_or_default(),
            base_format: self.backing_format.clone().unwrap_or_default(),
            data_name: String::new(),
            data_format: String::new(),
            detect_sparse_hole: self.detect_sparse_hole.unwrap_or(0),
            preallocation: match self.preallocation.unwrap_or_default() {
                Preallocate::Off => Preallocation::Off,
                Preallocate::Metadata => Preallocation::Metadata,
                Preallocate::Falloc => Preallocation::Falloc,
                Preallocate::Full => Preallocation::Full,
            },
            compact: self.compact,
            chunk_size: u32::try_from(chunk_size).map_err(|_| Failure::new(format!("chunk size {chunk_size} is larger than 64M")))?,
            storage_grow_unit: self.storage_grow_unit.unwrap_or(0),
        })
    }

    /// An option that was given, if there is one.
    pub fn given(&self) -> Option<&'static str> {
        let options = [
            (self.backing.is_some(), "--backing"),
            (self.block_size.is_some(), "--block-size"),
            (self.journal_size.is_some(), "--journal-size"),
            (self.detect_sparse_hole.is_some(), "--detect-sparse-hole"),
            (self.compact, "--compact"),
            (self.preallocation.is_some(), "--preallocation"),
        ];
        options.iter().find(|(given, _)| *given).map(|(_, name)| *name)
    }
}

fn parse_hole(text: &str) -> Result<u64, String> {
    match text {
        "on" => Ok(1),
        "off" => Ok(0),
        size => parse(size).map_err(|error| format!("{error}, on or off")),
    }
}

pub fn run(args: &Create) -> Outcome {
    if let Some(size) = args.size
        && size % SECTOR != 0
    {
        let near = size.saturating_add(SECTOR - 1) / SECTOR * SECTOR;
        return Err(Failure::new(format!("size {size} is no multiple of {SECTOR}: use {near}")));
    }
    if args.size.is_none() && args.layout.backing.is_none() {
        return Err(Failure::new(format!("'{}': a size is needed, as there is no base to take it from", args.file.display())));
    }
    let params = CreateParams {
        data_format: if args.data_file.is_some() { "raw".into() } else { String::new() },
        data_name: args.data_file.clone().unwrap_or_default(),
        ..args.layout.params(args.size)?
    };
    let options = Options { direct: args.direct, ..host_options() };
    let mut printer = Printer::stderr(format!("creating '{}'", args.file.display()), args.progress);
    let made = Disk::create(&args.file, &params, !args.unsafe_backing, &options, &mut |progress| printer.tick(progress));
    printer.finish();
    made.map_err(|error| Failure::about(&args.file, &error))?;
    if !args.quiet {
        let (info, _) = Disk::inspect(&args.file, &host_options()).map_err(|error| Failure::about(&args.file, &error))?;
        let mut text = format!("created '{}': {}", args.file.display(), human(info.header.virtual_size));
        if info.header.block_size != 0 {
            text += &format!(" over {} base '{}', in blocks of {}", info.header.base_format, info.header.base_name, human(info.header.block_size.into()));
        }
        if info.header.is_compact() {
            text += &format!(", compact, in chunks of {}", human(info.header.chunk_size.into()));
        }
        if info.header.has_data_file() {
            text += &format!(", data in '{}'", info.header.data_name);
        }
        crate::info::print_line(&text)?;
    }
    Ok(0)
}
