// SPDX-License-Identifier: MIT OR Apache-2.0
//! One open image in the simulated world, for scenarios that are told step by step.

use super::*;
use fvd_engine::{BlockStatus, CreateParams, Info, Stats};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;

pub fn limits(align: u32) -> Limits {
    Limits { request_alignment: align, ..Limits::default() }
}

/// A disk of `size` bytes over the base "base", with 4 KiB blocks and the smallest journal.
pub fn over_base(size: u64) -> CreateParams {
    CreateParams {
        virtual_size: Some(size),
        block_size: 4096,
        journal_size: MIB,
        base_name: "base".into(),
        base_format: "raw".into(),
        ..CreateParams::default()
    }
}

/// Creates an image; what is in the file then is durable.
pub fn create(params: CreateParams, base: Option<Vec<u8>>, limits: Limits) -> Result<Store, Error> {
    create_in(Store::default(), params, base, limits)
}

/// Creates an image over what is in a file.
pub fn create_in(file: Store, params: CreateParams, base: Option<Vec<u8>>, limits: Limits) -> Result<Store, Error> {
    let world = World::new(file, base, 1, limits);
    let queue = world.queue(Config::default());
    let result = world.request(&queue, Request::Create(Box::new(params))).expect("no cut");
    let stable = world.disk.borrow().stable.clone();
    result.map(|_| stable)
}

pub struct Sim {
    pub world: Rc<World>,
    pub queue: Rc<Queue<TestHost>>,
}

impl Sim {
    /// Opens an image; `config` without its limits.
    pub fn try_open(bytes: &Store, base: Option<Vec<u8>>, limits: Limits, config: Config) -> Result<Self, Error> {
        let world = World::new(bytes.clone(), base, 7, limits);
        let queue = world.queue(config);
        world.request(&queue, Request::Open).expect("no cut").map(|_| Self { world, queue })
    }

    /// The same where nothing can be wrong, for an image with a host that takes any alignment.
    pub fn open(bytes: &Store, base: Option<Vec<u8>>) -> Self {
        Self::try_open(bytes, base, limits(1), Config::default()).unwrap()
    }

    /// Creates and opens.
    pub fn new(params: CreateParams, base: Option<Vec<u8>>) -> Self {
        Self::open(&create(params, base.clone(), limits(1)).unwrap(), base)
    }

    pub fn ask(&self, request: Request<Buf>) -> Result<Reply, Error> {
        self.world.request(&self.queue, request).expect("no cut is planned")
    }

    pub fn write(&self, offset: u64, bytes: Vec<u8>) {
        self.ask(Request::Write { offset, buf: Buf::new(bytes), fua: false }).unwrap();
    }

    pub fn try_read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        let buf = Buf::new(vec![0xee; len as usize]);
        self.ask(Request::Read { offset, buf: buf.clone() }).map(|_| buf.0.take())
    }

    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        self.try_read(offset, len).unwrap()
    }

    pub fn flush(&self) {
        self.ask(Request::Flush).unwrap();
    }

    pub fn status(&self, offset: u64, len: u64) -> BlockStatus {
        match self.ask(Request::BlockStatus { offset, len }).unwrap() {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Number of damaged structures, and texts.
    pub fn check(&self) -> (u64, Vec<String>) {
        match self.ask(Request::Check { repair: fvd_engine::Repair::None }).unwrap() {
            Reply::Check(report) => (report.corruptions, report.findings),
            other => panic!("{other:?}"),
        }
    }

    pub fn info(&self) -> Info {
        self.queue.image().info().unwrap()
    }

    pub fn stats(&self) -> Stats {
        self.info().stats
    }

    /// What the host did since the last call.
    pub fn counts(&self) -> Counts {
        std::mem::take(&mut *self.world.counts.borrow_mut())
    }

    /// Closes; returns what is durable then.
    pub fn close(self) -> Store {
        self.ask(Request::Close).unwrap();
        let stable = self.world.disk.borrow().stable.clone();
        stable
    }

    /// The power goes: nothing that was not flushed survives.
    pub fn crash(self) -> Store {
        let stable = self.world.disk.borrow().stable.clone();
        // As in a process that was killed, nothing of it is dropped.
        std::mem::forget(self.queue);
        stable
    }

    /// Moves the clock by `ns` and calls the timer if its time has come.
    pub fn sleep(&self, ns: u64) {
        self.world.now.set(self.world.now.get() + ns);
        if self.world.timer.get() <= self.world.now.get() {
            self.world.timer.set(u64::MAX);
            self.queue.timer();
        }
        self.world.drain(&self.queue);
    }
}

thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });

/// Runs `f` and says how it panicked, in its result only.
pub fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                hook(info);
            }
        }));
    });
    QUIET.set(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    QUIET.set(false);
    result.map_err(|panic| panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default())
}

/// Compares bytes; says where they differ first, and not all of them.
#[track_caller]
pub fn same(found: &[u8], expect: &[u8], what: &str) {
    assert_eq!(found.len(), expect.len(), "{what}: length");
    if let Some(at) = (0..found.len()).find(|&i| found[i] != expect[i]) {
        let some = |bytes: &[u8]| bytes[at..bytes.len().min(at + 16)].to_vec();
        panic!("{what}: byte {at} (sector {}) is {:?} instead of {:?}", at / SECTOR, some(found), some(expect));
    }
}
