// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory that notices when it is used after its request has ended.

use fvd_engine::host::GuestBuf;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

#[derive(Debug)]
struct Memory {
    bytes: RefCell<Vec<u8>>,
    /// Simulated address of the first byte, modulo 4096.
    address: usize,
    ended: Cell<bool>,
    misused: Cell<bool>,
}

/// Memory of one request.
#[derive(Clone, Debug)]
pub struct Buf(Rc<Memory>);

impl Buf {
    /// Memory at `address`, modulo 4096.
    pub fn new(bytes: Vec<u8>, address: usize) -> Self {
        Self(Rc::new(Memory { bytes: RefCell::new(bytes), address, ended: Cell::new(false), misused: Cell::new(false) }))
    }

    /// The request has ended: nobody may touch the memory any more. False if somebody did before,
    /// after an earlier end.
    pub fn end(&self) -> bool {
        self.0.ended.set(true);
        !self.0.misused.get()
    }

    fn touch(&self) {
        if self.0.ended.get() {
            self.0.misused.set(true);
        }
    }

    /// Whether the memory was touched after its request had ended.
    pub fn is_misused(&self) -> bool {
        self.0.misused.get()
    }

    /// The bytes, for whoever issued the request.
    pub fn with<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        f(&self.0.bytes.borrow())
    }

    /// Part of the bytes, for the host.
    pub fn with_mut<T>(&self, at: usize, len: usize, f: impl FnOnce(&mut [u8]) -> T) -> T {
        self.touch();
        f(&mut self.0.bytes.borrow_mut()[at..at + len])
    }
}

impl GuestBuf for Buf {
    fn len(&self) -> usize {
        self.0.bytes.borrow().len()
    }
    fn is_aligned(&self, at: usize, len: usize, alignment: usize) -> bool {
        (self.0.address + at).is_multiple_of(alignment) && len.is_multiple_of(alignment)
    }
    fn zero(&self, at: usize, len: usize) {
        self.with_mut(at, len, |bytes| bytes.fill(0));
    }
    fn fill(&self, at: usize, from: &[u8]) {
        self.with_mut(at, from.len(), |bytes| bytes.copy_from_slice(from));
    }
    fn read(&self, at: usize, to: &mut [u8]) {
        self.with_mut(at, to.len(), |bytes| to.copy_from_slice(bytes));
    }
}
