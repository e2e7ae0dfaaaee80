// SPDX-License-Identifier: MIT OR Apache-2.0
//! Header updates: copy 2, sync, copy 1, sync (CC-24), and the file has what they promise (CC-40).

use super::Verdict;
use crate::disk::Disk;
use crate::store::PAGE;
use fvd_format::{Header, RegionKind, page};

/// Copy `copy` is about to be written; `stable` is the header that counts now, `other` the other copy
/// if it is valid.
pub fn submit(disks: &[Disk; 2], stable: &Header, other: Option<&Header>, copy: usize, bytes: &[u8]) -> Verdict {
    let new = Header::decode(&stable.uuid, copy, bytes).map_err(|error| format!("an invalid header is written to copy {copy}: {error}"))?;
    match (copy, other) {
        (1, Some(two)) if *two == new => {}
        (1, _) => return Err("header copy 1 is written before copy 2 is durable (CC-24)".into()),
        // What a cut tore is made whole again.
        (_, Some(one)) if new == *one => {}
        // Copy 1 may be an update behind: the last one was cut short, and copy 2 counts.
        (_, Some(one)) if new.generation > one.generation && new.generation <= stable.generation + 1 => {}
        (_, other) => {
            let other = other.map(|h| h.generation);
            return Err(format!("header copy 2, generation {}, is written while copy 1 is {other:?} (CC-24)", new.generation));
        }
    }
    for (disk, need, name) in [(&disks[0], new.file_length_min(), "file"), (&disks[1], new.data_length_min(), "data file")] {
        let have = disk.stable.len();
        if have < need {
            return Err(format!("the header promises a {name} of {need} bytes; {have} are durable (CC-40)"));
        }
    }
    named_regions(&disks[0], stable, &new)?;
    if new.first_seq < stable.first_seq || new.epoch < stable.epoch || new.last_batch < stable.last_batch {
        return Err("the header's epoch, first sequence or last batch goes back".into());
    }
    Ok(())
}

/// A region that the header names for the first time is durable before (CC-34).
fn named_regions(disk: &Disk, stable: &Header, new: &Header) -> Verdict {
    let Some(map) = new.region(RegionKind::PageMap) else { return Ok(()) };
    if stable.region(RegionKind::PageMap).is_some_and(|old| (old.offset, old.generation) == (map.offset, map.generation)) {
        return Ok(());
    }
    let whole = |index: u64| {
        let bytes = disk.stable.page(map.offset / PAGE as u64 + index);
        bytes.is_some_and(|bytes| page::open(&new.uuid, RegionKind::PageMap, map.generation, index, bytes).is_ok())
    };
    match (0..map.pages()).find(|index| !whole(*index)) {
        Some(index) => Err(format!("the header names a page map whose page {index} is not durable (CC-34)")),
        None => Ok(()),
    }
}
