// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block status.

use crate::error::{Kind, Result};
use crate::executor::{Queue, fail};
use crate::host::Host;
use crate::request::{BlockStatus, Place};
use std::rc::Rc;

impl<H: Host> Queue<H> {
    /// Where guest bytes are, for as many of `len` as are alike.
    pub(crate) async fn block_status(self: &Rc<Self>, offset: u64, len: u64) -> Result<BlockStatus> {
        if len == 0 {
            return fail(Kind::Invalid, "the length is 0");
        }
        self.check_bounds(offset, len)?;
        // A bounded walk: neighbours of one state are joined, across segments and chunks.
        let (place, mut run) = self.place_of(offset, len).await?;
        while run < len {
            let (next, n) = self.place_of(offset + run, len - run).await?;
            let follows = match (place, next) {
                (Place::Data { file, offset }, Place::Data { file: next_file, offset: next }) => file == next_file && offset + run == next,
                _ => place == next,
            };
            if !follows {
                break;
            }
            run += n;
        }
        let base_length = self.base_length();
        match place {
            Place::Base if offset >= base_length => Ok(BlockStatus { place: Place::Zero, len: run }),
            Place::Base => Ok(BlockStatus { place, len: run.min(base_length - offset) }),
            _ => Ok(BlockStatus { place, len: run }),
        }
    }
}
