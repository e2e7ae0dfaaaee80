// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory as a caller hands it over: an array of `struct iovec`.

use fvd_engine::host::{GuestBuf, HostOp, OpKind, Segment};
use libc::iovec;

/// Guest memory that somebody else owns: pointer and number of iovecs. A plain handle, free to copy.
#[derive(Clone, Copy, Debug)]
pub struct IoVecBuf {
    iov: *const iovec,
    count: usize,
    len: usize,
}

impl IoVecBuf {
    /// A handle to `count` iovecs at `iov`; `None` if their lengths add up to more than an
    /// address space holds, or if one of them is NULL with a length.
    ///
    /// # Safety
    /// Until the request that gets this handle, or any copy of it, is done: the array and the
    /// memory it names stay valid; the memory may be written to where the request reads from the
    /// disk; nothing in this program holds a reference to the memory. Others (a guest, the kernel)
    /// may change the bytes at any time: they are only ever copied, never interpreted.
    pub unsafe fn new(iov: *const iovec, count: usize) -> Option<Self> {
        let mut len = 0usize;
        for i in 0..count {
            // SAFETY: the caller promises `count` valid entries.
            let entry = unsafe { *iov.add(i) };
            if entry.iov_len > 0 && entry.iov_base.is_null() {
                return None;
            }
            len = len.checked_add(entry.iov_len).filter(|&len| len <= isize::MAX as usize)?;
        }
        Some(Self { iov, count, len })
    }

    /// No memory at all: for requests without data.
    pub const fn empty() -> Self {
        Self { iov: std::ptr::null(), count: 0, len: 0 }
    }

    /// Calls `f` with each contiguous piece of `len` bytes at `at`, in order.
    pub fn pieces(&self, mut at: usize, mut len: usize, mut f: impl FnMut(*mut u8, usize)) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "range outside the guest's memory");
        for i in 0..self.count {
            if len == 0 {
                break;
            }
            // SAFETY: `i` < `count`, and the array is valid by the promise of `new`.
            let entry = unsafe { *self.iov.add(i) };
            if at >= entry.iov_len {
                at -= entry.iov_len;
                continue;
            }
            let n = len.min(entry.iov_len - at);
            // SAFETY: `at` < `iov_len`: inside the entry's memory.
            f(unsafe { entry.iov_base.cast::<u8>().add(at) }, n);
            at = 0;
            len -= n;
        }
        assert_eq!(len, 0, "the array of iovecs changed under a request");
    }
}

impl GuestBuf for IoVecBuf {
    fn len(&self) -> usize {
        self.len
    }

    fn is_aligned(&self, at: usize, len: usize, alignment: usize) -> bool {
        let mut done = 0;
        let mut good = true;
        self.pieces(at, len, |start, n| {
            done += n;
            // Pieces after the first start where the one before ended: its length counts too.
            good &= (start as usize).is_multiple_of(alignment) && (done == len || n.is_multiple_of(alignment));
        });
        good
    }

    fn zero(&self, at: usize, len: usize) {
        // SAFETY: memory of the piece is valid and writable by the promise of `new`.
        self.pieces(at, len, |to, n| unsafe { std::ptr::write_bytes(to, 0, n) });
    }

    fn fill(&self, at: usize, from: &[u8]) {
        let mut done = 0;
        self.pieces(at, from.len(), |to, n| {
            // SAFETY: as in `zero`; `from` holds `n` bytes at `done`. Guest memory and the
            // engine's own never overlap.
            unsafe { std::ptr::copy_nonoverlapping(from[done..done + n].as_ptr(), to, n) };
            done += n;
        });
    }

    fn read(&self, at: usize, to: &mut [u8]) {
        let mut done = 0;
        self.pieces(at, to.len(), |from, n| {
            // SAFETY: as in `fill`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from, to[done..done + n].as_mut_ptr(), n) };
            done += n;
        });
    }
}

/// Where an operation's memory is, for the kernel. The pointers are valid as long as `op` lives.
pub(crate) fn of_op(op: &mut HostOp<IoVecBuf>) -> Vec<iovec> {
    let reads = op.kind == OpKind::Read;
    let mut out = Vec::with_capacity(op.segments.len());
    for segment in &mut op.segments {
        match segment {
            Segment::Guest { buf, at, len } => {
                buf.pieces(*at, *len, |start, n| out.push(iovec { iov_base: start.cast(), iov_len: n }));
            }
            Segment::Own { buf, at, len } => {
                assert!(*at + *len <= buf.capacity(), "range outside the engine's buffer");
                let base = if reads { buf.pages_mut().as_mut_ptr().cast::<u8>() } else { buf.pages().as_ptr().cast::<u8>().cast_mut() };
                // `at` is inside the buffer: wrapping arithmetic cannot wrap.
                out.push(iovec { iov_base: base.wrapping_add(*at).cast(), iov_len: *len });
            }
        }
    }
    out.retain(|entry| entry.iov_len > 0);
    out
}

