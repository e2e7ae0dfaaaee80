// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's image locks, so that `fvd` and a VM never write one image at the same time.
//!
//! QEMU takes *open file description* locks on single bytes of the image (its `file-posix` driver):
//! byte 100 + p is locked, shared, while permission p is used; byte 200 + p while permission p is
//! denied to others. To use p, nobody may hold byte 200 + p; to deny p, nobody may hold 100 + p.
//! Own bytes are taken first and the others' checked afterwards: of two programs that open at once
//! one at least sees the other. The locks go with the last copy of the file description.
//!
//! A format driver's `file` uses consistent read, plus write and resize when it is writable, and
//! always denies write and resize.

use fvd_engine::{Error, Kind, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

const USED: i64 = 100;
const DENIED: i64 = 200;

const CONSISTENT_READ: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const RESIZE: u32 = 1 << 3;
const PERMISSIONS: u32 = 4;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading; others may read too.
    Read,
    /// Reading and writing; others get nothing.
    Write,
}

impl Access {
    fn used(self) -> u32 {
        match self {
            Self::Read => CONSISTENT_READ,
            Self::Write => CONSISTENT_READ | WRITE | RESIZE,
        }
    }
}

fn bytes(base: i64, permissions: u32) -> impl Iterator<Item = (u32, i64)> {
    (0..PERMISSIONS).filter(move |p| permissions & (1 << p) != 0).map(move |p| (1 << p, base + i64::from(p)))
}

fn fcntl(fd: BorrowedFd<'_>, command: i32, kind: i32, byte: i64) -> std::result::Result<libc::flock, i32> {
    // SAFETY: `flock` is plain data for which all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = byte as _;
    lock.l_len = 1;
    loop {
        // SAFETY: `fd` is open, `lock` is valid for the call.
        if unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut lock) } == 0 {
            return Ok(lock);
        }
        match std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
            libc::EINTR => {}
            errno => return Err(errno),
        }
    }
}

/// Takes the locks for `access` on `fd`. Returns whether the file system has such locks at all.
pub fn acquire(fd: BorrowedFd<'_>, access: Access, name: &str) -> Result<bool> {
    // As QEMU: where the file system knows no locks, go on without.
    if fcntl(fd, libc::F_OFD_GETLK, libc::F_RDLCK, USED).is_err() {
        return Ok(false);
    }
    let deny = WRITE | RESIZE;
    for (_, byte) in bytes(USED, access.used()).chain(bytes(DENIED, deny)) {
        fcntl(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map_err(|errno| {
            let text = std::io::Error::from_raw_os_error(errno);
            Error::new(Kind::Host(errno), format!("cannot lock byte {byte} of '{name}': {text}"))
        })?;
    }
    for (permission, byte) in bytes(DENIED, access.used()).chain(bytes(USED, deny)) {
        let found = fcntl(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map_err(|errno| {
            let text = std::io::Error::from_raw_os_error(errno);
            Error::new(Kind::Host(errno), format!("cannot read the locks of '{name}': {text}"))
        })?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            let what = match (byte >= DENIED, permission) {
                (true, CONSISTENT_READ) => "another program does not let it be read",
                (true, _) => "another program has it open and does not let it be written",
                (false, _) => "another program has it open for writing",
            };
            return Err(Error::new(Kind::Host(libc::EAGAIN), format!("'{name}' is in use: {what}")));
        }
    }
    Ok(true)
}

/// Gives up whatever [`acquire`] took. Closing is not enough: a child that another thread is just
/// about to start holds a copy of the file description until it executes its program.
pub fn release(fd: BorrowedFd<'_>) {
    for byte in (USED..USED + i64::from(PERMISSIONS)).chain(DENIED..DENIED + i64::from(PERMISSIONS)) {
        let _ = fcntl(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsFd;

    #[test]
    fn readers_share_and_writers_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        File::create(&path).unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let (a, b, c) = (open(), open(), open());
        assert!(acquire(a.as_fd(), Access::Read, "x").unwrap());
        assert!(acquire(b.as_fd(), Access::Read, "x").unwrap());
        let refused = acquire(c.as_fd(), Access::Write, "x").unwrap_err();
        assert_eq!(refused.kind, Kind::Host(libc::EAGAIN));
        drop((a, b, c));
        let (a, b, c) = (open(), open(), open());
        assert!(acquire(a.as_fd(), Access::Write, "x").unwrap());
        assert!(acquire(b.as_fd(), Access::Read, "x").unwrap_err().text.contains("in use"));
        assert!(acquire(c.as_fd(), Access::Write, "x").is_err());
    }
}
