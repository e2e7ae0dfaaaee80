// SPDX-License-Identifier: MIT OR Apache-2.0
//! One image, two queues, two real threads: wake-ups across threads, no lost ones.

use crate::common::sim::*;
use crate::common::{Buf, Store, base_image};
use fvd_engine::host::*;
use fvd_engine::{Config, Error, Image, Queue, Reply, Request};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const BLOCK: u64 = 4096;
/// Blocks of a disk: Miri (`scripts/miri.sh`) is a thousand times slower.
const BLOCKS: u64 = if cfg!(miri) { 3 } else { 256 };

#[test]
fn an_image_may_be_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<Image>>();
}

/// Wakes a thread's loop.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    condition: Condvar,
}

impl Bell {
    /// False if nobody rang for long: somebody lost a wake-up.
    fn wait(&self) -> bool {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            let (guard, timeout) = self.condition.wait_timeout(rung, Duration::from_secs(if cfg!(miri) { 3600 } else { 20 })).unwrap();
            rung = guard;
            if timeout.timed_out() {
                return false;
            }
        }
        *rung = false;
        true
    }
}

struct Ring(Arc<Bell>);

impl Wake for Ring {
    fn wake(&self) {
        *self.0.rung.lock().unwrap() = true;
        self.0.condition.notify_one();
    }
}

/// Files in memory that threads share; every operation ends when its thread gets to it.
struct Files {
    image: Mutex<Vec<u8>>,
    base: Vec<u8>,
}

struct ThreadHost {
    files: Arc<Files>,
    pending: RefCell<VecDeque<(Token, HostOp<Buf>)>>,
    results: RefCell<Vec<(u64, Result<Reply, Error>)>>,
    start: Instant,
}

impl Host for ThreadHost {
    type Buf = Buf;
    type Done = u64;

    fn submit(&self, token: Token, op: HostOp<Buf>) {
        self.pending.borrow_mut().push_back((token, op));
    }
    fn done(&self, done: u64, result: Result<Reply, Error>) {
        self.results.borrow_mut().push((done, result));
    }
    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
    fn random(&self, to: &mut [u8]) {
        to.fill(1);
    }
    fn set_timer(&self, _: u64) {}
    fn log(&self, level: LogLevel, text: &str) {
        assert_ne!(level, LogLevel::Error, "{text}");
    }
}

impl ThreadHost {
    fn perform(&self, op: &mut HostOp<Buf>) -> i64 {
        let mut image = self.files.image.lock().unwrap();
        let at = op.offset as usize;
        match op.kind {
            OpKind::Read => {
                let from: &[u8] = if op.file == FileId::Base { &self.files.base } else { &image };
                let mut at = at;
                for segment in &mut op.segments {
                    let len = segment.len();
                    let mut bytes = vec![0; len];
                    let have = from.len().saturating_sub(at).min(len);
                    bytes[..have].copy_from_slice(&from[at.min(from.len())..][..have]);
                    match segment {
                        Segment::Guest { buf, at, .. } => buf.fill(*at, &bytes),
                        Segment::Own { buf, at, .. } => buf.write(*at, &bytes),
                    }
                    at += len;
                }
            }
            OpKind::Write { .. } => {
                let mut at = at;
                for segment in &op.segments {
                    let bytes = match segment {
                        Segment::Guest { buf, at, len } => buf.0.borrow()[*at..*at + *len].to_vec(),
                        Segment::Own { buf, at, len } => buf.to_vec(*at, *len),
                    };
                    image[at..at + bytes.len()].copy_from_slice(&bytes);
                    at += bytes.len();
                }
            }
            OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard => image[at..at + op.len as usize].fill(0),
            OpKind::Flush => {}
            OpKind::Truncate => image.resize(at, 0),
            OpKind::GetLength => return if op.file == FileId::Base { self.files.base.len() } else { image.len() } as i64,
            OpKind::BaseStatus => return op.len as i64 | STATUS_DATA,
        }
        0
    }
}

/// A thread's queue and its loop.
struct Worker {
    queue: Rc<Queue<ThreadHost>>,
    bell: Arc<Bell>,
    name: usize,
}

impl Worker {
    fn new(image: &Arc<Image>, files: &Arc<Files>, name: usize) -> Self {
        let host = ThreadHost { files: files.clone(), pending: RefCell::default(), results: RefCell::default(), start: Instant::now() };
        let bell = Arc::new(Bell::default());
        Self { queue: Queue::new(image.clone(), host, Box::new(Ring(bell.clone()))), bell, name }
    }

    /// Runs until `count` requests are done, or until nothing is left if `count` is 0.
    fn run(&self, count: usize) -> Vec<(u64, Result<Reply, Error>)> {
        loop {
            self.queue.run();
            let next = self.queue.host().pending.borrow_mut().pop_front();
            if let Some((token, mut op)) = next {
                let ret = self.queue.host().perform(&mut op);
                assert!(self.queue.complete(token, ret, op));
                continue;
            }
            let done = self.queue.host().results.borrow().len() >= count;
            if done && self.queue.is_idle() {
                return self.queue.host().results.take();
            }
            assert!(self.bell.wait(), "thread {}: a wake-up was lost", self.name);
        }
    }