/// A list of iovecs on the way through a transfer that may come in pieces.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    iov: Vec<iovec>,
    first: usize,
    /// Bytes not transferred yet.
    pub left: usize,
}

// SAFETY: plain addresses; who makes a cursor keeps the memory valid until the transfer is over,
// whichever thread does it.
unsafe impl Send for Cursor {}

/// Most iovecs the kernel takes at once.
const IOV_MAX: usize = 1024;

impl Cursor {
    pub fn new(iov: Vec<iovec>) -> Self {
        let left = iov.iter().map(|entry| entry.iov_len).sum();
        Self { iov, first: 0, left }
    }

    /// What to give to the kernel next.
    pub fn next(&self) -> &[iovec] {
        let rest = &self.iov[self.first..];
        &rest[..rest.len().min(IOV_MAX)]
    }

    /// The whole list, before anything was transferred.
    pub fn all(&self) -> &[iovec] {
        &self.iov
    }

    /// `n` bytes are done.
    pub fn advance(&mut self, mut n: usize) {
        assert!(n <= self.left, "the kernel transferred more than it was asked for");
        self.left -= n;
        while n > 0 {
            let entry = &mut self.iov[self.first];
            if n >= entry.iov_len {
                n -= entry.iov_len;
                self.first += 1;
            } else {
                entry.iov_base = entry.iov_base.cast::<u8>().wrapping_add(n).cast();
                entry.iov_len -= n;
                n = 0;
            }
        }
    }

    /// Fills what is left with zeroes.
    ///
    /// # Safety
    /// The memory is still valid and writable.
    pub unsafe fn zero_rest(&mut self) {
        for entry in &self.iov[self.first..] {
            // SAFETY: by this function's contract.
            unsafe { std::ptr::write_bytes(entry.iov_base.cast::<u8>(), 0, entry.iov_len) };
        }
        self.first = self.iov.len();
        self.left = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(parts: &mut [Vec<u8>]) -> Vec<iovec> {
        parts.iter_mut().map(|p| iovec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() }).collect()
    }

    #[test]
    fn copies_cross_the_borders_of_segments() {
        let mut parts = vec![vec![1; 3], vec![], vec![2; 5], vec![3; 4]];
        let iov = over(&mut parts);
        // SAFETY: `parts` and `iov` outlive the handle; nothing else touches them.
        let buf = unsafe { IoVecBuf::new(iov.as_ptr(), iov.len()) }.unwrap();
        assert_eq!(buf.len(), 12);
        buf.fill(2, &[9; 7]);
        let mut back = [0; 12];
        buf.read(0, &mut back);
        assert_eq!(back, [1, 1, 9, 9, 9, 9, 9, 9, 9, 3, 3, 3]);
        buf.zero(8, 4);
        assert_eq!(parts, [vec![1, 1, 9], vec![], vec![9; 5], vec![0; 4]]);
    }

    #[test]
    fn alignment_counts_every_segment() {
        let mut page = vec![0u8; 8192];
        let start = page.as_mut_ptr().wrapping_add(page.as_ptr().align_offset(512));
        let entry = |at: usize, len| iovec { iov_base: start.wrapping_add(at).cast(), iov_len: len };
        let good = [entry(0, 512), entry(1024, 1024)];
        let bad = [entry(0, 100), entry(512, 412)];
        // SAFETY: `page` outlives both handles.
        let (good, bad) = unsafe { (IoVecBuf::new(good.as_ptr(), 2).unwrap(), IoVecBuf::new(bad.as_ptr(), 2).unwrap()) };
        assert!(good.is_aligned(0, 1536, 512) && good.is_aligned(512, 1024, 512));
        assert!(!good.is_aligned(8, 512, 512) && !bad.is_aligned(0, 512, 512));
        assert!(bad.is_aligned(100, 412, 512));
    }

    #[test]
    fn impossible_arrays_are_refused() {
        let null = [iovec { iov_base: std::ptr::null_mut(), iov_len: 1 }];
        let huge = [iovec { iov_base: 4096 as *mut _, iov_len: usize::MAX }; 2];
        // SAFETY: refused before any memory is touched.
        assert!(unsafe { IoVecBuf::new(null.as_ptr(), 1) }.is_none());
        // SAFETY: as above.
        assert!(unsafe { IoVecBuf::new(huge.as_ptr(), 2) }.is_none());
    }

    #[test]
    fn a_cursor_takes_any_short_transfer() {
        let mut parts = vec![vec![7; 3], vec![7; 5], vec![7; 4]];
        let mut cursor = Cursor::new(over(&mut parts));
        cursor.advance(4);
        assert_eq!((cursor.left, cursor.next().len(), cursor.next()[0].iov_len), (8, 2, 4));
        // SAFETY: `parts` is still there.
        unsafe { cursor.zero_rest() };
        assert_eq!(cursor.left, 0);
        assert_eq!(parts, [vec![7; 3], vec![7, 0, 0, 0, 0], vec![0; 4]]);
    }
}
