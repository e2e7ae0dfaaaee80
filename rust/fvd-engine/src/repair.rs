// SPDX-License-Identifier: MIT OR Apache-2.0
//! Repairing what a check found (CC-60…).
//!
//! Nothing is invented. What nobody can tell becomes what it was at creation: the bits of a damaged
//! bitmap page become 0, so that their blocks read as the base. The other choice, "in this image",
//! would show bytes that perhaps were never written, of whoever used the storage before; what was
//! written stays in its place until something is written over it. The entries of a damaged table
//! page become "no storage".
//!
//! Each step leaves an image that opens, and that another check repairs to the end: pages are
//! written by an ordinary checkpoint, through the double-write area, in a session whose header does
//! not say clean; copies of shared chunks are stable before the commit that names them.

use crate::bits::set_words;
use crate::check::Plan;
use crate::error::{Error, Kind, Result};
use crate::executor::Queue;
use crate::host::{Host, LogLevel};
use crate::image::faulty;
use crate::io::BOUNCE_MAX;
use crate::request::CheckReport;
use crate::table::{ENTRY_BITS, page_of_entry};
use fvd_format::RegionKind;
use fvd_format::page::{PAYLOAD_BITS, PAYLOAD_WORDS};
use std::rc::Rc;

impl<H: Host> Queue<H> {
    /// An error unless this open may repair.
    pub(crate) fn check_may_repair(&self) -> Result<()> {
        let image = self.image();
        if image.config.read_only {
            return Err(Error::new(Kind::ReadOnly, "the image is open read-only; it cannot be repaired"));
        }
        image.check_poison()
    }

    /// A checkpoint, now.
    pub(crate) async fn settle_pages(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        image.checkpoint_wait.until(|| (!std::mem::replace(&mut image.meta().checkpointing, true)).then_some(())).await;
        let result = match image.check_poison() {
            Ok(()) => self.checkpoint(|_| ()).await,
            poisoned => poisoned,
        };
        image.meta().checkpointing = false;
        image.checkpoint_wait.wake_all();
        result
    }

    /// Carries out what a check planned. The caller keeps every other write away.
    pub(crate) async fn repair(self: &Rc<Self>, plan: Plan, report: &mut CheckReport) -> Result<()> {
        if faulty!(self.image(), RepairCopiesFirst) {
            self.repair_doubles(&plan.doubles).await?;
        }
        if plan.in_pages > 0 {
            self.repair_pages(&plan).await?;
            report.fixed(plan.in_pages);
        }
        if plan.in_doubles > 0 {
            match self.repair_doubles(&plan.doubles).await {
                Ok(()) => report.fixed(plan.in_doubles),
                // The others are as they were, and another repair goes on; everything else is repaired.
                Err(error) => {
                    self.image().check_poison()?;
                    self.host().log(LogLevel::Error, &error.text);
                    report.note(format!("guest chunks still share storage: {}", error.text));
                }
            }
        }
        Ok(())
    }

    /// Writes pages as memory has them, without what cannot be right, and counts them anew.
    async fn repair_pages(self: &Rc<Self>, plan: &Plan) -> Result<()> {
        let image = self.image().clone();
        // The header must not say clean while the double-write area counts.
        if !faulty!(image, RepairWhileClean) {
            self.ensure_session().await?;
        }
        {
            let mut meta = image.meta();
            let header = meta.header.clone().expect("open image");
            for &chunk in &plan.entries {
                image.region(RegionKind::Table).set_entry(chunk, 0);
                meta.dirty_pages.insert((RegionKind::Table, page_of_entry(chunk)));
            }
            for &kind in &plan.tails {
                let len = if kind == RegionKind::Table { header.chunks() * ENTRY_BITS } else { header.blocks() };
                let page = len.max(1).div_ceil(PAYLOAD_BITS) - 1;
                let pages = image.region(kind);
                let mut words = pages.page_words(page);
                set_words(&mut words, len - page * PAYLOAD_BITS, PAYLOAD_BITS, false);
                for (word, value) in (page * PAYLOAD_WORDS as u64..).zip(words.iter()) {
                    pages.replace_in_word(word, u64::MAX, *value);
                }
                meta.dirty_pages.insert((kind, page));
            }
            for id in &plan.pages {
                image.region(id.0).mark_good(id.1);
                meta.bad_pages.remove(id);
                meta.dirty_pages.insert(*id);
            }
            for kind in [RegionKind::Bitmap, RegionKind::Table] {
                if let Some(region) = header.region(kind) {
                    let sum = (0..region.pages()).map(|page| u64::from(image.region(kind).count(page))).sum();
                    meta.count_sums.insert(kind, sum);
                }
            }
        }
        let settled = self.settle_pages().await;
        if let Err(error) = &settled
            && !faulty!(image, RepairForgetsError)
        {
            // Memory is ahead of pages that no journal speaks of: nothing may be built on it.
            image.poison(&error.text);
        }
        settled
    }

    /// Gives guest chunks storage of their own, with a copy of what they share.
    async fn repair_doubles(self: &Rc<Self>, doubles: &[(u64, u64)]) -> Result<()> {
        let image = self.image().clone();
        if faulty!(image, DoubleMappingKept) {
            return Ok(());
        }
        let mut result = Ok(());
        for &(guest, id) in doubles {
            result = self.repair_double(guest, id).await;
            if result.is_err() {
                break;
            }
        }
        let committed = self.commit_metadata().await;
        result.and(committed)
    }

    async fn repair_double(self: &Rc<Self>, guest: u64, id: u64) -> Result<()> {
        let image = self.image().clone();
        self.wait_for_dirty_room().await?;
        let taken = self.allocate(1).await?;
        if !faulty!(image, RepairCopyForgotten)
            && let Err(error) = self.copy_chunk(id, taken.id).await
        {
            image.give_back_chunks(taken.id, taken.id + 1);
            return Err(error);
        }
        let mut meta = image.meta();
        meta.pending.data_first = true;
        meta.set_entry(&image, guest, (taken.id + 1) as u32);
        Ok(())
    }

    async fn copy_chunk(self: &Rc<Self>, from: u64, to: u64) -> Result<()> {
        let header = self.image().header();
        let size = u64::from(header.chunk_size);
        let mut done = 0;
        while done < size {
            let len = (size - done).min(BOUNCE_MAX);
            let (buf, at) = self.read_own(self.image().data_file(), header.chunk_offset(from) + done, len).await?;
            assert_eq!(at, 0, "chunks are aligned");
            self.write_own(self.image().data_file(), header.chunk_offset(to) + done, buf, len).await?;
            done += len;
        }
        Ok(())
    }
}
