// SPDX-License-Identifier: MIT OR Apache-2.0
//! Metadata pages and the head of the double-write area.

use crate::input::Input;
use crate::patch::{page_of, seal_batch, seal_page};
use fvd_format::RegionKind;
use fvd_format::codec::{get_u32, put_u32};
use fvd_format::double_write::{BATCH_PAGES_MAX, Batch};
use fvd_format::page::{self, PageHeader};

const UUID: [u8; 16] = [9; 16];

/// Byte 0: bit 0 a page or a head, bit 1 sealed. Two bytes say where it is read as. The rest are the
/// structure's first bytes.
pub fn pages(data: &[u8]) {
    let mut input = Input::new(data);
    let (how, region, index) = (input.u8(), input.u8(), u64::from(input.u8()));
    let mut bytes = page_of(input.bytes(4096));
    let kind = RegionKind::ALL[usize::from(region) % RegionKind::ALL.len()];
    if how & 1 == 0 {
        if how & 2 != 0 {
            seal_page(&UUID, kind, index, &mut bytes);
        }
        let generation = get_u32(&bytes[..], 8);
        if let Ok(found) = page::open(&UUID, kind, generation, index, &bytes[..]) {
            assert_eq!(PageHeader { kind, generation, index, ..found }, found);
            assert!(found.write_count > 0);
            let mut again = bytes.clone();
            page::seal(&UUID, &found, &mut again[..]);
            assert_eq!(again, bytes, "every field of a valid page is in its header");
            for (kind, generation, index) in
                [(kind, generation.wrapping_add(1), index), (kind, generation, index + 1), (other(kind), generation, index)]
            {
                assert!(page::open(&UUID, kind, generation, index, &bytes[..]).is_err(), "a page of another place");
            }
        }
        return;
    }
    // Few heads have a count in range by chance.
    if how & 4 != 0 {
        put_u32(&mut bytes[..], 4, index as u32);
    }
    if how & 2 != 0 {
        seal_batch(&UUID, &mut bytes);
    }
    if let Ok(batch) = Batch::decode(&UUID, &bytes[..]) {
        assert!((1..=BATCH_PAGES_MAX).contains(&batch.entries.len()));
        assert_eq!(Batch::decode(&UUID, &batch.encode(&UUID)), Ok(batch));
    }
}

fn other(kind: RegionKind) -> RegionKind {
    if kind == RegionKind::Bitmap { RegionKind::Table } else { RegionKind::Bitmap }
}
