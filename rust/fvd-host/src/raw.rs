// SPDX-License-Identifier: MIT OR Apache-2.0
//! One open file or block device: opening, what it can do, and every operation as a blocking call.

use crate::iovec::Cursor;
use crate::lock::{self, Access};
use fvd_engine::host::{Limits, Page, STATUS_DATA};
use fvd_engine::{Error, Kind, Result};
use rustix::fs::{AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
#[cfg(feature = "uring")]
use std::os::fd::BorrowedFd;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const _: () = assert!(size_of::<libc::off_t>() == 8, "file offsets have 64 bits");

/// How to open a file. Opening takes no lock yet: [`RawFile::lock`] does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub write: bool,
    pub create: bool,
    pub direct: bool,
    pub lock: bool,
}

/// What a file is, whatever its name: device and inode, or the device it stands for.
pub(crate) type Identity = (u64, u64);

/// An open regular file or block device.
#[derive(Debug)]
pub(crate) struct RawFile {
    file: File,
    pub path: PathBuf,
    pub identity: Identity,
    pub limits: Limits,
    device: bool,
    direct: bool,
}

pub(crate) fn os_error(what: &str, error: &std::io::Error) -> Error {
    Error::new(Kind::Host(error.raw_os_error().unwrap_or(libc::EIO)), format!("{what}: {error}"))
}

fn ret(result: rustix::io::Result<()>) -> i64 {
    match result {
        Ok(()) => 0,
        Err(errno) => -i64::from(errno.raw_os_error()),
    }
}

fn unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY | Errno::INVAL)
}

impl Drop for RawFile {
    fn drop(&mut self) {
        lock::release(self.file.as_fd());
    }
}

