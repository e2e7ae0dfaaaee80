// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images made by somebody who knows the format: every checksum is right.

use crate::common::*;
use crate::samples::*;
use fvd_engine::Kind;
use fvd_engine::host::OpKind;
use fvd_format::double_write::{Batch, BatchEntry};
use fvd_format::header::{REGION_SLOTS, Region};
use fvd_format::journal::{self, CommitId, Record};
use fvd_format::page::{self, PageHeader};
use fvd_format::{Header, RegionKind, checksum, codec};

/// Puts `value` of `size` bytes at `at` of both header copies and makes their checksums right.
fn patched(sample: &Sample, at: usize, size: usize, value: u64) -> Store {
    let mut bytes = sample.bytes.clone();
    for (copy, offset) in [(1, 4096), (2, 128 << 10)] {
        let mut page = sample.header.encode(copy);
        page[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        let crc = checksum::seeded(&sample.header.uuid, checksum::kind::HEADER, copy as u64, &[&page[..8], &page[12..]]);
        codec::put_u32(&mut page, 8, crc);
        bytes.write(offset, &page);
    }
    bytes
}

const FIELDS: [(&str, usize, usize); 22] = [
    ("length", 12, 4),
    ("generation", 32, 8),
    ("virtual size", 40, 8),
    ("crypt method", 48, 4),
    ("state", 52, 4),
    ("incompatible", 56, 8),
    ("compatible", 64, 8),
    ("autoclear", 72, 8),
    ("block size", 80, 4),
    ("chunk size", 84, 4),
    ("base length", 96, 8),
    ("covered", 104, 8),
    ("data offset", 112, 8),
    ("storage grow unit", 120, 8),
    ("reach", 128, 8),
    ("epoch", 136, 8),
    ("first sequence", 144, 8),
    ("first commit", 152, 8),
    ("last batch", 160, 8),
    ("last checkpoint", 168, 8),
    ("base name", 512, 8),
    ("base format", 1536, 8),
];

#[test]
fn header_fields_out_of_range_are_refused() {
    let sample = closed();
    let max = u64::MAX;
    let cases: &[(&str, &[u64])] = &[
        ("length", &[0, 4095, 4097, max]),
        ("generation", &[0, max]),
        ("virtual size", &[1, 511, SIZE + 1, 1 << 63, (1 << 63) - 512, max, max - 511]),
        ("crypt method", &[1, 2, 1 << 24, max]),
        ("state", &[2, 3, 4, 5, 1 << 31, max]),
        ("incompatible", &[1, 2, 4, 8, 16, 32, 64, 1 << 63, max]),
        ("block size", &[0, 1, 512, 2048, 4095, 4097, 12288, 4 << 20, 1 << 31, max]),
        ("chunk size", &[1, 65536, 1 << 20, max]),
        ("base length", &[1, 511, 0, 512, 1 << 63, max - 1, max - 511]),
        ("covered", &[1, SIZE + 1, SIZE + 512, 0, 1 << 40, 1 << 63, max]),
        ("data offset", &[0, 4096, 1, (1 << 20) + 1, 128 << 10, 256 << 10, 1 << 62, 1 << 63, max, max - 4095, i64::MAX as u64]),
        ("storage grow unit", &[1, 1 << 20, max]),
        ("reach", &[1 << 40, 1 << 63, max]),
        ("epoch", &[0, max]),
        ("first sequence", &[1 << 63, max]),
        ("first commit", &[1 << 63, max]),
        ("last batch", &[1 << 63, max]),
        ("last checkpoint", &[1 << 63, max]),
        ("base name", &[0, 0xff, 0xffff_ffff_ffff_ffff, 0x0061_0061]),
        ("base format", &[0, 0xff, 0x0061_0061]),
    ];
    none(&{
        let mut wrong = Vec::new();
        for (name, values) in cases {
            let &(_, at, size) = FIELDS.iter().find(|f| f.0 == *name).expect("a field");
            for &value in *values {
                let bytes = patched(&sample, at, size, value);
                for read_only in [true, false] {
                    match tried(&bytes, &sample, read_only) {
                        Ok(Outcome::Refused(Kind::Corrupt | Kind::Unsupported)) => {}
                        other => wrong.push(format!("{name} = {value:#x}, read-only {read_only}: {other:?}")),
                    }
                }
            }
        }
        wrong
    });
}

/// Whatever a field says: an error, or an image that can be used and closed; never a panic.
#[test]
fn any_value_in_any_header_field_is_survived() {
    none(&{
        let mut wrong = Vec::new();
        let mut rng = Rng::new(5);
        for sample in [closed(), cut(), torn()] {
            let mut places: Vec<(String, usize, usize)> = FIELDS.iter().map(|f| (f.0.to_owned(), f.1, f.2)).collect();
            for slot in 0..REGION_SLOTS {
                for (field, at, size) in [("offset", 0, 8), ("length", 8, 8), ("generation", 16, 4), ("map bit", 24, 8), ("sum", 32, 8), ("reserved", 40, 8)] {
                    places.push((format!("region {slot} {field}"), 2688 + slot * 64 + at, size));
                }
            }
            for (name, at, size) in places {
                let mut page = sample.header.encode(1);
                page.extend([0; 8]);
                let now = u64::from_le_bytes(page[at..at + 8].try_into().unwrap()) & (u64::MAX >> (64 - 8 * size));
                let mut values = vec![0, 1, u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) - 1, (1 << 63) - 512, i64::MAX as u64 - 4095, 4096, 1 << 20, 1 << 40];
                values.extend([now ^ 1, now + 1, now.wrapping_sub(1), now.wrapping_mul(2), now / 2, now + 512, now + 4096, now.wrapping_sub(4096)]);
                values.extend([rng.next(), rng.next() >> 20, rng.next() >> 40]);
                for value in values {
                    let bytes = patched(&sample, at, size, value);
                    for read_only in [true, false] {
                        if let Err(text) = tried(&bytes, &sample, read_only) {
                            wrong.push(format!("{}: {name} = {value:#x}, read-only {read_only}: {text}", sample.name));
                        }
                    }
                }
            }
        }
        wrong
    });
}

