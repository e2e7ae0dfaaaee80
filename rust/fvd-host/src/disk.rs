// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image as a blocking Rust object, for tools: every call returns when it is done.

use crate::file::FileIo;
use crate::files::{Files, Options};
use crate::iovec::IoVecBuf;
use crate::reactor::now_ns;
use fvd_engine::host::{FileId, Host, HostOp, LogLevel, Token};
use fvd_engine::{AmendParams, BlockStatus, CheckReport, CreateParams, Error, Image, Info, Kind, Queue, Repair, Reply, Request, Result};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The engine's host over a [`FileIo`].
pub struct LocalHost {
    io: Rc<FileIo>,
}

impl LocalHost {
    /// A host that hands operations to `io`. Whoever makes it drives the queue by [`FileIo::turn`].
    pub fn new(io: Rc<FileIo>) -> Self {
        Self { io }
    }
}

impl Host for LocalHost {
    type Buf = IoVecBuf;
    type Done = Box<dyn FnOnce(Result<Reply>)>;

    fn submit(&self, token: Token, op: HostOp<IoVecBuf>) {
        self.io.submit(token, op);
    }

    fn done(&self, done: Self::Done, result: Result<Reply>) {
        done(result);
    }

    fn now_ns(&self) -> u64 {
        now_ns()
    }

    fn random(&self, to: &mut [u8]) {
        random(to);
    }

    fn set_timer(&self, at_ns: u64) {
        self.io.set_timer(at_ns);
    }

    fn log(&self, level: LogLevel, text: &str) {
        if let Some(log) = &self.io.files().log {
            log(level, text);
        }
    }
}

/// Fills `to` with unpredictable bytes from the kernel.
pub fn random(mut to: &mut [u8]) {
    while !to.is_empty() {
        match rustix::rand::getrandom(&mut *to, rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => to = &mut to[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("the kernel has no random numbers: {errno}"),
        }
    }
}

/// How far a long call is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Since the call began.
    pub elapsed: Duration,
    /// One past the furthest byte touched in the image file, or the data file.
    pub image_reached: u64,
    /// One past the furthest byte touched in the base.
    pub base_reached: u64,
}

/// How often a long call says how far it is.
const TICK: Duration = Duration::from_millis(200);

/// Waits for `io`'s operations if a panic takes away the memory they use.
struct OnPanic<'a>(&'a FileIo);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.quiesce();
        }
    }
}

/// Submits `request` and drives `queue` until it is done.
pub(crate) fn wait(io: &FileIo, queue: &Rc<Queue<LocalHost>>, request: Request<IoVecBuf>, tick: &mut dyn FnMut(Progress)) -> Result<Reply> {
    let guard = OnPanic(io);
    let answer: Rc<RefCell<Option<Result<Reply>>>> = Rc::default();
    let slot = Rc::clone(&answer);
    let begin = Instant::now();
    let mut next_tick = TICK;
    queue.submit(request, Box::new(move |result| *slot.borrow_mut() = Some(result)));
    loop {
        if let Some(result) = answer.borrow_mut().take() {
            drop(guard);
            return result;
        }
        if io.turn(queue, Some(TICK)).is_err() {
            // The request's memory is on its way through the kernel and cannot be had back.
            std::process::abort();
        }
        let elapsed = begin.elapsed();
        if elapsed >= next_tick {
            next_tick = elapsed + TICK;
            tick(Progress { elapsed, image_reached: io.reached(FileId::Image).max(io.reached(FileId::Data)), base_reached: io.reached(FileId::Base) });
        }
    }
}

/// An open image.
pub struct Disk {
    image: Arc<Image>,
    pub(crate) queue: Rc<Queue<LocalHost>>,
    pub(crate) io: Rc<FileIo>,
}

