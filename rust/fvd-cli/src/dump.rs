// SPDX-License-Identifier: MIT OR Apache-2.0
//! `fvd dump`: metadata as it stands in the file, straight from the format crate.
//!
//! The image may be damaged or made to harm: nothing is allocated by a length that stands in it,
//! every loop is bounded by a constant or by the file, and text from it is escaped.

mod journal;
mod pages;

use crate::info::{features, uuid_text};
use crate::{Failure, Outcome, Target, printable};
use clap::Args;
use fvd_format::header::{BASE_LENGTH_UNKNOWN, HEADER_OFFSETS};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::{Header, PageZero, RegionKind, Uuid};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

#[derive(Args)]
pub struct Dump {
    #[command(flatten)]
    target: Target,
    /// Page 0 and both header copies
    #[arg(long)]
    header: bool,
    /// The journal's units and the records in them
    #[arg(long)]
    journal: bool,
    /// The double-write area, the page map, the headers of all metadata pages, and what the lookup table says
    #[arg(long)]
    pages: bool,
}

/// The image file, read a page at a time.
struct Image {
    file: File,
    length: u64,
}

impl Image {
    fn open(path: &std::path::Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::new(format!("cannot open '{}': {error}", path.display()));
        let mut file = File::open(path).map_err(failed)?;
        // Devices have no length but an end.
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, length })
    }

    /// The page at `offset`; why not, where it cannot be had.
    fn page(&self, offset: u64) -> Result<Vec<u8>, String> {
        if offset.checked_add(PAGE_SIZE as u64).is_none_or(|end| end > self.length) {
            return Err("beyond the end of the file".into());
        }
        let mut page = vec![0; PAGE_SIZE];
        self.file.read_exact_at(&mut page, offset).map_err(|error| format!("cannot be read: {error}"))?;
        Ok(page)
    }
}

type Out<'a> = BufWriter<std::io::StdoutLock<'a>>;

pub fn run(args: &Dump) -> Outcome {
    let path = &args.target.file;
    let image = Image::open(path)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let everything = !(args.header || args.journal || args.pages);
    let uuid = page_zero(&image, &mut out, args.header || everything)?;
    let Some(uuid) = uuid else {
        out.flush()?;
        return Err(Failure::new(format!("'{}': without page 0 nothing else can be told apart", path.display())));
    };
    let header = headers(&image, &uuid, &mut out, args.header || everything)?;
    let Some(header) = header else {
        out.flush()?;
        return Err(Failure::new(format!("'{}': no header copy can be used", path.display())));
    };
    if args.journal || everything {
        journal::print(&image, &header, &mut out)?;
    }
    if args.pages || everything {
        pages::print(&image, &header, &mut out)?;
    }
    out.flush()?;
    Ok(0)
}

fn page_zero(image: &Image, out: &mut Out, print: bool) -> Result<Option<Uuid>, Failure> {
    let decoded = image.page(0).and_then(|page| PageZero::decode(&page).map_err(|error| error.to_string()));
    match decoded {
        Ok(zero) => {
            if print {
                writeln!(out, "page 0: version {}, uuid {}", fvd_format::header::VERSION, uuid_text(&zero.uuid))?;
            }
            Ok(Some(zero.uuid))
        }
        Err(error) => {
            writeln!(out, "page 0: BAD: {}", printable(&error))?;
            Ok(None)
        }
    }
}

/// Prints both copies and returns the one that counts, or any that can be used.
fn headers(image: &Image, uuid: &Uuid, out: &mut Out, print: bool) -> Result<Option<Header>, Failure> {
    let mut best: Option<Header> = None;
    let mut first = None;
    for copy in [1, 2] {
        let offset = HEADER_OFFSETS[copy - 1];
        let decoded = image.page(offset).and_then(|page| Header::decode(uuid, copy, &page).map_err(|error| error.to_string()));
        match decoded {
            Ok(header) => {
                if print && first.as_ref() == Some(&header) {
                    writeln!(out, "header copy {copy} at {offset}: the same")?;
                } else if print {
                    writeln!(out, "header copy {copy} at {offset}:")?;
                    print_header(&header, out)?;
                }
                if best.as_ref().is_none_or(|best| header.generation > best.generation) {
                    best = Some(header.clone());
                }
                first = first.or(Some(header));
            }
            Err(error) => writeln!(out, "header copy {copy} at {offset}: BAD: {}", printable(&error))?,
        }
    }
    Ok(best)
}

fn print_header(header: &Header, out: &mut Out) -> Result<(), Failure> {
    let base_length = if header.base_length == BASE_LENGTH_UNKNOWN { "not known".into() } else { header.base_length.to_string() };
    let fields: [(&str, String); 24] = [
        ("generation", header.generation.to_string()),
        ("virtual size", header.virtual_size.to_string()),
        ("state", if header.clean { "clean".into() } else { "open".into() }),
        ("crypt method", header.crypt_method.to_string()),
        ("incompatible", format!("{:#x}", header.incompatible)),
        ("compatible", format!("{:#x}", header.compatible)),
        ("autoclear", format!("{:#x}", header.autoclear)),
        ("features", features(header).join(", ")),
        ("base name", format!("{:?}", header.base_name)),
        ("base format", format!("{:?}", header.base_format)),
        ("base length", base_length),
        ("data file name", format!("{:?}", header.data_name)),
        ("data file format", format!("{:?}", header.data_format)),
        ("block size", header.block_size.to_string()),
        ("chunk size", header.chunk_size.to_string()),
        ("storage grow unit", header.storage_grow_unit.to_string()),
        ("covered", header.covered.to_string()),
        ("data offset", header.data_offset.to_string()),
        ("reach", header.reach.to_string()),
        ("epoch", header.epoch.to_string()),
        ("first sequence", header.first_seq.to_string()),
        ("first commit", header.first_commit.to_string()),
        ("last batch", header.last_batch.to_string()),
        ("last checkpoint", header.last_checkpoint.to_string()),
    ];
    for (name, value) in fields {
        writeln!(out, "  {name}: {}", printable(&value))?;
    }
    for kind in RegionKind::ALL {
        if let Some(region) = header.region(kind) {
            let (offset, length, generation) = (region.offset, region.length, region.generation);
            let (map, sum) = (region.map_first, region.count_sum);
            writeln!(out, "  region {kind:?}: offset {offset}, length {length}, generation {generation}, map first {map}, count sum {sum}")?;
        }
    }
    Ok(())
}

/// Prints runs of places that have nothing to say for themselves as one line each.
struct Runs {
    unit: &'static str,
    current: Option<(u64, u64, String)>,
}

impl Runs {
    fn new(unit: &'static str) -> Self {
        Self { unit, current: None }
    }

    fn add(&mut self, index: u64, what: &str, out: &mut Out) -> Result<(), Failure> {
        match &mut self.current {
            Some((_, last, text)) if *last + 1 == index && text == what => *last = index,
            _ => {
                self.end(out)?;
                self.current = Some((index, index, what.to_owned()));
            }
        }
        Ok(())
    }

    fn end(&mut self, out: &mut Out) -> Result<(), Failure> {
        if let Some((first, last, what)) = self.current.take() {
            let range = if first == last { format!("{} {first}", self.unit) } else { format!("{}s {first}..={last}", self.unit) };
            writeln!(out, "  {range}: {}", printable(&what))?;
        }
        Ok(())
    }
}