#[test]
fn regions_out_of_range_are_refused() {
    let sample = closed();
    let region = |kind| *sample.header.region(kind).unwrap();
    let bitmap = region(RegionKind::Bitmap);
    type Change = Box<dyn Fn(&mut Header)>;
    let set = |kind: RegionKind, to: Option<Region>| -> Change { Box::new(move |h| *h.region_mut(kind) = to) };
    let mut cases: Vec<(&str, Change)> = vec![
        ("no page map", set(RegionKind::PageMap, None)),
        ("no area", set(RegionKind::DoubleWrite, None)),
        ("no journal", set(RegionKind::Journal, None)),
        ("no bitmap", set(RegionKind::Bitmap, None)),
        ("a table", set(RegionKind::Table, Some(Region { offset: 1 << 30, ..bitmap }))),
        ("key area", set(RegionKind::KeyArea, Some(Region { offset: 1 << 30, map_first: 0, ..bitmap }))),
        ("slot 15", Box::new(move |h| h.regions[15] = Some(Region { offset: 1 << 30, ..bitmap }))),
        ("slot 12", Box::new(move |h| h.regions[12] = Some(Region { offset: 1 << 30, ..bitmap }))),
        ("map bits out of range", set(RegionKind::Bitmap, Some(Region { map_first: 32_512, ..bitmap }))),
        ("map bits overflow", set(RegionKind::Bitmap, Some(Region { map_first: u64::MAX, ..bitmap }))),
        ("a bitmap too long", set(RegionKind::Bitmap, Some(Region { length: 8192, ..bitmap }))),
    ];
    for kind in [RegionKind::PageMap, RegionKind::DoubleWrite, RegionKind::Journal, RegionKind::Bitmap] {
        let is = region(kind);
        for (name, to) in [
            ("at 0", Region { offset: 0, ..is }),
            ("over the header", Region { offset: 128 << 10, ..is }),
            ("misaligned", Region { offset: is.offset + 1, ..is }),
            ("in the data", Region { offset: sample.header.data_offset, ..is }),
            ("over a neighbour", Region { offset: is.offset ^ 0x10_0000, length: 4 << 20, ..is }),
            ("past the end of files", Region { offset: i64::MAX as u64 - 4095, ..is }),
            ("overflowing", Region { offset: u64::MAX - 4095, ..is }),
            ("past the end of this file", Region { offset: 1 << 40, ..is }),
            ("of odd length", Region { length: is.length + 1, ..is }),
            ("of length 4096 too much", Region { length: is.length + 4096, offset: 1 << 40, ..is }),
            ("endless", Region { length: u64::MAX & !4095, ..is }),
            ("of generation 0", Region { generation: 0, ..is }),
            ("of another generation", Region { generation: 2, ..is }),
            ("with map bits", Region { map_first: if kind == RegionKind::Bitmap { 1 << 50 } else { 1 }, ..is }),
        ] {
            // The journal and the area have no pages that carry a generation.
            if name == "of another generation" && matches!(kind, RegionKind::Journal | RegionKind::DoubleWrite) {
                continue;
            }
            cases.push((name, set(kind, Some(to))));
        }
    }
    none(&{
        let mut wrong = Vec::new();
        for (i, (name, change)) in cases.iter().enumerate() {
            let bytes = with_header(&sample, change);
            for read_only in [true, false] {
                match tried(&bytes, &sample, read_only) {
                    Ok(Outcome::Refused(Kind::Corrupt | Kind::Unsupported)) => {}
                    // Found when the page is needed.
                    Ok(Outcome::Partly) if *name == "of another generation" => {}
                    other => wrong.push(format!("{i} {name}, read-only {read_only}: {other:?}")),
                }
            }
        }
        wrong
    });
}