    fn ask(&self, request: Request<Buf>) -> Reply {
        self.queue.submit(request, 0);
        self.run(1).remove(0).1.unwrap()
    }
}

fn files(bytes: &Store, base: &[u8]) -> Arc<Files> {
    let mut image = vec![0; bytes.len as usize];
    bytes.read(0, &mut image);
    Arc::new(Files { image: Mutex::new(image), base: base.to_vec() })
}

/// Each block is written half by one thread and half by the other: they meet at the range locks,
/// at commits, at the loading of pages and at read-modify-write.
fn halves(align: u32, laps: u64) {
    let blocks = BLOCKS;
    let rounds = blocks * if cfg!(miri) { 2 } else { laps };
    let base = base_image(blocks * 8);
    let bytes = create(over_base(blocks * BLOCK), Some(base.clone()), limits(align)).unwrap();
    let files = files(&bytes, &base);
    let mut config = Config { checkpoint_after: 4, ..Config::default() };
    config.limits = [limits(align); FILES];
    let image = Image::new(config);
    let opener = Worker::new(&image, &files, 9);
    opener.ask(Request::Open);
    std::thread::scope(|scope| {
        for me in 0..2u64 {
            let (image, files) = (&image, &files);
            scope.spawn(move || {
                let worker = Worker::new(image, files, me as usize);
                for round in 0..rounds {
                    let block = round % blocks;
                    let value = (round / blocks * 2 + me + 1) as u8;
                    let write = |offset, len| Request::Write { offset, buf: Buf::new(vec![value; len]), fua: round % 97 == 0 };
                    worker.queue.submit(write(block * BLOCK + me * 2048, 1024), 1);
                    worker.queue.submit(write(block * BLOCK + me * 2048 + 1024, 1024), 2);
                    let read = Buf::new(vec![0; 8192]);
                    worker.queue.submit(Request::Read { offset: block.saturating_sub(1) * BLOCK, buf: read }, 3);
                    let mut count = 3;
                    if round % 3 == me {
                        worker.queue.submit(Request::Flush, 4);
                        count += 1;
                    }
                    for (id, result) in worker.run(count) {
                        result.unwrap_or_else(|e| panic!("thread {me} round {round} request {id}: {e}"));
                    }
                }
            });
        }
    });
    let buf = Buf::new(vec![0; (blocks * BLOCK) as usize]);
    opener.ask(Request::Read { offset: 0, buf: buf.clone() });
    let last = ((rounds - 1) / blocks * 2) as u8;
    for (i, half) in buf.0.borrow().chunks(2048).enumerate() {
        let expect = last + (i % 2) as u8 + 1;
        assert!(half.iter().all(|&b| b == expect), "half {i} is {} instead of {expect}", half[0]);
    }
    // Not under Miri: a check makes use of bitvec, which keeps a bit's number in a reference to nothing.
    if !cfg!(miri) {
        match opener.ask(Request::Check { repair: fvd_engine::Repair::None }) {
            Reply::Check(report) => assert_eq!(report.corruptions, 0, "{:?}", report.findings),
            other => panic!("{other:?}"),
        }
    }
    opener.ask(Request::Close);
    // And the file says the same.
    let mut store = Store::default();
    store.write(0, &files.image.lock().unwrap());
    let sim = Sim::open(&store, Some(base));
    assert!(sim.info().was_clean);
    same(&sim.read(0, blocks * BLOCK), &buf.0.borrow(), "opened again");
    sim.close();
}

#[test]
fn two_threads_copy_on_write_the_same_blocks() {
    halves(512, 12);
}

#[test]
fn two_threads_modify_the_same_host_sectors() {
    halves(4096, 8);
}

/// A request of one thread waits for what the other thread holds, and is woken by its end.
#[test]
fn a_bracket_ended_on_another_thread_wakes_the_narrowing() {
    let base = base_image(8);
    let bytes = create(over_base(MIB), Some(base.clone()), limits(4096)).unwrap();
    let files = files(&bytes, &base);
    let mut config = Config::default();
    config.limits = [limits(4096); FILES];
    let image = Image::new(config);
    let worker = Worker::new(&image, &files, 0);
    worker.ask(Request::Open);
    let rounds = if cfg!(miri) { 6 } else { 200u64 };
    for round in 0..rounds {
        let fvd_engine::Lookup::Data { token, .. } = image.lookup(5, 512 * KIB, 512, true) else { panic!("not data") };
        let other = image.clone();
        let ender = std::thread::spawn(move || {
            if round % 3 != 0 {
                std::thread::yield_now();
            }
            other.end(token);
        });
        worker.queue.submit(Request::Write { offset: 512 * KIB + 512, buf: Buf::new(vec![1; 512]), fua: false }, 1);
        worker.run(1).remove(0).1.unwrap();
        ender.join().unwrap();
    }
    worker.ask(Request::Close);
}
