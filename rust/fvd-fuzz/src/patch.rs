// SPDX-License-Identifier: MIT OR Apache-2.0
//! Putting right checksums on whatever a patch made of a structure, so that what is judged are the
//! fields: without this a fuzzer would only ever see "checksum mismatch".

use fvd_format::checksum::{kind, seeded};
use fvd_format::codec::{get_u16, get_u32, get_u64, put_u32};
use fvd_format::journal::{UNIT_HEADER, UNIT_PAYLOAD};
use fvd_format::{RegionKind, Uuid};

/// A 4 KiB page on the heap.
pub(crate) type Page = Box<[u8; 4096]>;

pub(crate) fn page_of(bytes: &[u8]) -> Page {
    let mut page = Box::new([0; 4096]);
    page[..bytes.len()].copy_from_slice(bytes);
    page
}

/// FMT-2.
pub(crate) fn seal_page_zero(page: &mut [u8; 4096]) {
    let uuid: Uuid = page[16..32].try_into().expect("16 bytes");
    let crc = seeded(&uuid, kind::PAGE_ZERO, 0, &[&page[..48]]);
    put_u32(page, 48, crc);
}

/// FMT-10.
pub(crate) fn seal_header(uuid: &Uuid, copy: usize, page: &mut [u8; 4096]) {
    let crc = seeded(uuid, kind::HEADER, copy as u64, &[&page[..8], &page[12..]]);
    put_u32(page, 8, crc);
}

/// FMT-20.
pub(crate) fn seal_page(uuid: &Uuid, region: RegionKind, index: u64, page: &mut [u8; 4096]) {
    let crc = seeded(uuid, region as u32, index, &[&page[4..]]);
    put_u32(page, 0, crc);
}

/// FMT-40.
pub(crate) fn seal_batch(uuid: &Uuid, page: &mut [u8; 4096]) {
    let crc = seeded(uuid, kind::BATCH, get_u64(&page[..], 8), &[&page[4..]]);
    put_u32(page, 0, crc);
}

/// FMT-50.
pub(crate) fn seal_unit(uuid: &Uuid, page: &mut [u8; 4096]) {
    let crc = seeded(uuid, kind::JOURNAL_UNIT, get_u64(&page[..], 16), &[&page[4..]]);
    put_u32(page, 0, crc);
}

/// Seals the units of a journal, `units` in sequence order: the last unit of each commit first gets
/// the checksum of what the commit's units hold by now.
pub(crate) fn seal_journal(uuid: &Uuid, units: &mut [Page]) {
    let mut payload = Vec::new();
    for unit in units {
        let flags = get_u32(&unit[..], 4);
        if flags & 1 != 0 {
            payload.clear();
        }
        let len = (get_u32(&unit[..], 32) as usize).min(UNIT_PAYLOAD);
        payload.extend_from_slice(&unit[UNIT_HEADER..UNIT_HEADER + len]);
        if flags & 2 != 0 {
            let crc = seeded(uuid, kind::COMMIT, get_u64(&unit[..], 24), &[&payload]);
            put_u32(&mut unit[..], 36, crc);
        }
        seal_unit(uuid, unit);
    }
}

/// Region and index that an entry of a double-write head names.
pub(crate) fn batch_entry(head: &[u8; 4096], i: usize) -> (Option<RegionKind>, u64) {
    let at = 32 + 16 * i;
    (RegionKind::from_u16(get_u16(&head[..], at)), get_u64(&head[..], at + 8))
}
