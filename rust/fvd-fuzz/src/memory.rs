// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host whose files are in memory and mostly holes, and the images that inputs start from.

use fvd_engine::host::*;
use fvd_engine::{Config, CreateParams, Error, Image, Queue, Reply, Request};
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::{Header, PageZero};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

const PAGE: u64 = 4096;
const ENOMEDIUM: i64 = -123;

/// A file: its length and the pages that are not a hole. Clones share pages.
#[derive(Clone, Default)]
pub struct File {
    /// Bytes.
    pub len: u64,
    /// The pages.
    pub pages: BTreeMap<u64, Arc<[u8; 4096]>>,
}

impl File {
    /// The page of byte `offset`, which is at a page's start.
    pub fn page(&self, offset: u64) -> [u8; 4096] {
        assert!(offset.is_multiple_of(PAGE));
        self.pages.get(&(offset / PAGE)).map_or([0; 4096], |page| **page)
    }

    /// Replaces a page; the file grows as needed.
    pub fn set_page(&mut self, offset: u64, page: &[u8; 4096]) {
        assert!(offset.is_multiple_of(PAGE));
        self.pages.insert(offset / PAGE, Arc::new(*page));
        self.len = self.len.max(offset + PAGE);
    }

    /// Calls `f` for each piece of `len` bytes at `offset` with its position.
    fn pieces(offset: u64, len: usize, mut f: impl FnMut(u64, usize, std::ops::Range<usize>)) {
        let mut at = 0;
        while at < len {
            let from = offset + at as u64;
            let within = (from % PAGE) as usize;
            let n = (len - at).min(PAGE as usize - within);
            f(from / PAGE, within, at..at + n);
            at += n;
        }
    }

    /// Reads; holes and what lies past the end are zero.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        Self::pieces(offset, to.len(), |page, within, piece| {
            let n = piece.len();
            match self.pages.get(&page) {
                Some(bytes) => to[piece].copy_from_slice(&bytes[within..within + n]),
                None => to[piece].fill(0),
            }
        });
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        Self::pieces(offset, from.len(), |page, within, piece| {
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; 4096]));
            Arc::make_mut(bytes)[within..within + piece.len()].copy_from_slice(&from[piece]);
        });
        self.len = self.len.max(offset + from.len() as u64);
    }

    /// Makes a range read as zero. Ranges may be as long as a disk.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if first <= last {
            let mut tail = self.pages.split_off(&first);
            self.pages.append(&mut tail.split_off(&last));
        }
        for (from, to) in [(offset, end.min(first * PAGE)), (offset.max(last * PAGE), end)] {
            if from < to && self.pages.contains_key(&(from / PAGE)) {
                self.write(from, &vec![0; (to - from) as usize]);
            }
        }
        self.len = self.len.max(end);
    }

    /// Sets the length.
    pub fn resize(&mut self, len: u64) {
        if len < self.len {
            let was = self.len;
            self.zero(len, was - len);
        }
        self.len = len;
    }
}

/// Guest memory.
#[derive(Clone, Debug)]
pub struct Buf(pub Rc<RefCell<Vec<u8>>>);

impl Buf {
    /// Memory that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Rc::new(RefCell::new(bytes)))
    }
}

impl GuestBuf for Buf {
    fn len(&self) -> usize {
        self.0.borrow().len()
    }
    fn is_aligned(&self, at: usize, len: usize, alignment: usize) -> bool {
        at.is_multiple_of(alignment) && len.is_multiple_of(alignment)
    }
    fn zero(&self, at: usize, len: usize) {
        self.0.borrow_mut()[at..at + len].fill(0);
    }
    fn fill(&self, at: usize, from: &[u8]) {
        self.0.borrow_mut()[at..at + from.len()].copy_from_slice(from);
    }
    fn read(&self, at: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.0.borrow()[at..at + to.len()]);
    }
}

/// What a queue's host did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Bytes read from the image file.
    pub bytes_read: u64,
    /// Operations that change the image file.
    pub changes: u64,
    /// All operations.
    pub ops: u64,
}

