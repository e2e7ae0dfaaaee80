// SPDX-License-Identifier: MIT OR Apache-2.0
//! The double-write area, the page map and all metadata pages, as text.

use super::{Image, Out, Runs};
use crate::{Failure, printable};
use fvd_format::double_write::Batch;
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, HEADER_SIZE, PAYLOAD_BITS, PAYLOAD_ENTRIES};
use fvd_format::{Header, Region, RegionKind};
use std::io::Write;

/// Most pages of one region that are looked at: 16 GiB of metadata, which no honest image has.
const PAGES_MAX: u64 = 4 << 20;

pub fn print(image: &Image, header: &Header, out: &mut Out) -> Result<(), Failure> {
    double_write(image, header, out)?;
    let mut map = Map { image, header, cached: None };
    for kind in RegionKind::ALL {
        let paged = kind == RegionKind::PageMap || kind.is_mapped();
        if let Some(region) = header.region(kind).filter(|_| paged) {
            print_region(image, header, kind, region, &mut map, out)?;
        }
    }
    Ok(())
}

fn double_write(image: &Image, header: &Header, out: &mut Out) -> Result<(), Failure> {
    let Some(area) = header.region(RegionKind::DoubleWrite) else {
        writeln!(out, "double-write area: none")?;
        return Ok(());
    };
    writeln!(out, "double-write area at {}:", area.offset)?;
    let head = match image.page(area.offset) {
        Ok(head) => head,
        Err(error) => return Ok(writeln!(out, "  BAD: {error}")?),
    };
    let batch = match Batch::decode(&header.uuid, &head) {
        Ok(batch) => batch,
        Err(_) if head.iter().all(|&b| b == 0) => return Ok(writeln!(out, "  empty")?),
        Err(error) => return Ok(writeln!(out, "  no batch: {}", printable(&error.to_string()))?),
    };
    let state = if batch.number > header.last_batch && !header.clean { "written back at the next open" } else { "done with" };
    writeln!(out, "  batch {}: {} pages, {state}", batch.number, batch.entries.len())?;
    for (i, entry) in batch.entries.iter().enumerate() {
        // `decode` bounds the number of entries by what the area holds.
        let stored = image.page(area.offset + (i as u64 + 1) * PAGE_SIZE as u64);
        let good = stored.is_ok_and(|stored| {
            let generation = header.region(entry.kind).map_or(0, |region| region.generation);
            page::open(&header.uuid, entry.kind, generation, entry.index, &stored).is_ok() && page::stored_crc(&stored) == entry.crc
        });
        writeln!(out, "    page {} of {:?}: {}", entry.index, entry.kind, if good { "good" } else { "BAD" })?;
    }
    Ok(())
}

/// The page map, one page of it in memory.
struct Map<'a> {
    image: &'a Image,
    header: &'a Header,
    cached: Option<(u64, Option<Vec<u8>>)>,
}

impl Map<'_> {
    /// Whether page `bit` counts as stored; `None` where the page map cannot say.
    fn stored(&mut self, bit: u64) -> Option<bool> {
        let index = bit / PAYLOAD_BITS;
        if self.cached.as_ref().is_none_or(|(cached, _)| *cached != index) {
            let region = self.header.region(RegionKind::PageMap)?;
            let offset = index.checked_mul(PAGE_SIZE as u64).and_then(|at| region.offset.checked_add(at))?;
            let page = self.image.page(offset).ok().filter(|page| page::open(&self.header.uuid, RegionKind::PageMap, region.generation, index, page).is_ok());
            self.cached = Some((index, page));
        }
        let page = self.cached.as_ref()?.1.as_ref()?;
        let within = (bit % PAYLOAD_BITS) as usize;
        Some(page[HEADER_SIZE + within / 8] & (1 << (within % 8)) != 0)
    }
}

/// Entries of a page of the lookup table.
fn entries(page: &[u8]) -> impl Iterator<Item = u32> {
    page[HEADER_SIZE..].as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Chunks of a page of the lookup table, in runs that lie one behind the other.
fn print_entries(page: &[u8], index: u64, out: &mut Out) -> Result<(), Failure> {
    const SEALED: u32 = 1 << 31;
    let mut entries = (index * PAYLOAD_ENTRIES..).zip(entries(page)).peekable();
    while let Some((guest, entry)) = entries.next() {
        if entry == 0 {
            continue;
        }
        let mut count = 1u64;
        while entries.next_if(|(_, next)| u64::from(*next) == u64::from(entry) + count).is_some() {
            count += 1;
        }
        let (first, sealed) = (u64::from(entry & !SEALED), if entry & SEALED == 0 { "" } else { ", sealed" });
        let name = |first: u64| if count == 1 { format!(" {first}") } else { format!("s {first}..={}", first + count - 1) };
        match first.checked_sub(1) {
            Some(id) => writeln!(out, "    chunk{}: in storage chunk{}{sealed}", name(guest), name(id))?,
            None => writeln!(out, "    chunk{}: BAD: {entry:#x}", name(guest))?,
        }
    }
    Ok(())
}

fn print_region(image: &Image, header: &Header, kind: RegionKind, region: &Region, map: &mut Map, out: &mut Out) -> Result<(), Failure> {
    writeln!(out, "{kind:?}: {} pages at {}", region.pages(), region.offset)?;
    let mut runs = Runs::new("page");
    let shown = region.pages().min(PAGES_MAX);
    for index in 0..shown {
        let stored = if kind == RegionKind::PageMap { Some(true) } else { map.stored(region.map_first + index) };
        if stored == Some(false) {
            runs.add(index, "initial", out)?;
            continue;
        }
        let doubt = if stored.is_none() { " (the page map does not say whether it counts)" } else { "" };
        let page = match image.page(region.offset + index * PAGE_SIZE as u64) {
            Ok(page) => page,
            Err(error) => {
                runs.add(index, &format!("BAD: {error}{doubt}"), out)?;
                if error.starts_with("beyond") {
                    break;
                }
                continue;
            }
        };
        match page::open(&header.uuid, kind, region.generation, index, &page) {
            Ok(found) => {
                runs.end(out)?;
                write!(out, "  page {index}: write count {}, checkpoint {}, ", found.write_count, found.checkpoint)?;
                if kind == RegionKind::Table {
                    let used = entries(&page).filter(|entry| *entry != 0).count();
                    writeln!(out, "{used} chunks{doubt}")?;
                    print_entries(&page, index, out)?;
                } else {
                    let ones: u32 = page[HEADER_SIZE..].iter().map(|b| b.count_ones()).sum();
                    writeln!(out, "{ones} bits set{doubt}")?;
                }
            }
            Err(error) => runs.add(index, &format!("BAD: {}{doubt}", error.detail), out)?,
        }
    }
    runs.end(out)?;
    if shown < region.pages() {
        writeln!(out, "  at most {PAGES_MAX} pages of a region are looked at")?;
    }
    Ok(())
}
