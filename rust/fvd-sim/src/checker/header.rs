// SPDX-License-Identifier: MIT OR Apache-2.0
//! Header updates: copy 2, sync, copy 1, sync (CC-24), and the file has what they promise (CC-40).

use super::Verdict;
use crate::disk::Disk;
use crate::store::PAGE;
use fvd_format::Header;
use fvd_format::header::HEADER_OFFSETS;

/// Copy `copy` is about to be written; `stable` is the header that counts now.
pub fn submit(disk: &Disk, stable: &Header, copy: usize, bytes: &[u8]) -> Verdict {
    let new = Header::decode(&stable.uuid, copy, bytes).map_err(|error| format!("an invalid header is written to copy {copy}: {error}"))?;
    let other = 3 - copy;
    let page = disk.stable.page(HEADER_OFFSETS[other - 1] / PAGE as u64);
    let other = page.and_then(|bytes| Header::decode(&stable.uuid, other, bytes).ok());
    match (copy, other) {
        (1, Some(two)) if two == new => {}
        (1, _) => return Err("header copy 1 is written before copy 2 is durable (CC-24)".into()),
        // What a cut tore is made whole again.
        (_, Some(one)) if new == one => {}
        // Copy 1 may be an update behind: the last one was cut short, and copy 2 counts.
        (_, Some(one)) if new.generation > one.generation && new.generation <= stable.generation + 1 => {}
        (_, other) => {
            let other = other.map(|h| h.generation);
            return Err(format!("header copy 2, generation {}, is written while copy 1 is {other:?} (CC-24)", new.generation));
        }
    }
    if disk.stable.len() < new.file_length_min() {
        let (have, need) = (disk.stable.len(), new.file_length_min());
        return Err(format!("the header promises a file of {need} bytes; {have} are durable (CC-40)"));
    }
    if new.first_seq < stable.first_seq || new.epoch < stable.epoch || new.last_batch < stable.last_batch {
        return Err("the header's epoch, first sequence or last batch goes back".into());
    }
    Ok(())
}
