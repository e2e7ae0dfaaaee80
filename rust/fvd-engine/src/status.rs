// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block status.

use crate::error::{Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::{FileId, Host};
use crate::request::{BlockStatus, Place};
use std::rc::Rc;
use std::sync::atomic::Ordering;

impl<H: Host> Queue<H> {
    /// Where guest bytes are, for as many of `len` as are alike.
    pub(crate) async fn block_status(self: &Rc<Self>, offset: u64, len: u64) -> Result<BlockStatus> {
        if len == 0 {
            return fail(Kind::Invalid, "the length is 0");
        }
        self.check_bounds(offset, len)?;
        // A bounded walk: neighbours of one state in different segments are joined.
        let mut run = 0;
        let mut first = None;
        while run < len {
            let (present, n) = self.state_of(offset + run, len - run).await?;
            if *first.get_or_insert(present) != present {
                break;
            }
            run += n;
        }
        let base_length = self.base_length();
        if first == Some(true) {
            let at = self.image().map.data_offset.load(Ordering::Relaxed) + offset;
            return Ok(BlockStatus { place: Place::Data { file: FileId::Image, offset: at }, len: run });
        }
        if offset >= base_length {
            return Ok(BlockStatus { place: Place::Zero, len: run });
        }
        Ok(BlockStatus { place: Place::Base, len: run.min(base_length - offset) })
    }
}