/// Appends a commit with `payload` to the cut image's journal.
pub fn with_commit(sample: &Sample, payload: &[u8]) -> Store {
    let header = &sample.header;
    let region = *header.region(RegionKind::Journal).unwrap();
    let mut all = vec![0; region.length as usize];
    sample.bytes.read(region.offset, &mut all);
    let from = CommitId { epoch: header.epoch, seq: header.first_seq, commit: header.first_commit };
    let scan = journal::scan(&header.uuid, &all, from);
    assert!(!scan.commits.is_empty() && !scan.damaged);
    let id = CommitId { epoch: header.epoch, seq: scan.next_seq, commit: scan.next_commit };
    let units = journal::encode_commit(&header.uuid, id, payload, 4096);
    let mut bytes = sample.bytes.clone();
    for (i, unit) in units.chunks(4096).enumerate() {
        bytes.write(region.offset + (id.seq + i as u64) % region.pages() * 4096, unit);
    }
    bytes
}

pub fn head(kind: u8, flag: u8, region: u16, count: u32, first: u64) -> Vec<u8> {
    let mut out = vec![kind, flag];
    out.extend_from_slice(&region.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&first.to_le_bytes());
    out
}

#[test]
fn hostile_journal_records_are_refused() {
    let sample = cut();
    let blocks = SIZE / BLOCK;
    let bits = |first, count| head(1, 1, 4, count, first);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("one bit too far", bits(blocks, 1)),
        ("a run that ends too far", bits(blocks - 1, 2)),
        ("all the bits there are", bits(0, u32::MAX)),
        ("far away", bits(1 << 40, 1)),
        ("overflow", bits(u64::MAX, 1)),
        ("overflow of the end", bits(u64::MAX - 5, 100)),
        ("no bits", bits(0, 0)),
        ("flag 2", head(1, 2, 4, 1, 0)),
        ("flag 255", head(1, 255, 4, 1, 0)),
        ("bits of the page map", head(1, 1, 1, 1, 0)),
        ("bits of the journal", head(1, 1, 3, 1, 0)),
        ("own bits", head(1, 1, 9, 1, 0)),
        ("bits of region 0", head(1, 1, 0, 1, 0)),
        ("bits of region 65535", head(1, 1, 65535, 1, 0)),
        ("table entries", [head(2, 0, 5, 1, 0), vec![0; 4]].concat()),
        ("a run of entries", [head(3, 1, 5, u32::MAX, 0), vec![0; 4]].concat()),
        ("reach", head(4, 0, 0, 0, 1 << 30)),
        ("carried data", [head(5, 0, 0, 512, 0), vec![7; 512]].concat()),
        ("carried data, huge", head(5, 0, 0, u32::MAX, 0)),
        ("confirm", head(6, 0, 0, 0, 1)),
        ("type 0", head(0, 0, 0, 0, 0)),
        ("type 7", head(7, 1, 4, 1, 0)),
        ("type 255", head(255, 255, 65535, u32::MAX, u64::MAX)),
        ("half a record", bits(0, 1)[..9].to_vec()),
        ("a good one and a bad one", [bits(0, 1), bits(blocks, 1)].concat()),
        ("entries that are not there", head(2, 0, 5, u32::MAX, 0)),
    ];
    none(&{
        let mut wrong = Vec::new();
        for (name, payload) in &cases {
            let bytes = with_commit(&sample, payload);
            for read_only in [true, false] {
                match tried(&bytes, &sample, read_only) {
                    Ok(Outcome::Refused(Kind::Corrupt | Kind::Unsupported)) => {}
                    other => wrong.push(format!("{name}, read-only {read_only}: {other:?}")),
                }
            }
            // Nothing was changed by the refusal: the image without that commit is as it was.
            let world = World::new(bytes, Some(sample.base.clone()), 1, sim::limits(1));
            let queue = world.queue(fvd_engine::Config::default());
            let _ = caught_open(&world, &queue);
            if world.counts.borrow().writes > 0 {
                wrong.push(format!("{name}: a refused open wrote"));
            }
        }
        wrong
    });
}

