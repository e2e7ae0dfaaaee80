// SPDX-License-Identifier: MIT OR Apache-2.0
//! Header updates: copy 2, sync, copy 1, sync (FMT-14). At rest both copies agree.

use crate::error::Result;
use crate::executor::Queue;
use crate::host::{FileId, Host, OwnBuf};
use crate::image::faulty;
use fvd_format::Header;
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::limits::PAGE_SIZE;
use std::rc::Rc;

impl<H: Host> Queue<H> {
    /// Changes the header, durably. An update that fails after copy 2 may have reached the disk
    /// would leave it open which header counts, so it poisons the image.
    pub(crate) async fn update_header(self: &Rc<Self>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let image = self.image().clone();
        let _one_at_a_time = image.header_lock.lock().await;
        image.check_poison()?;
        let mut header = image.header();
        change(&mut header);
        header.generation += 1;
        header.last_batch = image.meta().last_batch;
        header.validate()?;
        let copies: &[usize] = if faulty!(image, HeaderOneCopy) { &[1] } else { &[2, 1] };
        for &copy in copies {
            let buf = OwnBuf::from_slice(&header.encode(copy));
            let written = match self.write_own(FileId::Image, HEADER_OFFSETS[copy - 1], buf, PAGE_SIZE as u64).await {
                Ok(()) => self.sync().await,
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                image.poison(&error.text);
                return Err(error.context("updating the header"));
            }
        }
        let mut meta = image.meta();
        meta.header = Some(header);
        meta.stats.header_updates += 1;
        Ok(())
    }
}
