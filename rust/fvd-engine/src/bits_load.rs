// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loading bitmap pages on demand, through the page map.

use crate::bits::{Bits, Run, SEGMENT_MEMORY, SEGMENT_PAGES, Segment};
use crate::error::{Error, Kind, Result};
use crate::executor::Queue;
use crate::host::{FileId, Host, LogLevel};
use crate::image::{Image, Meta};
use fvd_format::RegionKind;
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page::{self, PAYLOAD_BITS};
use std::rc::Rc;

impl Meta {
    /// Whether page-map bit `bit` says "stored".
    pub(crate) fn is_stored(&self, bit: u64) -> bool {
        let within = bit % PAYLOAD_BITS;
        self.page_map[(bit / PAYLOAD_BITS) as usize][(within / 64) as usize] >> (within % 64) & 1 == 1
    }
}

impl Image {
    /// The bitmap; only called where the header has one.
    pub(crate) fn bits(&self) -> &Bits {
        self.map.bits.get().expect("image with a bitmap")
    }
}

impl<H: Host> Queue<H> {
    /// The run of blocks that starts at block `first` and ends before `end`, loading what it needs.
    pub(crate) async fn run_of(self: &Rc<Self>, first: u64, end: u64) -> Result<(bool, u64)> {
        loop {
            match self.image().bits().run(first, end) {
                Run::Bits { value, len } => return Ok((value, len)),
                Run::Bad => {
                    return Err(Error::new(Kind::Corrupt, format!("the bitmap page of block {first} is damaged; run a check")));
                }
                Run::Missing(segment) => self.load_segment(segment).await?,
            }
        }
    }

    /// Loads every segment that holds one of the blocks `first..end`.
    pub(crate) async fn load_blocks(self: &Rc<Self>, first: u64, end: u64) -> Result<()> {
        let mut at = first;
        while at < end {
            at += self.run_of(at, end).await?.1;
        }
        Ok(())
    }

    /// Loads a segment, unless another task just did.
    pub(crate) async fn load_segment(self: &Rc<Self>, index: u64) -> Result<()> {
        let image = self.image().clone();
        let _one_at_a_time = image.load_lock.lock().await;
        if image.bits().segment(index).is_some() {
            return Ok(());
        }
        let (region, uuid, stored, first) = {
            let mut meta = image.meta();
            let header = meta.header.as_ref().expect("open image");
            let region = *header.region(RegionKind::Bitmap).expect("image with a bitmap");
            let uuid = header.uuid;
            if (meta.segments_loaded + 1) * SEGMENT_MEMORY > image.config.metadata_memory {
                return Err(Error::new(Kind::NoMemory, format!("metadata needs more than {} bytes of memory (metadata-memory)", image.config.metadata_memory)));
            }
            meta.segments_loaded += 1;
            let first = index * SEGMENT_PAGES;
            let last = region.pages().min(first + SEGMENT_PAGES);
            let stored: Vec<bool> = (first..last).map(|p| meta.is_stored(region.map_first + p)).collect();
            (region, uuid, stored, first)
        };
        let segment = Segment::initial();
        // One read from the first to the last stored page: what lies between is small.
        let from = stored.iter().position(|&s| s);
        let to = stored.iter().rposition(|&s| s);
        if let (Some(from), Some(to)) = (from, to) {
            let offset = region.offset + (first + from as u64) * PAGE_SIZE as u64;
            let (buf, at) = match self.read_own(FileId::Image, offset, ((to - from + 1) * PAGE_SIZE) as u64).await {
                Ok(read) => read,
                Err(error) => {
                    image.meta().segments_loaded -= 1;
                    return Err(error);
                }
            };
            for i in (from..=to).filter(|&i| stored[i]) {
                let index = first + i as u64;
                let overlay = image.meta().overlay.get(&(RegionKind::Bitmap, index)).cloned();
                let bytes = overlay.unwrap_or_else(|| buf.to_vec(at + (i - from) * PAGE_SIZE, PAGE_SIZE));
                match page::open(&uuid, RegionKind::Bitmap, region.generation, index, &bytes) {
                    Ok(header) => {
                        segment.load_page(i as u64, &bytes[page::HEADER_SIZE..], header.write_count);
                        image.note_loaded(&header);
                    }
                    Err(error) => {
                        self.host().log(LogLevel::Error, &error.to_string());
                        segment.mark_bad(i as u64);
                    }
                }
            }
        }
        image.bits().insert(index, segment);
        Ok(())
    }
}
