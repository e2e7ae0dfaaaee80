// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page 0 and the header copies.

use crate::input::Input;
use crate::patch::{page_of, seal_header, seal_page_zero};
use fvd_format::header::REGIONS_START;
use fvd_format::limits::VIRTUAL_SIZE_MAX;
use fvd_format::{Header, PageZero};

/// Byte 0: bit 0 seals page 0, bits 1 and 2 the copies. Then patches of page 0 and of the copies.
pub fn header(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.u8();
    let header = crate::memory::templates()[usize::from(how >> 4) % crate::memory::TEMPLATES].header.clone();
    let mut zero = page_of(&PageZero { uuid: header.uuid }.encode());
    let mut copies = [page_of(&header.encode(1)), page_of(&header.encode(2))];
    while !input.is_empty() {
        let (which, at) = (input.u8(), input.u16());
        let page = match which & 3 {
            0 => &mut zero,
            1 => &mut copies[0],
            2 => &mut copies[1],
            _ => {
                // Both alike, as after an update.
                let (at, bytes) = (usize::from(at) % 4096, input.bytes(usize::from(which >> 2 & 15) + 1));
                for copy in &mut copies {
                    let n = bytes.len().min(4096 - at);
                    copy[at..at + n].copy_from_slice(&bytes[..n]);
                }
                continue;
            }
        };
        let (at, bytes) = (usize::from(at) % 4096, input.bytes(usize::from(which >> 2 & 15) + 1));
        let n = bytes.len().min(4096 - at);
        page[at..at + n].copy_from_slice(&bytes[..n]);
    }
    if how & 1 != 0 {
        seal_page_zero(&mut zero);
    }
    for (copy, page) in copies.iter_mut().enumerate().filter(|(copy, _)| how >> (copy + 1) & 1 != 0) {
        seal_header(&header.uuid, copy + 1, page);
    }
    let uuid = PageZero::decode(&zero[..]).map_or(header.uuid, |zero| zero.uuid);
    for (i, page) in copies.iter().enumerate() {
        if let Ok(found) = Header::decode(&uuid, i + 1, &page[..]) {
            holds(&found, i + 1);
        }
    }
    if let Ok(found) = Header::choose(&uuid, &copies[0][..], &copies[1][..]) {
        assert!(copies.iter().enumerate().any(|(i, page)| Header::decode(&uuid, i + 1, &page[..]).as_ref() == Ok(&found)));
    }
}

/// What the engine relies on in a header that was accepted: nothing below can overflow.
fn holds(header: &Header, copy: usize) {
    let page = header.encode(copy);
    assert_eq!(Header::decode(&header.uuid, copy, &page).as_ref(), Ok(header), "what is encoded is what was decoded");
    assert!(header.virtual_size <= VIRTUAL_SIZE_MAX && header.covered <= header.virtual_size);
    assert!(header.file_length_min() <= i64::MAX as u64 && header.regions_end() >= REGIONS_START);
    assert!(header.is_compact() || header.flat_data_end() <= header.file_length_min().max(header.data_length_min()));
    assert_eq!(header.has_data_file(), !header.data_name.is_empty());
    let mut places: Vec<(u64, u64)> = header.regions.iter().flatten().map(|r| (r.offset, r.end())).collect();
    if header.virtual_size > 0 && !header.has_data_file() {
        places.push((header.data_offset, header.flat_data_end()));
    }
    places.sort_unstable();
    assert!(places.iter().all(|p| p.0 >= REGIONS_START && p.0 < p.1));
    assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "metadata and data do not overlap");
}
