// SPDX-License-Identifier: MIT OR Apache-2.0
//! What operations do to the files of the world, or fail to do.

use super::{EIO, ENOMEDIUM, ENOTSUP, Inner, failed_kind};
use crate::content::SECTOR;
use crate::disk::Change;
use crate::geometry::Base;
use crate::memory::Buf;
use crate::store::PAGE;
use fvd_engine::host::*;
use std::rc::Rc;

impl Inner {
    pub(super) fn draw_failure(&mut self, op: &HostOp<Buf>) -> Option<i64> {
        let failures = &self.setup.failures;
        let number = self.counters.ops;
        let planned = failures.at.is_some_and(|at| number == at || (failures.forever && number > at)) && failures.reach.holds(op);
        let one_in = match op.kind {
            _ if op.file == FileId::Base => failures.base_one_in,
            OpKind::Flush if failures.flush_one_in != 0 => failures.flush_one_in,
            OpKind::Write { .. } if failures.metadata_one_in != 0 && op.file == FileId::Image && op.offset < self.disks[0].metadata_end => failures.metadata_one_in,
            _ => failures.image_one_in,
        };
        let errno = if failures.errno == 0 { EIO } else { failures.errno };
        // Where there is no medium, there is nothing to fail.
        let there = op.file != FileId::Base || (self.attached && self.base.is_some());
        let fails = there && (planned || (one_in != 0 && self.prng.one_in(one_in)));
        fails.then_some(errno)
    }

    /// An operation fails: what it was to change may have happened in part.
    pub(super) fn fail_op(&mut self, op: &HostOp<Buf>, mark: u64, errno: i64) -> i64 {
        self.counters.injected += 1;
        self.counters.failed[failed_kind(op.kind)] += 1;
        if op.kind == OpKind::Flush {
            self.counters.flushes_failed += 1;
            self.disks[usize::from(op.file == FileId::Data)].flush_failed(mark, &mut self.prng);
            return errno;
        }
        match self.change_of(op) {
            Some(Change::Bytes(offset, bytes)) => {
                let odds = self.prng.pick(&[0, 0, 50, 100]);
                for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                    if self.prng.chance(odds) {
                        self.disk_of(op.file).change(Change::Bytes(offset + (i * SECTOR) as u64, Rc::new(sector.to_vec())));
                    }
                }
            }
            Some(change) if self.prng.chance(30) => self.disk_of(op.file).change(change),
            _ => {}
        }
        errno
    }

    /// What an operation would change.
    pub(super) fn change_of(&mut self, op: &HostOp<Buf>) -> Option<Change> {
        match op.kind {
            OpKind::Write { .. } => Some(Change::Bytes(op.offset, Rc::new(bytes_of(op)))),
            OpKind::ZeroCheaply if self.setup.zeroing_is_dear => None,
            OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply => Some(Change::Zero(op.offset, op.len)),
            OpKind::Discard if self.setup.discard_ignored_percent > 0 && self.prng.chance(self.setup.discard_ignored_percent) => None,
            OpKind::Discard => Some(Change::Zero(op.offset, op.len)),
            OpKind::Truncate => Some(Change::Length(op.offset)),
            _ => None,
        }
    }

    pub(super) fn perform(&mut self, op: &mut HostOp<Buf>, mark: u64) -> i64 {
        if op.file == FileId::Base {
            return match self.base.as_ref().filter(|_| self.attached) {
                None => ENOMEDIUM,
                Some(base) => base_op(base, op),
            };
        }
        if op.file == FileId::Data && !self.setup.two_files {
            return ENOMEDIUM;
        }
        match op.kind {
            OpKind::Read => {
                let disk = self.disk_of(op.file);
                let mut at = op.offset;
                for segment in &mut op.segments {
                    let len = segment.len() as u64;
                    read_segment(segment, at, |offset, to| disk.view.read(offset, to));
                    at += len;
                }
            }
            OpKind::ZeroCheaply if self.setup.zeroing_is_dear => return ENOTSUP,
            OpKind::Flush => self.disk_of(op.file).flush(mark),
            OpKind::GetLength => return self.disk_of(op.file).view.len() as i64,
            OpKind::BaseStatus => return EIO,
            _ => {
                if let Some(change) = self.change_of(op) {
                    self.disk_of(op.file).change(change);
                }
            }
        }
        0
    }
}

/// Reads from the base, or tells of it.
fn base_op(base: &Base, op: &mut HostOp<Buf>) -> i64 {
    match op.kind {
        OpKind::Read => {
            let mut at = op.offset;
            for segment in &mut op.segments {
                let len = segment.len() as u64;
                read_segment(segment, at, |offset, to| base.read(offset, to));
                at += len;
            }
            0
        }
        OpKind::GetLength => base.len as i64,
        OpKind::BaseStatus => {
            let (data, len) = base.status(op.offset, op.len);
            len as i64 | if data { STATUS_DATA } else { 0 }
        }
        _ => EIO,
    }
}

fn read_segment(segment: &mut Segment<Buf>, offset: u64, read: impl Fn(u64, &mut [u8])) {
    match segment {
        Segment::Guest { buf, at, len } => buf.with_mut(*at, *len, |to| read(offset, to)),
        Segment::Own { buf, at: 0, len } => {
            for (i, page) in buf.pages_mut().iter_mut().enumerate().take(len.div_ceil(PAGE)) {
                let n = (*len - i * PAGE).min(PAGE);
                read(offset + (i * PAGE) as u64, &mut page.0[..n]);
            }
        }
        Segment::Own { buf, at, len } => {
            let mut bytes = vec![0; *len];
            read(offset, &mut bytes);
            buf.write(*at, &bytes);
        }
    }
}

/// The bytes an operation writes.
pub fn bytes_of(op: &HostOp<Buf>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(op.len as usize);
    for segment in &op.segments {
        match segment {
            Segment::Guest { buf, at, len } => buf.with_mut(*at, *len, |from| bytes.extend_from_slice(from)),
            Segment::Own { buf, at, len } => buf.for_each(*at, *len, |_, piece| bytes.extend_from_slice(piece)),
        }
    }
    bytes
}