fn caught_open(world: &std::rc::Rc<World>, queue: &std::rc::Rc<fvd_engine::Queue<TestHost>>) -> Result<(), String> {
    sim::caught(|| drop(world.request(queue, fvd_engine::Request::Open)))
}

/// Units with right checksums in an order nobody wrote: every number may be anything.
#[test]
fn hostile_journal_units_are_survived() {
    none(&{
        let sample = cut();
        let header = &sample.header;
        let region = *header.region(RegionKind::Journal).unwrap();
        let mut wrong = Vec::new();
        let mut rng = Rng::new(8);
        for case in 0..400 {
            let mut bytes = sample.bytes.clone();
            for _ in 0..1 + rng.below(6) {
                let some = |rng: &mut Rng, near: u64| match rng.below(8) {
                    0 => u64::MAX,
                    1 => rng.next(),
                    2 => 0,
                    3 => (1 << 63) - 1,
                    _ => near.wrapping_add(rng.below(9)).wrapping_sub(2),
                };
                let seq = some(&mut rng, header.first_seq);
                let mut unit = vec![0; 4096];
                let flags = if rng.chance(80) { rng.below(8) } else { rng.next() } as u32;
                codec::put_u32(&mut unit, 4, flags);
                codec::put_u64(&mut unit, 8, if rng.chance(80) { header.epoch } else { some(&mut rng, header.epoch) });
                codec::put_u64(&mut unit, 16, seq);
                codec::put_u64(&mut unit, 24, some(&mut rng, header.first_commit));
                let len = if rng.chance(80) { rng.below(260) * 16 } else { rng.next() } as u32;
                codec::put_u32(&mut unit, 32, len);
                let mut payload = Vec::new();
                for _ in 0..250 {
                    Record::Bits { region: RegionKind::Bitmap, value: rng.chance(50), first: rng.below(60), count: 1 + rng.below(4) as u32 }
                        .encode(&mut payload);
                }
                unit[48..48 + payload.len()].copy_from_slice(&payload);
                let commit_crc =
                    checksum::seeded(&header.uuid, checksum::kind::COMMIT, codec::get_u64(&unit, 24), &[&unit[48..(48 + len as usize).min(4096).max(48)]]);
                codec::put_u32(&mut unit, 36, commit_crc);
                let crc = checksum::seeded(&header.uuid, checksum::kind::JOURNAL_UNIT, seq, &[&unit[4..]]);
                codec::put_u32(&mut unit, 0, crc);
                let place = if rng.chance(70) { seq % region.pages() } else { rng.below(region.pages()) };
                bytes.write(region.offset + place * 4096, &unit);
            }
            for read_only in [true, false] {
                // A whole commit with valid records is a valid image: only panics are wrong.
                if let Err(text) = tried(&bytes, &sample, read_only) {
                    wrong.push(format!("case {case}, read-only {read_only}: {text}"));
                }
            }
        }
        wrong
    });
}

