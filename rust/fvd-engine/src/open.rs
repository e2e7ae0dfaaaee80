// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening and closing.

use crate::bits::Bits;
use crate::error::{Error, Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host, LogLevel, OpKind};
use crate::image::{Image, State, faulty};
use crate::io::{ENOMEDIUM, bare, result_of};
use crate::recovery::WINDOW;
use crate::table::ENTRY_BITS;
use fvd_format::header::{BASE_LENGTH_UNKNOWN, HEADER_OFFSETS, MAGIC_V1, autoclear};
use fvd_format::limits::PAGE_SIZE;
use fvd_format::page;
use fvd_format::{Header, PageZero, RegionKind};
use std::rc::Rc;
use std::sync::atomic::Ordering;

impl<H: Host> Queue<H> {
    /// Opens the image: header, recovery if the last session ended without closing, page map.
    pub(crate) async fn open(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        image.advance(State::New, State::Opening)?;
        match self.open_steps().await {
            Ok(()) => {
                image.set_state(State::Open);
                Ok(())
            }
            Err(error) => {
                image.set_state(State::Closed);
                Err(error)
            }
        }
    }

    async fn open_steps(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let (header, behind, unreadable) = self.read_header().await?;
        image.check_metadata_memory(&header)?;
        image.publish(&header);
        let clean = header.clean;
        if image.config.no_io {
            return Ok(());
        }
        let length = self.op(bare(crate::host::OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
        let need = header.file_length_min();
        if length < need {
            return fail(Kind::Corrupt, format!("the image file is too short: {length} bytes, the header needs {need}"));
        }
        if header.has_data_file() {
            self.check_data_file(&header, header.data_length_min(), "the header needs").await?;
        }
        if let Some(copy) = behind.filter(|_| !image.config.read_only && !faulty!(image, HeaderNotRepaired)) {
            // An update was cut short. The next one begins with copy 2, whichever that may hurt: so
            // both must be good before.
            self.write_surely(HEADER_OFFSETS[copy - 1], &header.encode(copy)).await?;
            self.sync().await?;
            // What a cut tore is no damage; nothing is torn in an image that was closed.
            image.meta().mended_copy = (clean && unreadable).then_some(copy);
        }
        self.warn_of_base(&header).await?;
        if header.region(RegionKind::Journal).is_none() {
            return Ok(());
        }
        if clean {
            self.load_page_map().await?;
        } else {
            self.recover().await?;
        }
        if !image.config.read_only && image.header().autoclear & !autoclear::KNOWN != 0 {
            self.update_header(|header| header.autoclear &= autoclear::KNOWN).await?;
        }
        Ok(())
    }

    /// Reads page 0 and both header copies; says which copy is not the header that counts, if one is
    /// not, and whether it is none at all.
    async fn read_header(self: &Rc<Self>) -> Result<(Header, Option<usize>, bool)> {
        let length = self.op(bare(crate::host::OpKind::GetLength, FileId::Image, 0, 0)).await? as u64;
        let start = self.read_own(FileId::Image, 0, 2 * PAGE_SIZE as u64).await?.0.to_vec(0, 2 * PAGE_SIZE);
        if start[..4] != MAGIC_V1 && start[..8] == fvd_format::header::MAGIC && length < HEADER_OFFSETS[1] + PAGE_SIZE as u64 {
            return fail(Kind::Corrupt, format!("the image file is too short: {length} bytes do not hold the header"));
        }
        let zero = PageZero::decode(&start[..PAGE_SIZE])?;
        let one = &start[HEADER_OFFSETS[0] as usize..][..PAGE_SIZE];
        let two = self.read_own(FileId::Image, HEADER_OFFSETS[1], PAGE_SIZE as u64).await?.0.to_vec(0, PAGE_SIZE);
        let copies = [Header::decode(&zero.uuid, 1, one), Header::decode(&zero.uuid, 2, &two)];
        let mut header = Header::choose_decoded(copies[0].clone(), copies[1].clone())?;
        if faulty!(self.image(), HeaderFirstValid) {
            header = copies[0].clone().unwrap_or(header);
        }
        let behind = copies.iter().position(|copy| copy.as_ref().ok() != Some(&header));
        let unreadable = behind.is_some_and(|at| copies[at].is_err());
        Ok((header, behind.map(|at| at + 1), unreadable))
    }

    /// The data file is there, with `need` bytes at least, which `who` says. An open for metadata only goes
    /// on in any case; a check tells.
    pub(crate) async fn check_data_file(self: &Rc<Self>, header: &Header, need: u64, who: &str) -> Result<()> {
        let image = self.image();
        let name = &header.data_name;
        let align = u64::from(image.data_limits().request_alignment);
        let (ret, op) = self.io(bare(OpKind::GetLength, FileId::Data, 0, 0)).await;
        let error = match result_of(&op, ret) {
            Ok(length) if (length as u64) < need => Error::new(Kind::Corrupt, format!("the data file '{name}' is too short: {length} bytes, {who} {need}")),
            Ok(_) if header.data_offset % align != 0 => {
                Error::new(Kind::Unsupported, format!("the data begins at byte {} of the data file '{name}', whose requests are aligned to {align}", header.data_offset))
            }
            Ok(_) => return Ok(()),
            Err(_) if ret == -i64::from(ENOMEDIUM) => Error::new(Kind::Host(ENOMEDIUM), format!("the data file '{name}' is missing, or was not attached")),
            Err(error) => error.context(&format!("the data file '{name}'")),
        };
        if image.config.metadata_only {
            image.meta().data_file_trouble = Some(error.text);
            return Ok(());
        }
        Err(error)
    }

    /// A base of another length than recorded is served as recorded; somebody should know.
    async fn warn_of_base(self: &Rc<Self>, header: &Header) -> Result<()> {
        if header.covered == 0 || header.base_length == BASE_LENGTH_UNKNOWN {
            return Ok(());
        }
        let (ret, _) = self.io(bare(crate::host::OpKind::GetLength, FileId::Base, 0, 0)).await;
        if ret >= 0 && (ret as u64).next_multiple_of(512) != header.base_length {
            let text = format!(
                "the base has {ret} bytes, {} were recorded; past either end the base reads as zero",
                header.base_length
            );
            self.host().log(LogLevel::Warning, &text);
        } else if ret < 0 && ret != -i64::from(ENOMEDIUM) {
            self.host().log(LogLevel::Warning, &format!("the base cannot be measured (errno {})", -ret));
        }
        Ok(())
    }

    /// Reads and checks every page of the page map.
    pub(crate) async fn load_page_map(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        let (region, uuid) = {
            let header = image.header();
            (*header.region(RegionKind::PageMap).expect("image with a journal"), header.uuid)
        };
        let (mut pages, mut counts): (Vec<Box<[u64]>>, Vec<u32>) = (Vec::new(), Vec::new());
        let mut first = 0;
        while first < region.pages() {
            let n = (region.pages() - first).min((WINDOW / PAGE_SIZE) as u64);
            let (buf, at) = self.read_own(FileId::Image, region.offset + first * PAGE_SIZE as u64, n * PAGE_SIZE as u64).await?;
            let mut result = Ok(());
            buf.for_each_page(at, n as usize, |i, bytes| {
                if result.is_err() {
                    return;
                }
                let index = first + i as u64;
                let overlay = image.meta().overlay.get(&(RegionKind::PageMap, index)).cloned();
                let bytes = overlay.as_deref().unwrap_or(bytes);
                match page::open(&uuid, RegionKind::PageMap, region.generation, index, bytes) {
                    Ok(head) => {
                        counts.push(head.write_count);
                        image.note_loaded(&head);
                        pages.push(bytes[page::HEADER_SIZE..].chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect());
                    }
                    Err(error) => result = Err(error),
                }
            });
            result?;
            first += n;
        }
        let mut meta = image.meta();
        meta.page_map = pages;
        meta.page_map_counts = counts;
        Ok(())
    }

    /// Commits, checkpoints and marks the image clean. A session that changed nothing writes
    /// nothing; a poisoned image is left as it is, its mark dirty (R11).
    pub(crate) async fn close(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        image.advance(State::Open, State::Closing)?;
        // No storage comes any more.
        image.space_wait.wake_all();
        let result = self.close_steps().await;
        image.set_state(State::Closed);
        self.host().set_timer(u64::MAX);
        result
    }

    async fn close_steps(self: &Rc<Self>) -> Result<()> {
        let image = self.image().clone();
        // Everything accepted before ends first; this task is the last one.
        image.tasks_wait.until(|| (image.tasks() == 1).then_some(())).await;
        if image.config.read_only || image.config.no_io {
            return Ok(());
        }
        // Pass-through requests too.
        image.narrow().await;
        image.check_poison()?;
        self.commit_metadata().await?;
        image.tasks_wait.until(|| (image.tasks() == 1).then_some(())).await;
        image.check_poison()?;
        if !image.meta().session {
            return Ok(());
        }
        if faulty!(image, CleanWithoutCheckpoint) {
            let seq = image.meta().next_seq;
            let commit = image.meta().next_commit;
            return self.update_header(|h| (h.clean, h.first_seq, h.first_commit) = (true, seq, commit)).await;
        }
        assert!(!image.meta().pending.is_due() && image.meta().frozen.is_empty(), "nothing is left to commit");
        self.checkpoint(|header| header.clean = true).await
    }
}

impl Image {
    /// Refuses what the limit on metadata memory could never serve, before anything is allocated for
    /// it: after this the length of the bitmap is bounded.
    pub(crate) fn check_metadata_memory(&self, header: &Header) -> Result<()> {
        let memory = self.config.metadata_memory;
        match header.region(RegionKind::PageMap) {
            Some(map) if map.length > memory && !self.config.no_io => {
                fail(Kind::NoMemory, format!("the page map needs {} bytes, metadata-memory is {memory}", map.length))
            }
            _ => Ok(()),
        }
    }

    /// Makes `header` the one that counts, and what readers see of it.
    pub(crate) fn publish(&self, header: &Header) {
        let map = &self.map;
        map.data_offset.store(header.data_offset, Ordering::Release);
        map.two_files.store(header.has_data_file(), Ordering::Release);
        map.block_shift.store(if header.block_size == 0 { 0 } else { header.block_size.trailing_zeros() }, Ordering::Release);
        // Who only looks at the header needs no bitmap, however long.
        if header.covered > 0 && !self.config.no_io {
            let _ = map.bits.set(Bits::new(header.blocks()));
        }
        if header.is_compact() && !self.config.no_io {
            let _ = map.table.set(Bits::new(header.chunks() * ENTRY_BITS));
        }
        map.chunk_shift.store(if header.is_compact() { header.chunk_size.trailing_zeros() } else { 0 }, Ordering::Release);
        map.zero_from.store(header.zero_from(), Ordering::Release);
        // After the bitmap, so that who sees the length finds the bits.
        map.covered.store(header.covered, Ordering::Release);
        map.virtual_size.store(header.virtual_size, Ordering::Release);
        map.pristine.store(header.pristine, Ordering::Release);
        let mut meta = self.meta();
        meta.was_clean = header.clean;
        meta.next_seq = header.first_seq;
        meta.next_commit = header.first_commit;
        meta.last_batch = header.last_batch;
        meta.last_checkpoint = header.last_checkpoint;
        meta.reach = header.reach;
        for kind in RegionKind::ALL {
            if let Some(region) = header.region(kind) {
                meta.count_sums.insert(kind, region.count_sum);
            }
        }
        meta.header = Some(header.clone());
    }

    /// An error unless requests may be served.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.state() != State::Open {
            return Err(Error::new(Kind::State, format!("the image handle is {:?}, not open", self.state())));
        }
        if self.config.no_io {
            return Err(Error::new(Kind::State, "the image is open for inspection only"));
        }
        Ok(())
    }
}