impl RawFile {
    pub fn open(path: &Path, how: How) -> Result<Self> {
        let name = path.display();
        // O_NONBLOCK: a FIFO by this name is refused below instead of waited for.
        let flags = libc::O_NONBLOCK | if how.direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(how.write)
            .create(how.create)
            .truncate(false)
            .mode(0o644)
            .custom_flags(flags)
            .open(path)
            .map_err(|error| os_error(&format!("cannot open '{name}'"), &error))?;
        // From here on operations shall wait, not fail with EAGAIN.
        let flags = rustix::fs::fcntl_getfl(&file).and_then(|flags| rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK));
        flags.map_err(|errno| os_error(&format!("cannot set the flags of '{name}'"), &errno.into()))?;
        let meta = file.metadata().map_err(|error| os_error(&format!("cannot stat '{name}'"), &error))?;
        let device = meta.file_type().is_block_device();
        if !device && !meta.is_file() {
            return Err(Error::new(Kind::Invalid, format!("'{name}' is neither a file nor a block device")));
        }
        let identity = if device { (u64::MAX, meta.rdev()) } else { (meta.dev(), meta.ino()) };
        let mut raw = Self { file, path: path.to_owned(), identity, limits: Limits::default(), device, direct: how.direct };
        raw.limits = raw.find_limits(how.write, if device { meta.rdev() } else { meta.dev() })?;
        Ok(raw)
    }

    /// Takes QEMU's locks for the way the file is open, if `how` says so.
    pub fn lock(&self, how: How) -> Result<()> {
        let access = if how.write { Access::Write } else { Access::Read };
        if how.lock {
            lock::acquire(self.file.as_fd(), access, &self.path.display().to_string())?;
        }
        Ok(())
    }

    #[cfg(feature = "uring")]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn allocated(&self) -> Option<u64> {
        self.file.metadata().ok().filter(|_| !self.device).map(|meta| meta.blocks() * 512)
    }

    fn find_limits(&self, writable: bool, device: u64) -> Result<Limits> {
        let (request, memory) = if self.direct { self.direct_alignment()? } else { (1, 1) };
        let physical = if self.device { rustix::fs::ioctl_blkpbszget(&self.file).ok() } else { queue_attribute(device, "physical_block_size") };
        let granule = physical.filter(|n| n.is_power_of_two()).unwrap_or(0).clamp(4096, 64 << 10);
        let cheap = if self.device { queue_attribute(device, "write_zeroes_max_bytes").is_some_and(|n| n > 0) } else { !writable || self.can_punch() };
        Ok(Limits {
            request_alignment: request,
            memory_alignment: memory,
            write_granule: granule.max(request),
            grows_zeroed: !self.device,
            cheap_zeroing: cheap,
            can_fua: true,
        })
    }

    /// Request and memory alignment that O_DIRECT needs here.
    fn direct_alignment(&self) -> Result<(u32, u32)> {
        let bad = |what: String| Error::new(Kind::Unsupported, format!("'{}': {what}", self.path.display()));
        let asked = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let mut found = match asked {
            Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
                if stat.stx_dio_offset_align == 0 {
                    return Err(bad("the file system cannot do direct I/O on this file".into()));
                }
                Some((stat.stx_dio_offset_align, stat.stx_dio_mem_align))
            }
            _ => None,
        };
        if found.is_none() && self.device {
            found = rustix::fs::ioctl_blksszget(&self.file).ok().map(|size| (size, size));
        }
        let (request, memory) = found.map_or_else(|| self.probe_alignment(), Some).ok_or_else(|| bad("no alignment works for direct I/O".into()))?;
        if !request.is_power_of_two() || !memory.is_power_of_two() || request > 4096 || memory > 4096 {
            return Err(bad(format!("direct I/O here needs an alignment of {request} (memory {memory}) bytes; at most 4096 is supported")));
        }
        Ok((request, memory))
    }

    /// Tries reads of growing alignment, for kernels that do not tell. One byte aligned that works
    /// means that the file system does not check (or the file is empty): then the safe value.
    fn probe_alignment(&self) -> Option<(u32, u32)> {
        let mut pages = vec![Page([0; 4096]); 3];
        let start = pages.as_mut_ptr().cast::<u8>();
        let works = |skip: usize, len: usize| {
            // SAFETY: `skip` ≤ 4096 and `len` ≤ 4096: inside the three pages, which stay alive.
            let n = unsafe { libc::pread(self.file.as_raw_fd(), start.add(skip).cast(), len, 0) };
            n >= 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
        };
        let sizes = [1, 512, 1024, 2048, 4096];
        let safe = |size: usize| if size == 1 { 4096 } else { size as u32 };
        let request = sizes.into_iter().find(|&size| works(0, size)).map(safe)?;
        let memory = sizes.into_iter().find(|&size| works(size, 4096)).map_or(request, safe);
        Some((request, memory))
    }

    /// Whether the file system can punch holes: asked with a hole past the end, which changes nothing.
    fn can_punch(&self) -> bool {
        let Ok(length) = self.length() else { return false };
        let at = length.div_ceil(4096).saturating_mul(4096);
        match rustix::fs::fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, 4096) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => false,
            Ok(()) | Err(_) => true,
        }
    }

    pub fn length(&self) -> rustix::io::Result<u64> {
        if self.device {
            // The position is not used by anything else: all I/O names its offset.
            rustix::fs::seek(&self.file, SeekFrom::End(0))
        } else {
            rustix::fs::fstat(&self.file).map(|stat| stat.st_size as u64)
        }
    }

    pub fn get_length(&self) -> i64 {
        self.length().map_or_else(|errno| -i64::from(errno.raw_os_error()), |length| length as i64)
    }

    /// Whether a read that ended after `n` bytes ended at the end of the file for sure: under
    /// O_DIRECT what follows cannot even be asked for.
    pub fn ends_after(&self, n: usize) -> bool {
        n == 0 || (self.direct && !n.is_multiple_of(self.limits.request_alignment as usize))
    }

    /// Reads to or writes from `cursor` until all is done: 0 or a negative errno.
    ///
    /// # Safety
    /// The memory `cursor` names is valid for the whole call, and writable for reads.
    pub unsafe fn transfer(&self, write: bool, fua: bool, mut offset: u64, cursor: &mut Cursor) -> i64 {
        if offset.checked_add(cursor.left as u64).is_none_or(|end| end > i64::MAX as u64) {
            return -i64::from(libc::EFBIG);
        }
        while cursor.left > 0 {
            let iov = cursor.next();
            let (fd, count, at) = (self.file.as_raw_fd(), iov.len() as i32, offset as libc::off_t);
            // SAFETY: `iov` is a valid array and names valid memory by this function's contract.
            let n = unsafe {
                match (write, fua) {
                    (false, _) => libc::preadv(fd, iov.as_ptr(), count, at),
                    (true, false) => libc::pwritev(fd, iov.as_ptr(), count, at),
                    (true, true) => libc::pwritev2(fd, iov.as_ptr(), count, at, libc::RWF_DSYNC),
                }
            };
            if n < 0 {
                match std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
                    libc::EINTR => continue,
                    libc::EAGAIN => std::thread::yield_now(),
                    errno => return -i64::from(errno),
                }
                continue;
            }
            let n = n as usize;
            cursor.advance(n);
            offset += n as u64;
            if cursor.left == 0 {
                break;
            }
            if write && n == 0 {
                return -i64::from(libc::EIO);
            }
            if !write && self.ends_after(n) {
                // SAFETY: by this function's contract.
                unsafe { cursor.zero_rest() };
            }
        }
        0
    }

    pub fn flush(&self) -> i64 {
        loop {
            match rustix::fs::fdatasync(&self.file) {
                Err(Errno::INTR) => {}
                result => return ret(result),
            }
        }
    }

    pub fn truncate(&self, length: u64) -> i64 {
        if !self.device {
            return ret(rustix::fs::ftruncate(&self.file, length));
        }
        match self.length() {
            // A device has the length it has; more than enough is as good.
            Ok(has) if length <= has => 0,
            Ok(_) => -i64::from(libc::ENOSPC),
            Err(errno) => -i64::from(errno.raw_os_error()),
        }
    }

    /// Makes a range read as zero, the cheapest way there is.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> i64 {
        let Some(end) = offset.checked_add(len).filter(|&end| end <= i64::MAX as u64) else {
            return -i64::from(libc::EFBIG);
        };
        if len == 0 {
            return 0;
        }
        let done = if self.device { self.zero_device(offset, end, may_unmap) } else { self.zero_file(offset, end, may_unmap) };
        match done {
            Err(errno) if unsupported(errno) => self.zero_by_writing(offset, end),
            result => ret(result),
        }
    }

    /// Makes a range of what the file has read as zero without writing zeroes: `-ENOTSUP` where it cannot.
    pub fn zero_cheaply(&self, offset: u64, len: u64) -> i64 {
        // Of a file a hole, of a device what does not fall back to writing.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match again(|| rustix::fs::fallocate(&self.file, flags, offset, len)) {
            Err(errno) if unsupported(errno) => -i64::from(libc::ENOTSUP),
            result => ret(result),
        }
    }

    fn zero_file(&self, offset: u64, end: u64, may_unmap: bool) -> rustix::io::Result<()> {
        use FallocateFlags as Flags;
        let call = |flags, offset, end| again(|| rustix::fs::fallocate(&self.file, flags, offset, end - offset));
        let length = self.length()?;
        if may_unmap {
            let hole = if offset < length { call(Flags::PUNCH_HOLE | Flags::KEEP_SIZE, offset, end) } else { Ok(()) };
            match hole {
                // Growing by ftruncate could cut off what a write on another thread appends meanwhile.
                Ok(()) if end > length => return call(Flags::empty(), end - 1, end),
                Err(errno) if unsupported(errno) => {}
                result => return result,
            }
        }
        let keep = if end > length { Flags::empty() } else { Flags::KEEP_SIZE };
        match call(Flags::ZERO_RANGE | keep, offset, end) {
            Err(errno) if unsupported(errno) => {}
            result => return result,
        }
        // tmpfs and others: a hole, then blocks in it.
        if offset < length {
            call(Flags::PUNCH_HOLE | Flags::KEEP_SIZE, offset, end)?;
        }
        call(keep, offset, end)
    }

    fn zero_device(&self, offset: u64, end: u64, may_unmap: bool) -> rustix::io::Result<()> {
        use FallocateFlags as Flags;
        let sector = u64::from(rustix::fs::ioctl_blksszget(&self.file)?.max(512));
        let (from, to) = (offset.next_multiple_of(sector), end / sector * sector);
        if from >= to {
            return Err(Errno::OPNOTSUPP);
        }
        // On a device a "hole" is zeroing that may unmap and does not fall back to writing;
        // a "zero range" is what BLKZEROOUT does, which falls back to writing in the kernel.
        let punched = may_unmap && again(|| rustix::fs::fallocate(&self.file, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, from, to - from)).is_ok();
        if !punched {
            again(|| rustix::fs::fallocate(&self.file, Flags::ZERO_RANGE | Flags::KEEP_SIZE, from, to - from))?;
        }
        for (from, to) in [(offset, from), (to, end)] {
            let result = self.zero_by_writing(from, to);
            if result < 0 {
                return Err(Errno::from_raw_os_error(-result as i32));
            }
        }
        Ok(())
    }

    fn zero_by_writing(&self, mut offset: u64, end: u64) -> i64 {
        let zeroes = vec![Page([0; 4096]); 256];
        while offset < end {
            let n = (end - offset).min(zeroes.len() as u64 * 4096) as usize;
            let mut cursor = Cursor::new(vec![libc::iovec { iov_base: zeroes.as_ptr().cast_mut().cast(), iov_len: n }]);
            // SAFETY: `zeroes` outlives the call, which only reads it.
            let result = unsafe { self.transfer(true, false, offset, &mut cursor) };
            if result < 0 {
                return result;
            }
            offset += n as u64;
        }
        0
    }

    /// Gives a range's storage back. On devices by the call that leaves zeroes: a plain discard
    /// (BLKDISCARD) may leave anything, which the engine's contract excludes.
    pub fn discard(&self, offset: u64, len: u64) -> i64 {
        let mut range = (offset, offset.saturating_add(len).min(i64::MAX as u64));
        if self.device {
            let sector = u64::from(rustix::fs::ioctl_blksszget(&self.file).unwrap_or(4096).max(512));
            range = (offset.next_multiple_of(sector), range.1 / sector * sector);
        }
        if range.0 >= range.1 {
            return 0;
        }
        match again(|| rustix::fs::fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range.0, range.1 - range.0)) {
            Err(errno) if unsupported(errno) => 0,
            result => ret(result),
        }
    }

    /// How many bytes from `offset` on, at most `len`, are alike: a hole or the space past the end,
    /// or, with [`STATUS_DATA`], maybe data.
    pub fn status(&self, offset: u64, len: u64) -> i64 {
        let len = len.min((STATUS_DATA - 1) as u64);
        let length = match self.length() {
            Ok(length) => length,
            Err(errno) => return -i64::from(errno.raw_os_error()),
        };
        if offset >= length {
            return len as i64;
        }
        let data = |end: u64| STATUS_DATA + (end.min(length) - offset).min(len) as i64;
        if self.device {
            return data(length);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) if start > offset => (start - offset).min(len) as i64,
            Ok(_) => data(rustix::fs::seek(&self.file, SeekFrom::Hole(offset)).ok().filter(|&end| end > offset).unwrap_or(length)),
            Err(Errno::NXIO) => len as i64,
            Err(_) => data(length),
        }
    }
}

fn again(mut call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// A number the kernel tells about the queue of a block device, or of the disk it is a partition of.
fn queue_attribute(device: u64, name: &str) -> Option<u32> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let of = |queue: &str| std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/{name}")).ok();
    let text = of("queue").or_else(|| of("../queue"))?;
    let value: u64 = text.trim().parse().ok()?;
    Some(u32::try_from(value).unwrap_or(u32::MAX))
}
