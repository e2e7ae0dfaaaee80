// SPDX-License-Identifier: MIT OR Apache-2.0
//! Damage that no power cut does: rot, misdirected and foreign pages, pages lost although synced,
//! a file cut short. Tried on copies of an image that was closed in good order, or, for the journal, that
//! was not.

use crate::prng::Prng;
use crate::store::{Files, PAGE, Store};
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::journal::{CommitId, Scanner};
use fvd_format::page::{self, PageHeader};
use fvd_format::{Header, PageZero, RegionKind};

/// A damaged file.
pub struct Harmed {
    /// Its files.
    pub files: Files,
    /// For people.
    pub what: String,
    /// The data file is too short: the metadata may be looked at.
    pub in_data: bool,
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

/// Damages a copy of `files`; `older` are the same at an earlier close.
pub fn draw(files: &Files, older: Option<&Files>, prng: &mut Prng) -> Option<Harmed> {
    let bytes = &files.image;
    let header = header_of(bytes)?;
    let pages = bytes.pages(if header.has_data_file() { u64::MAX } else { header.data_offset });
    let victim = pages[prng.below(pages.len() as u64) as usize];
    let mut harmed = Harmed { files: files.clone(), what: String::new(), in_data: false, must_not_open: false, check_must_find: false };
    let at = victim * PAGE as u64;
    match prng.below(6) {
        0 | 1 => {
            let mut page = *bytes.page(victim)?;
            for _ in 0..prng.between(1, 4) {
                let bit = prng.below(PAGE as u64 * 8) as usize;
                page[bit / 8] ^= 1 << (bit % 8);
            }
            harmed.what = format!("rot in page {victim}");
            harmed.files.image.write(at, &page);
        }
        2 => {
            let other = pages[prng.below(pages.len() as u64) as usize];
            // An older version of the same page: that is a lost write, not a misdirected one.
            let area = header.region(RegionKind::DoubleWrite)?;
            if (area.offset..area.end()).contains(&(other * PAGE as u64)) {
                return None;
            }
            harmed.what = format!("page {other} written to {victim}");
            harmed.files.image.write(at, bytes.page(other)?);
        }
        3 => foreign(&mut harmed, &header, prng)?,
        4 => lost(&mut harmed, &header, &older?.image, prng)?,
        _ if header.data_length_min() > 0 && prng.chance(50) => {
            let len = prng.below(header.data_length_min());
            harmed.what = format!("the data file cut to {len} bytes");
            harmed.files.data.resize(len);
            (harmed.in_data, harmed.must_not_open) = (true, true);
        }
        _ => {
            let len = prng.below(header.file_length_min());
            harmed.what = format!("the file cut to {len} bytes");
            harmed.files.image.resize(len);
            harmed.must_not_open = true;
        }
    }
    Some(harmed)
}

/// A unit of the journal rots, and whole commits follow it: no power cut does that (CC-32).
pub fn journal(files: &Files, prng: &mut Prng) -> Option<Harmed> {
    let bytes = &files.image;
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
    let mut harmed = Harmed { files: files.clone(), what: format!("rot in journal unit {seq}"), in_data: false, must_not_open: true, check_must_find: false };
    harmed.files.image.write(place(seq) * PAGE as u64, &page);
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
    let (kind, _, index, at, head) = stored_page(&harmed.files.image, header, prng)?;
    let mut page = *harmed.files.image.page(at)?;
    page[page::HEADER_SIZE] ^= 0xff;
    let mut uuid = header.uuid;
    uuid[3] ^= 1;
    page::seal(&uuid, &head, &mut page);
    harmed.files.image.write(at * PAGE as u64, &page);
    harmed.what = format!("a foreign page {index} of {kind:?}");
    Some(())
}

/// A write in place that was lost although it was synced: the page is as it was at an earlier close.
fn lost(harmed: &mut Harmed, header: &Header, older: &Store, prng: &mut Prng) -> Option<()> {
    let (kind, generation, index, at, head) = stored_page(&harmed.files.image, header, prng)?;
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
    harmed.files.image.write(at * PAGE as u64, &old);
    harmed.what = format!("the last write of page {index} of {kind:?} lost");
    harmed.check_must_find = true;
    Some(())
}

/// A file with damage that a repair must make good, but for what nobody can tell.
pub struct Broken {
    /// Its files.
    pub files: Files,
    /// For people.
    pub what: String,
    /// Guest bytes that may read as the base or as zero afterwards: start and end.
    pub lost: Vec<(u64, u64)>,
    /// Guest bytes that may hold anything.
    pub anything: Vec<(u64, u64)>,
    /// Guest bytes that cannot be read before.
    pub unreadable: Vec<(u64, u64)>,
}

/// Breaks a copy of `files` in up to three ways; `grow`: the image file, the data file may be longer than needed.
pub fn break_image(files: &Files, grow: [bool; 2], prng: &mut Prng) -> Option<Broken> {
    let header = header_of(&files.image)?;
    header.region(RegionKind::Journal)?;
    let mut broken = Broken { files: files.clone(), what: String::new(), lost: Vec::new(), anything: Vec::new(), unreadable: Vec::new() };
    for _ in 0..prng.between(1, 3) {
        // What does not fit this image is left out.
        let _ = match prng.below(if header.is_compact() { 10 } else { 5 }) {
            0 => rotten_header(&mut broken, prng),
            1 => longer(&mut broken, &header, grow, prng),
            2 => rotten_page(&mut broken, &header, RegionKind::Bitmap, prng),
            3 => stray_bit(&mut broken, &header),
            4 => miscounted(&mut broken, &header, prng),
            5 => rotten_page(&mut broken, &header, RegionKind::Table, prng),
            6 | 7 => wild_entry(&mut broken, &header, prng),
            _ => double(&mut broken, &header, prng),
        };
    }
    (!broken.what.is_empty()).then_some(broken)
}

impl Broken {
    fn say(&mut self, what: String) {
        self.what = if self.what.is_empty() { what } else { format!("{}, {what}", self.what) };
    }

