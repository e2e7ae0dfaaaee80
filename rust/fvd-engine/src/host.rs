// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the engine asks of the world: data, time, wake-ups (contract C1).
//!
//! Threads: a [`Host`] belongs to one queue and is called on that queue's thread only; a [`Wake`]
//! is called from any thread. The engine holds no lock and no borrow while it calls either.
//! Completion: each submitted operation is completed exactly once, by
//! [`Queue::complete`](crate::Queue::complete) on the queue's thread; it may be completed before
//! `submit` returns.

use std::fmt;

/// Alignment and granularity of the engine's own buffers: bytes.
pub const OWN_ALIGNMENT: usize = 4096;

/// The files an image consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum FileId {
    /// The image file: metadata, and guest data unless a data file holds it.
    Image = 0,
    /// The data file, where there is one.
    Data = 1,
    /// The base image, as the guest sees it (already decoded by the host). Read-only.
    Base = 2,
}

/// Number of [`FileId`]s.
pub const FILES: usize = 3;

/// What a file of the host can do. Read once, at open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of all requests are multiples of this: a power of two, 1–4096 bytes.
    /// 1 means that the host itself handles requests of any alignment.
    pub request_alignment: u32,
    /// Addresses of buffers are multiples of this: a power of two, 1–4096 bytes.
    pub memory_alignment: u32,
    /// The storage tears writes at multiples of this (physical block): power of two, bytes.
    /// Up to 64 KiB; smaller than 4096 counts as 4096.
    pub write_granule: u32,
    /// The file grows by truncate, and the new space reads as zero.
    pub grows_zeroed: bool,
    /// Zeroing a range costs no data transfer, as far as is known: see [`OpKind::ZeroCheaply`].
    pub cheap_zeroing: bool,
    /// Writes may carry the FUA flag.
    pub can_fua: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { request_alignment: 1, memory_alignment: 1, write_granule: 4096, grows_zeroed: true, cheap_zeroing: true, can_fua: false }
    }
}

/// Memory of a guest request. The engine reads and writes it only through this trait; the host
/// that made it guarantees that it stays valid until the request completes.
pub trait GuestBuf: Clone + fmt::Debug + 'static {
    /// Total bytes.
    fn len(&self) -> usize;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether `len` bytes at `at` start, and continue from segment to segment, at multiples of `alignment`.
    fn is_aligned(&self, at: usize, len: usize, alignment: usize) -> bool;
    /// Fills `len` bytes at `at` with zeroes.
    fn zero(&self, at: usize, len: usize);
    /// Copies `from` into the guest's memory at `at`.
    fn fill(&self, at: usize, from: &[u8]);
    /// Copies guest memory at `at` into `to`.
    fn read(&self, at: usize, to: &mut [u8]);
}

/// A 4 KiB aligned page.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; 4096]);

/// A buffer of the engine's own: whole 4 KiB pages, 4 KiB aligned.
pub struct OwnBuf(Box<[Page]>);

impl OwnBuf {
    /// A zeroed buffer of at least `len` bytes.
    pub fn zeroed(len: usize) -> Self {
        // In place, page by page: `vec![page; n]` would copy a page of zeroes instead.
        Self(std::iter::repeat_with(|| Page([0; 4096])).take(len.div_ceil(4096)).collect())
    }

    /// A buffer that starts with `bytes`, zero-padded.
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.write(0, bytes);
        buf
    }

    /// Capacity in bytes: a multiple of 4096.
    pub fn capacity(&self) -> usize {
        self.0.len() * 4096
    }

    /// The pages; together they are contiguous memory.
    pub fn pages(&self) -> &[Page] {
        &self.0
    }

    /// The pages, for a host that reads into them.
    pub fn pages_mut(&mut self) -> &mut [Page] {
        &mut self.0
    }

    /// Copies `from` to byte `at`.
    pub fn write(&mut self, mut at: usize, mut from: &[u8]) {
        while !from.is_empty() {
            let (page, within) = (at / 4096, at % 4096);
            let n = from.len().min(4096 - within);
            self.0[page].0[within..within + n].copy_from_slice(&from[..n]);
            from = &from[n..];
            at += n;
        }
    }

    /// Calls `f` for each contiguous piece of `len` bytes at `at`, with the piece's offset from `at`.
    pub fn for_each(&self, at: usize, len: usize, mut f: impl FnMut(usize, &[u8])) {
        let mut done = 0;
        while done < len {
            let (page, within) = ((at + done) / 4096, (at + done) % 4096);
            let n = (len - done).min(4096 - within);
            f(done, &self.0[page].0[within..within + n]);
            done += n;
        }
    }

    /// Calls `f` for each of `pages` pages of 4 KiB from byte `at` on, with the page's number.
    /// Nothing is copied where `at` is at a page's start, which it is unless the file's requests have
    /// a larger alignment.
    pub fn for_each_page(&self, at: usize, pages: usize, mut f: impl FnMut(usize, &[u8])) {
        for i in 0..pages {
            let from = at + i * 4096;
            match from % 4096 {
                0 => f(i, &self.0[from / 4096].0),
                _ => f(i, &self.to_vec(from, 4096)),
            }
        }
    }

    /// `len` bytes at `at`, copied.
    pub fn to_vec(&self, at: usize, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        self.for_each(at, len, |_, piece| out.extend_from_slice(piece));
        out
    }
}