/// Every unit of the journal is one endless commit, or each is a commit: replay is bounded.
#[test]
fn a_full_journal_is_replayed_in_bounded_time_and_memory() {
    let sample = cut();
    let header = &sample.header;
    let region = *header.region(RegionKind::Journal).unwrap();
    let start = std::time::Instant::now();
    for one_commit in [true, false] {
        let mut bytes = sample.bytes.clone();
        let mut seq = header.first_seq;
        let mut commit = header.first_commit;
        while seq < header.first_seq + region.pages() {
            let mut payload = Vec::new();
            let records = if one_commit { region.pages() * 253 } else { 253 };
            for _ in 0..records {
                Record::Bits { region: RegionKind::Bitmap, value: true, first: 0, count: (SIZE / BLOCK) as u32 }.encode(&mut payload);
            }
            let units = journal::encode_commit(&header.uuid, CommitId { epoch: header.epoch, seq, commit }, &payload, 4096);
            for unit in units.chunks(4096) {
                bytes.write(region.offset + seq % region.pages() * 4096, unit);
                seq += 1;
            }
            commit += 1;
        }
        for read_only in [true, false] {
            assert!(matches!(ask(&bytes, &sample, read_only), Outcome::Wrong(_)), "it is valid and marks every block");
        }
    }
    assert!(start.elapsed().as_secs() < 10);
}

/// A batch of these pages in the double-write area, with right checksums.
fn with_batch(sample: &Sample, number: u64, pages: &[(RegionKind, u64, Vec<u8>)]) -> Store {
    let area = *sample.header.region(RegionKind::DoubleWrite).unwrap();
    let entries = pages.iter().map(|(kind, index, page)| BatchEntry { kind: *kind, index: *index, crc: page::stored_crc(page) }).collect();
    let mut bytes = sample.bytes.clone();
    bytes.write(area.offset, &Batch { number, entries }.encode(&sample.header.uuid));
    for (i, (_, _, page)) in pages.iter().enumerate() {
        bytes.write(area.offset + (i as u64 + 1) * 4096, page);
    }
    bytes
}

fn sealed(sample: &Sample, kind: RegionKind, index: u64, write_count: u32, checkpoint: u64, fill: u8) -> Vec<u8> {
    let mut page = vec![fill; 4096];
    page::seal(&sample.header.uuid, &PageHeader { kind, generation: 1, index, write_count, checkpoint }, &mut page);
    page
}

#[test]
fn hostile_double_write_areas_are_survived() {
    let sample = cut();
    let next = sample.header.last_batch + 1;
    let max = u64::MAX;
    none(&{
        let mut wrong = Vec::new();
        let mut check = |name: &str, bytes: Store, allowed: &[fn(&Outcome) -> bool]| {
            for read_only in [true, false] {
                match tried(&bytes, &sample, read_only) {
                    Ok(outcome) if allowed.iter().any(|a| a(&outcome)) => {}
                    other => wrong.push(format!("{name}, read-only {read_only}: {other:?}")),
                }
            }
        };
        let right: fn(&Outcome) -> bool = |o| *o == Outcome::Right;
        let refused: fn(&Outcome) -> bool = |o| matches!(o, Outcome::Refused(Kind::Corrupt | Kind::Unsupported));
        let any: fn(&Outcome) -> bool = |_| true;
        let page = |kind, index| (kind, index, sealed(&sample, kind, index, 1, 1, 0));
        // Ignored: not of this image, or not the next.
        for index in [1, 63, 1 << 20, 1 << 52, max / 4096, max] {
            check(&format!("bitmap page {index}"), with_batch(&sample, next, &[page(RegionKind::Bitmap, index)]), &[right, refused]);
        }
        for kind in [RegionKind::Journal, RegionKind::DoubleWrite, RegionKind::Table, RegionKind::KeyArea, RegionKind::Profile] {
            check(&format!("{kind:?}"), with_batch(&sample, next, &[page(kind, 0)]), &[right, refused]);
        }
        check("an old number", with_batch(&sample, sample.header.last_batch, &[page(RegionKind::Bitmap, 0)]), &[right]);
        // Valid by every checksum: an empty bitmap, an odd number, a page often.
        for number in [next, next + 100, (1 << 63) - 2, (1 << 63) - 1, 1 << 63, max - 1, max] {
            check(&format!("batch {number:#x}"), with_batch(&sample, number, &[page(RegionKind::Bitmap, 0)]), &[any]);
        }
        let many: Vec<_> = (0..254).map(|_| page(RegionKind::Bitmap, 0)).collect();
        check("a page 254 times", with_batch(&sample, next, &many), &[any]);
        for (count, checkpoint) in [(u32::MAX, 1), (u32::MAX - 1, 1), (u32::MAX, max), (1, max), (1, 1 << 63), (u32::MAX, 0)] {
            for kind in [RegionKind::Bitmap, RegionKind::PageMap] {
                let page = (kind, 0, sealed(&sample, kind, 0, count, checkpoint, 0xff));
                check(&format!("{kind:?} write count {count}, checkpoint {checkpoint:#x}"), with_batch(&sample, next, &[page]), &[any]);
            }
        }
        // Heads that say more than there is.
        let area = *sample.header.region(RegionKind::DoubleWrite).unwrap();
        for (count, kind) in [(0u32, 4u16), (255, 4), (u32::MAX, 4), (1, 0), (1, 13), (1, 65535)] {
            let mut head = Batch { number: next, entries: vec![BatchEntry { kind: RegionKind::Bitmap, index: 0, crc: 0 }] }.encode(&sample.header.uuid);
            codec::put_u32(&mut head, 4, count);
            codec::put_u16(&mut head, 32, kind);
            let crc = checksum::seeded(&sample.header.uuid, checksum::kind::BATCH, next, &[&head[4..]]);
            codec::put_u32(&mut head, 0, crc);
            let mut bytes = sample.bytes.clone();
            bytes.write(area.offset, &head);
            check(&format!("{count} pages of kind {kind}"), bytes, &[right]);
        }
        wrong
    });
}

