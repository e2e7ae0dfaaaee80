// SPDX-License-Identifier: MIT OR Apache-2.0
//! Either end of a copy: a raw file or an FVD image, asked the same way.

use super::Source;
use crate::disk::Disk;
use crate::file::FileIo;
use crate::files::{Files, Options};
use crate::iovec::IoVecBuf;
use fvd_engine::host::{FileId, GuestBuf, HostOp, OpKind, Segment, Token};
use fvd_engine::{Error, Kind, Reply, Request, Result};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Called once, when the request is done, on the same thread; perhaps at once.
pub(super) type Done<T> = Box<dyn FnOnce(Result<T>)>;

/// See the module's text.
pub(super) enum End {
    Raw(Box<RawEnd>),
    Fvd(Disk),
}

/// A raw file or device with requests under way.
pub(super) struct RawEnd {
    io: FileIo,
    waiting: RefCell<HashMap<Token, Done<()>>>,
    last: Cell<Token>,
}

impl End {
    /// Opens an image to copy from.
    pub fn source(source: &Source) -> Result<Self> {
        let options = Options { read_only: true, allow_base: !source.raw, allow_data: !source.raw, ..source.options.clone() };
        if source.raw { Self::raw(Files::open(&source.path, &options)?) } else { Disk::open(&source.path, &options).map(Self::Fvd) }
    }

    pub fn raw(files: Arc<Files>) -> Result<Self> {
        Ok(Self::Raw(Box::new(RawEnd { io: FileIo::new(files)?, waiting: RefCell::default(), last: Cell::new(0) })))
    }

    fn io(&self) -> &FileIo {
        match self {
            Self::Raw(raw) => &raw.io,
            Self::Fvd(disk) => &disk.io,
        }
    }

    pub fn files(&self) -> &Arc<Files> {
        self.io().files()
    }

    pub fn path(&self) -> &Path {
        self.files().path()
    }

    /// Bytes of the disk: whole sectors.
    pub fn size(&self) -> Result<u64> {
        match self {
            Self::Raw(raw) => {
                let file = &raw.io.files().image;
                let length = file.get_length();
                super::check(file, "measure", length)?;
                Ok((length as u64).next_multiple_of(512))
            }
            Self::Fvd(disk) => Ok(disk.info()?.header.virtual_size),
        }
    }

    /// What lengths of requests must be multiples of: bytes.
    pub fn granule(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.io.limits(FileId::Image).request_alignment.into(),
            Self::Fvd(_) => 1,
        }
    }

    /// Fills `buf` with what is at `offset`; past the end of a raw file with zeroes.
    pub fn read(&self, offset: u64, buf: IoVecBuf, done: Done<()>) {
        match self {
            Self::Raw(raw) => raw.start(OpKind::Read, offset, buf, done),
            Self::Fvd(disk) => disk.queue.submit(Request::Read { offset, buf }, plain(done)),
        }
    }

    pub fn write(&self, offset: u64, buf: IoVecBuf, done: Done<()>) {
        match self {
            Self::Raw(raw) => raw.start(OpKind::Write { fua: false }, offset, buf, done),
            Self::Fvd(disk) => disk.queue.submit(Request::Write { offset, buf, fua: false }, plain(done)),
        }
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, done: Done<()>) {
        match self {
            Self::Raw(raw) => {
                let op = HostOp { kind: OpKind::WriteZeroes { may_unmap: true }, file: FileId::Image, offset, len, segments: Vec::new() };
                raw.submit(op, done);
            }
            Self::Fvd(disk) => disk.queue.submit(Request::WriteZeroes { offset, len, may_unmap: true, fua: false }, plain(done)),
        }
    }

    /// How many bytes from `offset` on, at most `len`, are alike, through all bases: known to read as
    /// zero or, with `STATUS_DATA` added, possibly data.
    pub fn status(&self, offset: u64, len: u64, done: Done<i64>) {
        let disk = match self {
            Self::Raw(raw) => return done(result(raw.io.files().image.status(offset, len))),
            Self::Fvd(disk) => disk,
        };
        let io = Rc::clone(&disk.io);
        let answer = Box::new(move |reply: Result<Reply>| match reply {
            Ok(Reply::Status(status)) => io.content_status(status.place, offset, status.len, Box::new(|ret| done(result(ret)))),
            Ok(other) => done(Err(crate::disk::unexpected(&other))),
            Err(error) => done(Err(error)),
        });
        disk.queue.submit(Request::BlockStatus { offset, len }, answer);
    }

    /// Calls what is done, without waiting.
    pub fn turn(&self) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.turn(),
            Self::Fvd(disk) => disk.io.turn(&disk.queue, Some(Duration::ZERO)).map(|_| ()),
        }
    }

    /// Readable when [`End::turn`] has something to do.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.io().event_fd()
    }

    /// Waits until nobody works on the memory of any request, and forgets all of them.
    pub fn quiesce(&self) {
        self.io().quiesce();
    }
}

impl RawEnd {
    fn start(&self, kind: OpKind, offset: u64, buf: IoVecBuf, done: Done<()>) {
        let len = buf.len();
        let segments = vec![Segment::Guest { buf, at: 0, len }];
        self.submit(HostOp { kind, file: FileId::Image, offset, len: len as u64, segments }, done);
    }

    fn submit(&self, op: HostOp<IoVecBuf>, done: Done<()>) {
        let token = self.last.get() + 1;
        self.last.set(token);
        self.waiting.borrow_mut().insert(token, done);
        self.io.submit(token, op);
    }

    fn turn(&self) -> Result<()> {
        for (token, ret, _) in self.io.process(Some(Duration::ZERO))? {
            let done = self.waiting.borrow_mut().remove(&token).expect("an operation of this end");
            done(result(ret).map(|_| ()));
        }
        Ok(())
    }
}

fn plain(done: Done<()>) -> Done<Reply> {
    Box::new(|reply| done(reply.map(|_| ())))
}

/// What an operation returned, as a result.
fn result(ret: i64) -> Result<i64> {
    if ret >= 0 {
        return Ok(ret);
    }
    let errno = -ret as i32;
    Err(Error::new(Kind::Host(errno), std::io::Error::from_raw_os_error(errno).to_string()))
}
