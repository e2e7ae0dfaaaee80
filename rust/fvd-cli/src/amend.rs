// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd amend`.

use crate::info::print_line;
use crate::size::{human, parse};
use crate::{Failure, Outcome, Target, host_options};
use clap::Args;
use fvd_engine::AmendParams;
use fvd_format::limits::SECTOR;
use fvd_host::{Options, disk::Disk};

#[derive(Args)]
pub struct Amend {
    #[command(flatten)]
    target: Target,
    /// Size of the disk; smaller only with --shrink
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    size: Option<u64>,
    /// What is beyond the new SIZE may be lost
    #[arg(long, requires = "size")]
    shrink: bool,
    /// Steps by which the file of a compact image grows, a multiple of the chunk size
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    storage_grow_unit: Option<u64>,
    /// Record another name of the base, or none if it is empty. Blocks of the disk that are in the base are read there from then on: it must have the same content
    #[arg(short, long, value_name = "BASE", requires = "backing_format", requires = "unsafe_backing")]
    backing: Option<String>,
    /// Format of the base: raw, fvd or one that QEMU knows; empty with an empty name
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,
    /// Only record the name of the base, as there is no check of its content (mandatory with --backing)
    #[arg(short = 'u', long, requires = "backing")]
    unsafe_backing: bool,
    /// Cannot change; what the image has is accepted
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    block_size: Option<u64>,
    /// Cannot change; what the image has is accepted
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    chunk_size: Option<u64>,
    /// Cannot change; what the image has is accepted
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    journal_size: Option<u64>,
    /// Cannot change; of a compact image accepted
    #[arg(long)]
    compact: bool,
    /// Print nothing on success
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: &Amend) -> Outcome {
    let path = &args.target.file;
    let about = |error: fvd_engine::Error| Failure::about(path, &error);
    let wrong = |text: String| Failure::new(format!("'{}': {text}", path.display()));
    let params = AmendParams {
        storage_grow_unit: args.storage_grow_unit,
        compact: args.compact.then_some(true),
        chunk_size: args.chunk_size,
        block_size: args.block_size,
        journal_size: args.journal_size,
    };
    let disk = Disk::open(path, &Options { allow_data: true, ..host_options() }).map_err(about)?;
    let before = disk.info().map_err(about)?.header;
    if let Some(size) = args.size {
        if size % SECTOR != 0 {
            return Err(wrong(format!("size {size} is no multiple of {SECTOR}")));
        }
        if size < before.virtual_size && !args.shrink {
            return Err(wrong(format!("size {size} is smaller than the disk's {}: say --shrink if what is beyond may be lost", before.virtual_size)));
        }
    }
    disk.amend(params).map_err(about)?;
    if let (Some(name), Some(format)) = (&args.backing, &args.backing_format)
        && (*name != before.base_name || *format != before.base_format)
    {
        disk.change_base(name, format).map_err(about)?;
    }
    if let Some(size) = args.size {
        disk.resize(size, true).map_err(about)?;
    }
    let after = disk.info().map_err(about)?.header;
    disk.close().map_err(about)?;
    if !args.quiet {
        let mut text = format!("'{}': {}", path.display(), human(after.virtual_size));
        if after.is_compact() {
            text += &format!(", grows by {}", human(after.storage_grow_unit));
        }
        if !after.base_name.is_empty() {
            text += &format!(", over {} base '{}'", after.base_format, after.base_name);
        }
        print_line(&text)?;
    }
    Ok(0)
}