/// Pages in place with right checksums and wild numbers: they are used, and written again.
#[test]
fn hostile_pages_are_survived() {
    none(&{
        let mut wrong = Vec::new();
        for sample in [closed(), cut()] {
            for kind in [RegionKind::Bitmap, RegionKind::PageMap] {
                for write_count in [1, u32::MAX - 1, u32::MAX] {
                    for checkpoint in [0, 1, 1 << 62, (1 << 63) - 1, 1 << 63, u64::MAX] {
                        for fill in [0, 0xff] {
                            let mut bytes = sample.bytes.clone();
                            bytes.write(sample.header.region(kind).unwrap().offset, &sealed(&sample, kind, 0, write_count, checkpoint, fill));
                            for read_only in [true, false] {
                                if let Err(text) = tried(&bytes, &sample, read_only) {
                                    wrong.push(format!(
                                        "{}: {kind:?} count {write_count:#x} checkpoint {checkpoint:#x} fill {fill}, read-only {read_only}: {text}",
                                        sample.name
                                    ));
                                }
                            }
                        }
                    }
                }
            }
        }
        wrong
    });
}

/// A page map of more pages than a batch holds, all of an unfinished checkpoint.
#[test]
fn a_long_page_map_is_survived() {
    none(&{
        let mut wrong = Vec::new();
        for sample in [closed(), cut()] {
            for pages in [2, 100, 127, 128, 254, 255, 600] {
                let at = sample.header.file_length_min().next_multiple_of(4096);
                let mut bytes = with_header(&sample, |h| {
                    let map = h.region_mut(RegionKind::PageMap).as_mut().unwrap();
                    (map.offset, map.length, map.count_sum) = (at, pages * 4096, pages);
                });
                let mut first = vec![0; 4096];
                sample.bytes.read(sample.header.region(RegionKind::PageMap).unwrap().offset, &mut first);
                for index in 0..pages {
                    let mut page = sealed(&sample, RegionKind::PageMap, index, 1, sample.header.last_checkpoint + 1, 0);
                    if index == 0 {
                        page[32..].copy_from_slice(&first[32..]);
                        let place =
                            PageHeader { kind: RegionKind::PageMap, generation: 1, index, write_count: 1, checkpoint: sample.header.last_checkpoint + 1 };
                        page::seal(&sample.header.uuid, &place, &mut page);
                    }
                    bytes.write(at + index * 4096, &page);
                }
                for read_only in [true, false] {
                    match tried(&bytes, &sample, read_only) {
                        Ok(Outcome::Right | Outcome::Refused(_)) => {}
                        other => wrong.push(format!("{}: {pages} pages, read-only {read_only}: {other:?}", sample.name)),
                    }
                }
            }
        }
        wrong
    });
}