impl fmt::Debug for OwnBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnBuf({} bytes)", self.capacity())
    }
}

/// A piece of memory that an operation transfers.
#[derive(Debug)]
pub enum Segment<B> {
    /// Guest memory.
    Guest {
        /// The request's memory.
        buf: B,
        /// First byte.
        at: usize,
        /// Bytes.
        len: usize,
    },
    /// The engine's own memory. The host owns it until the operation completes.
    Own {
        /// The buffer.
        buf: OwnBuf,
        /// First byte.
        at: usize,
        /// Bytes.
        len: usize,
    },
}

impl<B> Segment<B> {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Guest { len, .. } | Self::Own { len, .. } => *len,
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What an operation does. Results are ≥ 0 or a negative errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Fills the segments from the file. The host fills up with zeroes past the end of the file.
    /// On the base: `-ENOMEDIUM` where none is attached.
    Read,
    /// Writes the segments.
    Write {
        /// Durable on completion. Only where the limits allow it.
        fua: bool,
    },
    /// Makes every completed write, zeroing, discard and truncation durable, file length included.
    Flush,
    /// Makes the range read as zero.
    WriteZeroes {
        /// The storage may be given back.
        may_unmap: bool,
    },
    /// Makes the range read as zero, if that costs no data transfer: `-ENOTSUP` otherwise. Only where the
    /// limits say that zeroing is cheap, since not every host knows that before it has tried.
    ZeroCheaply,
    /// The range's content is no longer needed; afterwards it reads as before or as zero.
    Discard,
    /// Sets the file's length to `offset`.
    Truncate,
    /// Result: the file's length in bytes. On the base and the data file: `-ENOMEDIUM` where none is attached.
    GetLength,
    /// Base only. Result: how many bytes from `offset` on (1…`len`) are alike: known to read as
    /// zero, or, with [`STATUS_DATA`] added, possibly data.
    BaseStatus,
}

/// Added to the result of [`OpKind::BaseStatus`] when the bytes may be data.
pub const STATUS_DATA: i64 = 1 << 62;

/// An operation the engine asks of its host. The host owns it until it completes it.
#[derive(Debug)]
pub struct HostOp<B> {
    /// What to do.
    pub kind: OpKind,
    /// With which file.
    pub file: FileId,
    /// First byte; the new length for [`OpKind::Truncate`].
    pub offset: u64,
    /// Bytes; equals the segments' total where there are any.
    pub len: u64,
    /// Memory, in order.
    pub segments: Vec<Segment<B>>,
}

/// Names an operation: generation in the upper, slot in the lower 32 bits. Never 0.
pub type Token = u64;

/// How severe a message to the host's log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LogLevel {
    /// Something failed.
    Error = 0,
    /// Something is odd but handled.
    Warning = 1,
    /// Worth knowing.
    Info = 2,
}

/// The world of one queue.
pub trait Host: 'static {
    /// Memory of guest requests.
    type Buf: GuestBuf;
    /// What is called when a guest request is done.
    type Done: 'static;

    /// Starts an operation; see the module's contract for its completion.
    fn submit(&self, token: Token, op: HostOp<Self::Buf>);
    /// A guest request is done. Called once for each accepted request.
    fn done(&self, done: Self::Done, result: crate::Result<crate::Reply>);
    /// Nanoseconds of a monotonic clock.
    fn now_ns(&self) -> u64;
    /// Fills `to` with unpredictable bytes (image identities).
    fn random(&self, to: &mut [u8]);
    /// Calls [`Queue::timer`](crate::Queue::timer) once at or after `at_ns`; replaces an earlier
    /// call's time. `u64::MAX` cancels.
    fn set_timer(&self, at_ns: u64);
    /// A message for people.
    fn log(&self, level: LogLevel, text: &str);
    /// Storage that does not grow by itself is nearly used up: `free` bytes of it are left for guest
    /// data, and `wanted` more (at most a growth step) are of use to the image. Called ahead of need, when
    /// less than a growth step lies behind what the image uses, and when a write finds nothing.
    /// Whoever can makes the file or device longer and then calls
    /// [`Image::space_changed`](crate::Image::space_changed), here or later; the engine measures it
    /// again. Writes that find no room wait for that call or fail with `NoSpace`, as the configuration
    /// says; they may be tried again. Called once for each length of the storage, and again after each
    /// call of that function. Optional.
    fn low_space(&self, free: u64, wanted: u64) {
        let _ = (free, wanted);
    }
}

/// Asks a queue's thread, from any thread, to call [`Queue::run`](crate::Queue::run) soon.
pub trait Wake: Send + Sync + 'static {
    /// See [`Wake`].
    fn wake(&self);
}
