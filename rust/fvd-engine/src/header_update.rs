// SPDX-License-Identifier: MIT OR Apache-2.0
//! Header updates: copy 2, sync, copy 1, sync (FMT-14). At rest both copies agree.

use crate::error::Result;
use crate::executor::Queue;
use crate::host::Host;
use crate::image::faulty;
use fvd_format::Header;
use fvd_format::header::HEADER_OFFSETS;
use std::rc::Rc;

impl<H: Host> Queue<H> {
    /// Changes the header, durably. An update that failed after copy 2 may have reached the disk
    /// would leave it open which header counts: a failed write is repeated, then the image poisoned.
    pub(crate) async fn update_header(self: &Rc<Self>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let image = self.image().clone();
        let _one_at_a_time = image.header_lock.lock().await;
        image.check_poison()?;
        let mut header = image.header();
        change(&mut header);
        header.generation += 1;
        (header.last_batch, header.reach) = {
            let meta = image.meta();
            (meta.last_batch, header.reach.max(meta.reach))
        };
        header.validate()?;
        let copies: &[usize] = if faulty!(image, HeaderOneCopy) { &[1] } else { &[2, 1] };
        for &copy in copies {
            let what = |error: crate::Error| error.context("updating the header");
            self.write_surely(HEADER_OFFSETS[copy - 1], &header.encode(copy)).await.map_err(what)?;
            self.sync().await.map_err(what)?;
        }
        let mut meta = image.meta();
        // A commit may have raised it meanwhile.
        meta.reach = meta.reach.max(header.reach);
        meta.header = Some(header);
        meta.stats.header_updates += 1;
        Ok(())
    }
}