impl Disk {
    /// Makes an image at `path`, and its data file; what is there is overwritten unless it is in use. `open_base`
    /// says whether the base named in `params` is opened, or only its name recorded.
    pub fn create(path: &Path, params: &CreateParams, open_base: bool, options: &Options, tick: &mut dyn FnMut(Progress)) -> Result<()> {
        let base = (open_base && !params.base_name.is_empty()).then_some((params.base_name.as_str(), params.base_format.as_str()));
        let options = Options { read_only: false, ..options.clone() };
        let existed = path.symlink_metadata().is_ok();
        let data = Some(params.data_name.as_str()).filter(|name| !name.is_empty());
        let data_path = data.and_then(|name| crate::base_path(path, name).ok()).filter(|path| path.symlink_metadata().is_err());
        let made = Files::create(path, base, data, &options).and_then(|files| {
            let disk = Self::over(files, &options, false)?;
            disk.request(Request::Create(Box::new(params.clone())), tick)?;
            disk.settle()
        });
        if made.is_err() && !existed {
            // Nothing was there before. If it cannot be removed, the first error still counts.
            let _ = std::fs::remove_file(path);
        }
        if let Some(path) = data_path.filter(|_| made.is_err()) {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Opens the image at `path`.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        Self::open_with(path, options, &mut |_| {})
    }

    /// As [`Disk::open`]; recovery of a large image may take its time.
    pub fn open_with(path: &Path, options: &Options, tick: &mut dyn FnMut(Progress)) -> Result<Self> {
        let disk = Self::over(Files::open(path, options)?, options, false)?;
        disk.request(Request::Open, tick)?;
        Ok(disk)
    }

    /// Reads only what describes the image at `path`; needs no base and opens none.
    pub fn inspect(path: &Path, options: &Options) -> Result<(Info, Arc<Files>)> {
        let options = Options { read_only: true, allow_base: false, allow_data: false, ..options.clone() };
        let disk = Self::over(Files::open(path, &options)?, &options, true)?;
        disk.request(Request::Open, &mut |_| {})?;
        Ok((disk.image.info()?, Arc::clone(disk.io.files())))
    }

    fn over(files: Arc<Files>, options: &Options, no_io: bool) -> Result<Self> {
        let image = Image::new(fvd_engine::Config { no_io, ..options.config(files.limits()) });
        let io = Rc::new(FileIo::new(files)?);
        let queue = Queue::new(Arc::clone(&image), LocalHost::new(Rc::clone(&io)), Box::new(io.wake_handle()));
        Ok(Self { image, queue, io })
    }

    /// The files behind the image.
    pub fn files(&self) -> &Arc<Files> {
        self.io.files()
    }

    /// A picture of the image.
    pub fn info(&self) -> Result<Info> {
        self.image.info()
    }

    /// Sends any request and waits for its reply.
    pub fn request(&self, request: Request<IoVecBuf>, tick: &mut dyn FnMut(Progress)) -> Result<Reply> {
        wait(&self.io, &self.queue, request, tick)
    }

    fn simple(&self, request: Request<IoVecBuf>) -> Result<()> {
        self.request(request, &mut |_| {}).map(|_| ())
    }

    /// Fills `to` from guest byte `offset` on.
    pub fn pread(&self, to: &mut [u8], offset: u64) -> Result<()> {
        let iov = [libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() }];
        // SAFETY: `simple` returns when the request is done, and waits for its operations if it
        // unwinds; nobody touches `to` meanwhile.
        let buf = unsafe { IoVecBuf::new(iov.as_ptr(), 1) }.expect("a slice fits an address space");
        self.simple(Request::Read { offset, buf })
    }

    /// Writes `from` at guest byte `offset`.
    pub fn pwrite(&self, from: &[u8], offset: u64, fua: bool) -> Result<()> {
        let iov = [libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() }];
        // SAFETY: as in `pread`; a write only reads the memory.
        let buf = unsafe { IoVecBuf::new(iov.as_ptr(), 1) }.expect("a slice fits an address space");
        self.simple(Request::Write { offset, buf, fua })
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> Result<()> {
        self.simple(Request::Flush)
    }

    /// Makes a range read as zero.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.simple(Request::WriteZeroes { offset, len, may_unmap, fua: false })
    }

    /// Gives up the content of a range.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.simple(Request::Discard { offset, len })
    }

    /// Changes the virtual size.
    pub fn resize(&self, size: u64, zeroed: bool) -> Result<()> {
        self.simple(Request::Resize { size, zeroed })
    }

    /// Changes options of creation, all or none.
    pub fn amend(&self, params: AmendParams) -> Result<()> {
        self.simple(Request::Amend(Box::new(params)))
    }

    /// Records another base, which is not opened.
    pub fn change_base(&self, name: &str, format: &str) -> Result<()> {
        self.simple(Request::ChangeBase { name: name.into(), format: format.into() })
    }

    /// Where the bytes from `offset` on are.
    pub fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        match self.request(Request::BlockStatus { offset, len }, &mut |_| {})? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Checks the image, and repairs what it may.
    pub fn check(&self, repair: Repair, tick: &mut dyn FnMut(Progress)) -> Result<CheckReport> {
        match self.request(Request::Check { repair }, tick)? {
            Reply::Check(report) => Ok(*report),
            other => Err(unexpected(&other)),
        }
    }

    /// Closes the image in good order.
    pub fn close(self) -> Result<()> {
        self.finish()
    }

    /// As [`Disk::close`]; nothing is served afterwards.
    pub(crate) fn finish(&self) -> Result<()> {
        self.simple(Request::Close)?;
        self.settle()
    }

    /// Lets the engine finish what it does in the background.
    fn settle(&self) -> Result<()> {
        while !self.queue.is_idle() {
            self.io.turn(&self.queue, Some(TICK))?;
        }
        Ok(())
    }
}

pub(crate) fn unexpected(reply: &Reply) -> Error {
    Error::new(Kind::State, format!("the engine answered {reply:?}"))
}