    /// A page as it is now, and its head.
    fn page(&self, header: &Header, kind: RegionKind, index: u64) -> Option<([u8; PAGE], PageHeader)> {
        let region = header.region(kind)?;
        let page = *self.files.image.page(region.offset / PAGE as u64 + index)?;
        let head = page::open(&header.uuid, kind, region.generation, index, &page).ok()?;
        Some((page, head))
    }

    fn put(&mut self, header: &Header, head: &PageHeader, mut page: [u8; PAGE]) {
        let region = header.region(head.kind).expect("a page of it was read");
        page::seal(&header.uuid, head, &mut page);
        self.files.image.write(region.offset + head.index * PAGE as u64, &page);
    }

    /// A stored page of the table that has a chunk, such a chunk, and its entry.
    fn chunk(&self, header: &Header, prng: &mut Prng) -> Option<(PageHeader, [u8; PAGE], u64, u32)> {
        let region = header.region(RegionKind::Table)?;
        let index = prng.below(region.pages());
        let (page, head) = self.page(header, RegionKind::Table, index)?;
        let first = index * page::PAYLOAD_ENTRIES;
        let used: Vec<(u64, u32)> = (first..header.chunks().min(first + page::PAYLOAD_ENTRIES)).map(|c| (c, entry_of(&page, c))).filter(|(_, e)| *e != 0).collect();
        let (chunk, entry) = *used.get(prng.below(used.len().max(1) as u64) as usize)?;
        Some((head, page, chunk, entry))
    }
}

fn entry_at(chunk: u64) -> usize {
    page::HEADER_SIZE + (chunk % page::PAYLOAD_ENTRIES) as usize * 4
}

fn entry_of(page: &[u8; PAGE], chunk: u64) -> u32 {
    u32::from_le_bytes(page[entry_at(chunk)..][..4].try_into().expect("four bytes"))
}

/// Guest bytes of table entries, or of bits.
fn spoken_of(header: &Header, kind: RegionKind, index: u64) -> (u64, u64) {
    let (unit, most) = match kind {
        RegionKind::Table => (page::PAYLOAD_ENTRIES * u64::from(header.chunk_size), header.virtual_size),
        _ => (page::PAYLOAD_BITS * u64::from(header.block_size), header.covered),
    };
    ((index * unit).min(most), ((index + 1) * unit).min(most))
}

fn chunk_bytes(header: &Header, chunk: u64) -> (u64, u64) {
    let size = u64::from(header.chunk_size);
    (chunk * size, ((chunk + 1) * size).min(header.virtual_size))
}

fn rotten_header(broken: &mut Broken, prng: &mut Prng) -> Option<()> {
    if broken.what.contains("header") {
        return None;
    }
    let copy = prng.below(2) as usize;
    let at = HEADER_OFFSETS[copy];
    let mut page = *broken.files.image.page(at / PAGE as u64)?;
    page[prng.below(PAGE as u64) as usize] ^= 0x40;
    broken.files.image.write(at, &page);
    broken.say(format!("rot in header copy {}", copy + 1));
    Some(())
}

fn longer(broken: &mut Broken, header: &Header, grow: [bool; 2], prng: &mut Prng) -> Option<()> {
    let in_data = header.has_data_file() && prng.chance(50);
    if !grow[usize::from(in_data)] {
        return None;
    }
    let file = if in_data { &mut broken.files.data } else { &mut broken.files.image };
    file.resize(file.len().next_multiple_of(PAGE as u64) + prng.between(1, 9) * PAGE as u64);
    broken.say("a longer file".into());
    Some(())
}

fn rotten_page(broken: &mut Broken, header: &Header, kind: RegionKind, prng: &mut Prng) -> Option<()> {
    let index = prng.below(header.region(kind)?.pages());
    let (mut page, _) = broken.page(header, kind, index)?;
    page[prng.below(PAGE as u64) as usize] ^= 0x10;
    broken.files.image.write(header.region(kind)?.offset + index * PAGE as u64, &page);
    let bytes = spoken_of(header, kind, index);
    broken.lost.push(bytes);
    broken.unreadable.push(bytes);
    broken.say(format!("rot in page {index} of {kind:?}"));
    Some(())
}

fn stray_bit(broken: &mut Broken, header: &Header) -> Option<()> {
    let index = header.region(RegionKind::Bitmap)?.pages() - 1;
    let (mut page, head) = broken.page(header, RegionKind::Bitmap, index)?;
    let bit = header.blocks() - index * page::PAYLOAD_BITS;
    if bit >= page::PAYLOAD_BITS {
        return None;
    }
    page[page::HEADER_SIZE + bit as usize / 8] |= 1 << (bit % 8);
    broken.put(header, &head, page);
    broken.say("a bit past the last block".into());
    Some(())
}

fn miscounted(broken: &mut Broken, header: &Header, prng: &mut Prng) -> Option<()> {
    let kind = if header.is_compact() && prng.chance(50) { RegionKind::Table } else { RegionKind::Bitmap };
    let index = prng.below(header.region(kind)?.pages());
    let (page, head) = broken.page(header, kind, index)?;
    broken.put(header, &PageHeader { write_count: head.write_count + prng.between(1, 3) as u32, ..head }, page);
    broken.say(format!("page {index} of {kind:?} counted wrong"));
    Some(())
}

/// An entry names what is no chunk, or one that metadata lies in.
fn wild_entry(broken: &mut Broken, header: &Header, prng: &mut Prng) -> Option<()> {
    let (head, mut page, chunk, _) = broken.chunk(header, prng)?;
    let size = u64::from(header.chunk_size);
    let within = header.regions.iter().flatten().find(|r| !header.has_data_file() && r.offset >= header.data_offset).map(|r| (r.offset - header.data_offset) / size);
    let ahead = prng.pick(&[1, 8, 5000]);
    let id = within.filter(|_| prng.chance(50)).unwrap_or_else(|| header.chunks_below(header.reach) + prng.below(ahead));
    page[entry_at(chunk)..][..4].copy_from_slice(&((id + 1) as u32).to_le_bytes());
    broken.put(header, &head, page);
    broken.lost.push(chunk_bytes(header, chunk));
    broken.unreadable.push(spoken_of(header, RegionKind::Table, head.index));
    broken.say(format!("guest chunk {chunk} names storage chunk {id}"));
    Some(())
}

/// Two guest chunks name one storage chunk.
fn double(broken: &mut Broken, header: &Header, prng: &mut Prng) -> Option<()> {
    let (_, _, victim, entry) = broken.chunk(header, prng)?;
    if broken.lost.contains(&chunk_bytes(header, victim)) {
        return None;
    }
    let (head, mut page, mut chunk, old) = broken.chunk(header, prng)?;
    if prng.chance(50) {
        // One that had none.
        chunk = (chunk + prng.below(20)).min(header.chunks() - 1);
    }
    if chunk / page::PAYLOAD_ENTRIES != head.index || chunk == victim || old == entry && chunk == victim {
        return None;
    }
    page[entry_at(chunk)..][..4].copy_from_slice(&entry.to_le_bytes());
    broken.put(header, &head, page);
    broken.anything.push(chunk_bytes(header, chunk));
    broken.say(format!("guest chunk {chunk} has the storage of {victim}"));
    Some(())
}
