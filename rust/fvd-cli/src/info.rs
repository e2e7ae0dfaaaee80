// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd info`.

use crate::size::human;
use crate::{Failure, Opening, Outcome, Output, Target, printable};
use clap::Args;
use fvd_format::header::{BASE_LENGTH_UNKNOWN, compatible, incompatible};
use fvd_format::{Header, RegionKind, Uuid};
use fvd_host::{base_path, disk::Disk};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

#[derive(Args)]
pub struct Info {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    opening: Opening,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

pub fn print_line(text: &str) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout().lock(), "{}", printable(text))?)
}

pub fn uuid_text(uuid: &Uuid) -> String {
    let hex: Vec<String> = uuid.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..4], &hex[4..6], &hex[6..8], &hex[8..10], &hex[10..]].map(|part| part.concat()).join("-")
}

/// Names of the feature bits that are set; unknown ones by number.
pub fn features(header: &Header) -> Vec<String> {
    let named = |bits: u64, names: &[(u64, &str)], class: &str| {
        let known: u64 = names.iter().map(|(bit, _)| bit).sum();
        let mut out: Vec<String> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| (*name).to_owned()).collect();
        out.extend((0..64).filter(|n| bits & !known & (1 << n) != 0).map(|n| format!("{class} bit {n}")));
        out
    };
    let mut all = named(
        header.incompatible,
        &[
            (incompatible::COMPACT, "compact"),
            (incompatible::DATA_FILE, "data-file"),
            (incompatible::ENCRYPTED, "encrypted"),
            (incompatible::SNAPSHOTS, "snapshots"),
            (incompatible::ORIGINS, "origins"),
            (incompatible::CARRIED_DATA, "carried-data"),
        ],
        "incompatible",
    );
    all.extend(named(
        header.compatible,
        &[(compatible::COPY_ON_READ, "copy-on-read"), (compatible::PROFILE, "profile"), (compatible::NON_ZEROING, "non-zeroing")],
        "compatible",
    ));
    all.extend(named(header.autoclear, &[(fvd_format::header::autoclear::DIRTY_BITMAPS, "dirty-bitmaps")], "autoclear"));
    all
}

fn metadata_bytes(header: &Header) -> u64 {
    header.regions.iter().flatten().map(|region| region.length).sum()
}

fn known(base_length: u64) -> Option<u64> {
    (base_length != BASE_LENGTH_UNKNOWN).then_some(base_length)
}

pub fn run(args: &Info) -> Outcome {
    let path = &args.target.file;
    let (info, files) = Disk::inspect(path, &args.opening.options()).map_err(|error| Failure::about(path, &error))?;
    match args.output {
        Output::Json => {
            let text = serde_json::to_string_pretty(&as_json(path, &info.header, files.allocated())).expect("a value of ours");
            print_line_raw(&text)?;
        }
        Output::Human => {
            for line in as_text(path, &info.header, files.allocated()) {
                print_line(&line)?;
            }
        }
    }
    Ok(0)
}

fn print_line_raw(text: &str) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

fn journal_size(header: &Header) -> u64 {
    header.region(RegionKind::Journal).map_or(0, |region| region.length)
}

/// The names are those of `qemu-img info` where it has them.
fn as_json(path: &Path, header: &Header, allocated: Option<u64>) -> Value {
    let mut out = json!({
        "filename": path.display().to_string(),
        "format": "fvd",
        "virtual-size": header.virtual_size,
        "dirty-flag": !header.clean,
        "format-specific": { "type": "fvd", "data": {
            "version": fvd_format::header::VERSION,
            "uuid": uuid_text(&header.uuid),
            "block-size": header.block_size,
            "journal-size": journal_size(header),
            "base-length": known(header.base_length),
            "covered": header.covered,
            "data-offset": header.data_offset,
            "metadata-size": metadata_bytes(header),
            "generation": header.generation,
            "epoch": header.epoch,
            "features": features(header),
        }},
    });
    if header.has_data_file() {
        let data = &mut out["format-specific"]["data"];
        data["data-file"] = header.data_name.as_str().into();
        data["data-file-format"] = header.data_format.as_str().into();
    }
    if header.is_compact() {
        let data = &mut out["format-specific"]["data"];
        data["chunk-size"] = header.chunk_size.into();
        data["storage-grow-unit"] = header.storage_grow_unit.into();
        data["chunks"] = header.chunks().into();
        data["reach"] = header.reach.into();
    }
    if let Some(allocated) = allocated {
        out["actual-size"] = allocated.into();
    }
    if !header.base_name.is_empty() {
        out["backing-filename"] = header.base_name.as_str().into();
        out["backing-filename-format"] = header.base_format.as_str().into();
        if let Ok(full) = base_path(path, &header.base_name) {
            out["full-backing-filename"] = full.display().to_string().into();
        }
    }
    out
}

fn as_text(path: &Path, header: &Header, allocated: Option<u64>) -> Vec<String> {
    let with_bytes = |bytes: u64| format!("{} ({bytes} bytes)", human(bytes));
    let mut out = vec![
        format!("image: {}", path.display()),
        format!("file format: fvd (version {})", fvd_format::header::VERSION),
        format!("virtual size: {}", with_bytes(header.virtual_size)),
    ];
    if let Some(allocated) = allocated {
        out.push(format!("disk size: {}", human(allocated)));
    }
    if !header.base_name.is_empty() {
        let actual = base_path(path, &header.base_name).ok().map(|full| full.display().to_string());
        let actual = actual.filter(|full| *full != header.base_name).map_or(String::new(), |full| format!(" (actual path: {full})"));
        out.push(format!("backing file: {}{actual}", header.base_name));
        out.push(format!("backing file format: {}", header.base_format));
        out.push(format!("backing file length: {}", known(header.base_length).map_or("not known".into(), with_bytes)));
    }
    if header.has_data_file() {
        out.push(format!("data file: {}", header.data_name));
        out.push(format!("data file format: {}", header.data_format));
    }
    if header.is_compact() {
        out.push(format!("chunk size: {}", human(header.chunk_size.into())));
        out.push(format!("grows by: {}", human(header.storage_grow_unit)));
    }
    if header.block_size != 0 {
        out.push(format!("block size: {}", human(header.block_size.into())));
    }
    if journal_size(header) != 0 {
        out.push(format!("journal: {}", human(journal_size(header))));
    }
    out.push(format!("metadata: {}", human(metadata_bytes(header))));
    out.push(format!("data offset: {}", header.data_offset));
    out.push(format!("uuid: {}", uuid_text(&header.uuid)));
    let features = features(header);
    if !features.is_empty() {
        out.push(format!("features: {}", features.join(", ")));
    }
    let state = if header.clean { "closed in good order" } else { "in use, or not closed: the next open recovers it" };
    out.push(format!("state: {state}"));
    out
}