/// The world of a queue: one image file, a data file, perhaps a base.
pub struct World {
    /// The image file.
    pub image: RefCell<File>,
    /// The data file of images whose header says that they have one: a long hole.
    data: RefCell<File>,
    /// The base.
    pub base: Option<Vec<u8>>,
    /// Counters.
    pub counts: Cell<Counts>,
    pending: RefCell<Vec<(Token, HostOp<Buf>)>>,
    /// Which pending operation ends next: 0 is the oldest.
    pub order: Cell<u64>,
    results: RefCell<Vec<(u64, Result<Reply, Error>)>>,
    /// Writes to the image file are not kept: whoever measures the engine's memory wants no other.
    pub forgets: Cell<bool>,
    now: Cell<u64>,
}

/// The host.
pub struct MemoryHost(pub Rc<World>);

struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

impl Host for MemoryHost {
    type Buf = Buf;
    type Done = u64;

    fn submit(&self, token: Token, op: HostOp<Buf>) {
        self.0.pending.borrow_mut().push((token, op));
    }
    fn done(&self, done: u64, result: Result<Reply, Error>) {
        self.0.results.borrow_mut().push((done, result));
    }
    fn now_ns(&self) -> u64 {
        self.0.now.replace(self.0.now.get() + 1_000_000)
    }
    fn random(&self, to: &mut [u8]) {
        to.fill(0x5a);
    }
    fn set_timer(&self, _: u64) {}
    fn log(&self, _: LogLevel, _: &str) {}
}

impl World {
    /// A world with these files.
    pub fn new(image: File, base: Option<Vec<u8>>) -> Rc<Self> {
        Rc::new(Self {
            image: RefCell::new(image),
            data: RefCell::new(File { len: 1 << 30, ..File::default() }),
            base,
            counts: Cell::default(),
            pending: RefCell::default(),
            order: Cell::new(0),
            results: RefCell::default(),
            forgets: Cell::default(),
            now: Cell::new(0),
        })
    }

    /// A queue of a new image handle in this world.
    pub fn queue(self: &Rc<Self>, config: Config) -> Rc<Queue<MemoryHost>> {
        Queue::new(Image::new(config), MemoryHost(Rc::clone(self)), Box::new(NoWake))
    }

    fn perform(&self, op: &mut HostOp<Buf>) -> i64 {
        let mut counts = self.counts.get();
        counts.ops += 1;
        let base = op.file == FileId::Base;
        if base && self.base.is_none() {
            self.counts.set(counts);
            return ENOMEDIUM;
        }
        let mut file = if op.file == FileId::Data { self.data.borrow_mut() } else { self.image.borrow_mut() };
        let len = if base { self.base.as_ref().map_or(0, Vec::len) as u64 } else { file.len };
        match op.kind {
            OpKind::Read => {
                let mut at = op.offset;
                for segment in &mut op.segments {
                    let n = segment.len();
                    match segment {
                        Segment::Own { buf, at: to, len } if !base && to.is_multiple_of(4096) && len.is_multiple_of(4096) && at.is_multiple_of(PAGE) => {
                            // Without a copy: what is measured is the engine.
                            for (i, page) in buf.pages_mut()[*to / 4096..(*to + *len) / 4096].iter_mut().enumerate() {
                                file.read(at + i as u64 * PAGE, &mut page.0);
                            }
                        }
                        segment => {
                            let mut bytes = vec![0; n];
                            match &self.base {
                                Some(base) if op.file == FileId::Base => {
                                    let from = (at as usize).min(base.len());
                                    let n = n.min(base.len() - from);
                                    bytes[..n].copy_from_slice(&base[from..from + n]);
                                }
                                _ => file.read(at, &mut bytes),
                            }
                            match segment {
                                Segment::Guest { buf, at, .. } => buf.fill(*at, &bytes),
                                Segment::Own { buf, at, .. } => buf.write(*at, &bytes),
                            }
                        }
                    }
                    at += n as u64;
                }
                counts.bytes_read += if base { 0 } else { op.len };
            }
            kind if self.forgets.get() && !matches!(kind, OpKind::Flush | OpKind::GetLength | OpKind::BaseStatus) => counts.changes += 1,
            OpKind::Write { .. } => {
                let mut at = op.offset;
                for segment in &op.segments {
                    match segment {
                        Segment::Guest { buf, at: from, len } => file.write(at, &buf.0.borrow()[*from..*from + *len]),
                        Segment::Own { buf, at: from, len } => buf.for_each(*from, *len, |i, piece| file.write(at + i as u64, piece)),
                    }
                    at += segment.len() as u64;
                }
                counts.changes += 1;
            }
            OpKind::WriteZeroes { .. } | OpKind::ZeroCheaply | OpKind::Discard => {
                file.zero(op.offset, op.len);
                counts.changes += 1;
            }
            OpKind::Truncate => {
                file.resize(op.offset);
                counts.changes += 1;
            }
            OpKind::Flush => {}
            OpKind::GetLength => {
                self.counts.set(counts);
                return len as i64;
            }
            OpKind::BaseStatus => {
                self.counts.set(counts);
                return op.len.min(len.saturating_sub(op.offset).max(1)) as i64 | STATUS_DATA;
            }
        }
        self.counts.set(counts);
        0
    }

