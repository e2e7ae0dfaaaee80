// SPDX-License-Identifier: MIT OR Apache-2.0
//! Damage that no power cut does: rot, misdirected and foreign pages, pages lost although synced,
//! a file cut short. Tried on copies of an image that was closed in good order, or, for the journal, that
//! was not.

use crate::prng::Prng;
use crate::store::{PAGE, Store};
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::journal::{CommitId, Scanner};
use fvd_format::page::{self, PageHeader};
use fvd_format::{Header, PageZero, RegionKind};

/// A damaged file.
pub struct Harmed {
    /// Its bytes.
    pub bytes: Store,
    /// For people.
    pub what: String,
    /// No open may succeed.
    pub must_not_open: bool,
    /// Data may be wrong, but a check must say so.
    pub check_must_find: bool,
}

/// The header of a file that was closed in good order.
fn header_of(bytes: &Store) -> Option<Header> {
    let zero = PageZero::decode(bytes.page(0)?).ok()?;
    Header::decode(&zero.uuid, 1, bytes.page(HEADER_OFFSETS[0] / PAGE as u64)?).ok()
}

/// Damages a copy of `bytes`; `older` is the same file at an earlier close.
pub fn draw(bytes: &Store, older: Option<&Store>, prng: &mut Prng) -> Option<Harmed> {
    let header = header_of(bytes)?;
    let pages = bytes.pages(header.data_offset);
    let victim = pages[prng.below(pages.len() as u64) as usize];
    let mut harmed = Harmed { bytes: bytes.clone(), what: String::new(), must_not_open: false, check_must_find: false };
    let at = victim * PAGE as u64;
    match prng.below(6) {
        0 | 1 => {
            let mut page = *bytes.page(victim)?;
            for _ in 0..prng.between(1, 4) {
                let bit = prng.below(PAGE as u64 * 8) as usize;
                page[bit / 8] ^= 1 << (bit % 8);
            }
            harmed.what = format!("rot in page {victim}");
            harmed.bytes.write(at, &page);
        }
        2 => {
            let other = pages[prng.below(pages.len() as u64) as usize];
            // An older version of the same page: that is a lost write, not a misdirected one.
            let area = header.region(RegionKind::DoubleWrite)?;
            if (area.offset..area.end()).contains(&(other * PAGE as u64)) {
                return None;
            }
            harmed.what = format!("page {other} written to {victim}");
            harmed.bytes.write(at, bytes.page(other)?);
        }
        3 => foreign(&mut harmed, &header, prng)?,
        4 => lost(&mut harmed, &header, older?, prng)?,
        _ => {
            let len = prng.below(header.file_length_min());
            harmed.what = format!("the file cut to {len} bytes");
            harmed.bytes.resize(len);
            harmed.must_not_open = true;
        }
    }
    Some(harmed)
}

/// A unit of the journal rots, and whole commits follow it: no power cut does that (CC-32).
pub fn journal(bytes: &Store, prng: &mut Prng) -> Option<Harmed> {
    let zero = PageZero::decode(bytes.page(0)?).ok()?;
    let [one, two] = [bytes.page(HEADER_OFFSETS[0] / PAGE as u64)?, bytes.page(HEADER_OFFSETS[1] / PAGE as u64)?];
    let header = Header::choose(&zero.uuid, one, two).ok().filter(|header| !header.clean)?;
    let region = header.region(RegionKind::Journal)?;
    let from = CommitId { epoch: header.epoch, seq: header.first_seq, commit: header.first_commit };
    let mut scanner = Scanner::new(&header.uuid, region.pages(), from);
    let place = |seq: u64| region.offset / PAGE as u64 + seq % region.pages();
    while scanner.units_left() > 0 {
        let at = place(scanner.place(region.pages()));
        scanner.feed(bytes.page(at).map_or(&[0; PAGE][..], |page| &page[..]));
    }
    let commits = scanner.finish().commits;
    let victim = commits.get(prng.below(commits.len().max(2) as u64 - 1) as usize).filter(|_| commits.len() > 1)?;
    let seq = victim.id.seq + prng.below(victim.units);
    let mut page = *bytes.page(place(seq))?;
    let bit = prng.below(PAGE as u64 * 8) as usize;
    page[bit / 8] ^= 1 << (bit % 8);
    let mut harmed = Harmed { bytes: bytes.clone(), what: format!("rot in journal unit {seq}"), must_not_open: true, check_must_find: false };
    harmed.bytes.write(place(seq) * PAGE as u64, &page);
    Some(harmed)
}

/// A page in place of a region that has stored pages.
fn stored_page(bytes: &Store, header: &Header, prng: &mut Prng) -> Option<(RegionKind, u32, u64, u64, PageHeader)> {
    let kind = prng.pick(&[RegionKind::Bitmap, RegionKind::Bitmap, RegionKind::PageMap, RegionKind::Table, RegionKind::Table]);
    let region = header.region(kind)?;
    let index = prng.below(region.pages());
    let at = region.offset / PAGE as u64 + index;
    let head = page::open(&header.uuid, kind, region.generation, index, bytes.page(at)?).ok()?;
    Some((kind, region.generation, index, at, head))
}

/// The same page of another image: all right but for the identity.
fn foreign(harmed: &mut Harmed, header: &Header, prng: &mut Prng) -> Option<()> {
    let (kind, _, index, at, head) = stored_page(&harmed.bytes, header, prng)?;
    let mut page = *harmed.bytes.page(at)?;
    page[page::HEADER_SIZE] ^= 0xff;
    let mut uuid = header.uuid;
    uuid[3] ^= 1;
    page::seal(&uuid, &head, &mut page);
    harmed.bytes.write(at * PAGE as u64, &page);
    harmed.what = format!("a foreign page {index} of {kind:?}");
    Some(())
}

/// A write in place that was lost although it was synced: the page is as it was at an earlier close.
fn lost(harmed: &mut Harmed, header: &Header, older: &Store, prng: &mut Prng) -> Option<()> {
    let (kind, generation, index, at, head) = stored_page(&harmed.bytes, header, prng)?;
    // A region that is younger has nothing older: a page of an attempt to build it that a cut ended
    // could come back only if two writes were lost, the one of the whole region and the last.
    let region = |header: &Header| header.region(kind).map(|region| (region.generation, region.offset));
    if region(&header_of(older)?) != region(header) {
        return None;
    }
    let old = *older.page(at)?;
    let before = page::open(&header.uuid, kind, generation, index, &old).ok()?;
    if before == head || kind == RegionKind::PageMap {
        return None;
    }
    harmed.bytes.write(at * PAGE as u64, &old);
    harmed.what = format!("the last write of page {index} of {kind:?} lost");
    harmed.check_must_find = true;
    Some(())
}