/// One damaged page of the page map is enough, wherever it is among good ones.
#[test]
fn a_page_map_with_a_damaged_page_is_refused() {
    for sample in [closed(), cut()] {
        for bad in 0..4 {
            let at = sample.header.file_length_min().next_multiple_of(4096);
            let mut bytes = with_header(&sample, |h| {
                let map = h.region_mut(RegionKind::PageMap).as_mut().unwrap();
                (map.offset, map.length, map.count_sum) = (at, 4 * 4096, 4);
            });
            for index in 0..4 {
                let mut page = sealed(&sample, RegionKind::PageMap, index, 1, sample.header.last_checkpoint, 0);
                page[100] ^= u8::from(index == bad);
                bytes.write(at + index * 4096, &page);
            }
            for read_only in [true, false] {
                let outcome = tried(&bytes, &sample, read_only);
                assert!(matches!(outcome, Ok(Outcome::Refused(Kind::Corrupt))), "{}, page {bad}, read-only {read_only}: {outcome:?}", sample.name);
            }
        }
    }
}

/// The journal is read twice, to find its commits and to replay them. Storage that changes it in
/// between is not believed.
#[test]
fn a_journal_that_changes_while_it_is_read_is_refused() {
    let sample = cut();
    let journal = *sample.header.region(RegionKind::Journal).unwrap();
    let first = journal.offset + sample.header.first_seq % journal.pages() * 4096;
    for (byte, to) in [(100, 0xff), (24, 0xee)] {
        for read_only in [true, false] {
            let world = World::new(sample.bytes.clone(), Some(sample.base.clone()), 1, sim::limits(1));
            let queue = world.queue(fvd_engine::Config { read_only, ..fvd_engine::Config::default() });
            queue.submit(fvd_engine::Request::Open, 1);
            queue.run();
            // After the whole journal was read: the next read of its first unit is the replay's.
            let scanned = || world.trace.borrow().iter().filter(|t| t.kind == OpKind::Read && t.offset >= journal.offset && t.offset < journal.end()).map(|t| t.len).sum::<u64>();
            while scanned() < journal.length {
                assert!(world.step(&queue));
                queue.run();
            }
            world.disk.borrow_mut().view.write(first + byte, &[to]);
            world.drain(&queue);
            let (_, result) = world.results.borrow_mut().pop().expect("the open ended");
            let error = result.unwrap_err();
            assert!(error.kind == Kind::Corrupt && error.text.contains("changed while"), "byte {byte}, read-only {read_only}: {error}");
            assert_eq!(world.counts.borrow().writes, 0, "a refused open wrote");
        }
    }
}

/// A header that describes the largest disk there can be, in a file that pretends to hold it.
#[test]
fn the_largest_image_opens_or_is_refused_without_much_memory() {
    let sample = closed();
    for (block, covered) in [(4096u32, 1u64 << 62), (2 << 20, 1 << 62), (4096, 1 << 40), (2 << 20, (1 << 62) + 512)] {
        let pages = fvd_format::bitmap::pages(fvd_format::bitmap::blocks(covered, block));
        let map_pages = pages.div_ceil(page::PAYLOAD_BITS);
        let place = 64 << 30;
        let mut bytes = with_header(&sample, |h| {
            (h.block_size, h.covered, h.virtual_size, h.base_length) = (block, covered, covered, u64::MAX);
            h.clean = true;
            let map = h.region_mut(RegionKind::PageMap).as_mut().unwrap();
            (map.offset, map.length) = (place, map_pages * 4096);
            let bits = h.region_mut(RegionKind::Bitmap).as_mut().unwrap();
            (bits.offset, bits.length) = (place + map_pages * 4096, pages * 4096);
            h.data_offset = (place + (map_pages + pages) * 4096).next_multiple_of(1 << 20);
        });
        bytes.resize(i64::MAX as u64 - 4095);
        for no_io in [true, false] {
            let config = fvd_engine::Config { no_io, metadata_memory: 1 << 20, ..fvd_engine::Config::default() };
            let outcome = sim::caught(|| sim::Sim::try_open(&bytes, None, sim::limits(1), config).map(|sim| drop(sim.close())));
            let fine = match &outcome {
                Ok(Ok(())) => no_io,
                Ok(Err(error)) => matches!(error.kind, Kind::NoMemory | Kind::Corrupt),
                Err(_) => false,
            };
            assert!(fine, "block {block}, covered {covered}, no_io {no_io}: {outcome:?}");
        }
    }
}