    /// Runs until nothing is left to do.
    pub fn drain(&self, queue: &Rc<Queue<MemoryHost>>) {
        loop {
            queue.run();
            let count = self.pending.borrow().len() as u64;
            if count == 0 {
                break;
            }
            let pick = (self.order.get() % count) as usize;
            self.order.set(self.order.get() / 3);
            let (token, mut op) = self.pending.borrow_mut().remove(pick);
            let ret = self.perform(&mut op);
            assert!(queue.complete(token, ret, op), "the engine knows its operations");
        }
        assert!(queue.is_idle(), "a request waits for nothing");
    }

    /// One request, to its end.
    pub fn request(&self, queue: &Rc<Queue<MemoryHost>>, request: Request<Buf>) -> Result<Reply, Error> {
        queue.submit(request, 0);
        self.drain(queue);
        let mut results = self.results.borrow_mut();
        assert_eq!(results.len(), 1, "a request ends once");
        results.pop().expect("one").1
    }
}

/// An image that inputs start from.
pub struct Template {
    /// The image file.
    pub file: File,
    /// Its base.
    pub base: Option<Vec<u8>>,
    /// Its header.
    pub header: Header,
}

/// Number of templates.
pub const TEMPLATES: usize = 6;

/// The header that counts.
pub fn header_of(file: &File) -> Header {
    let zero = PageZero::decode(&file.page(0)).expect("a sound image");
    Header::choose(&zero.uuid, &file.page(HEADER_OFFSETS[0]), &file.page(HEADER_OFFSETS[1])).expect("a sound image")
}

/// A closed image, one after a cut with a batch in its area and commits in its journal, one nothing
/// was ever written to, and one without base; a compact one after a cut, and one closed.
pub fn templates() -> &'static [Template; TEMPLATES] {
    static MADE: OnceLock<[Template; TEMPLATES]> = OnceLock::new();
    MADE.get_or_init(|| {
        let make = |base: Option<&[u8]>, sessions: u64, cut: bool, compact: bool| {
            let params = CreateParams {
                virtual_size: Some(1 << 20),
                block_size: if base.is_some() { 4096 } else { 0 },
                journal_size: 1 << 20,
                base_name: base.map_or(String::new(), |_| "base".into()),
                base_format: base.map_or(String::new(), |_| "raw".into()),
                compact,
                chunk_size: if compact { 64 << 10 } else { 0 },
                storage_grow_unit: if compact { 128 << 10 } else { 0 },
                ..CreateParams::default()
            };
            let base = base.map(<[u8]>::to_vec);
            let world = World::new(File::default(), base.clone());
            world.request(&world.queue(Config::default()), Request::Create(Box::new(params))).expect("creation");
            for session in 0..sessions {
                let queue = world.queue(Config::default());
                world.request(&queue, Request::Open).expect("open");
                for i in 0..4 {
                    let offset = (session * 9 + i * if compact { 30 } else { 2 }) * 4096 + 512;
                    world.request(&queue, Request::Write { offset, buf: Buf::new(vec![7; 700]), fua: true }).expect("write");
                }
                if !(cut && session + 1 == sessions) {
                    world.request(&queue, Request::Close).expect("close");
                }
            }
            let file = world.image.borrow().clone();
            let header = header_of(&file);
            Template { file, base, header }
        };
        let base: Vec<u8> = (0..300_000u32).map(|i| (i / 512) as u8 | 1).collect();
        [
            make(Some(&base), 2, false, false),
            make(Some(&base), 3, true, false),
            make(None, 0, false, false),
            make(None, 1, true, false),
            make(Some(&base), 3, true, true),
            make(None, 2, false, true),
        ]
    })
}
