// SPDX-License-Identifier: MIT OR Apache-2.0
//! A hostile image: opened read-only and writable, used, closed, opened again.

use crate::heap;
use crate::input::Input;
use crate::memory::*;
use crate::patch::*;
use fvd_engine::host::Limits;
use fvd_engine::{Config, Kind, Queue, Reply, Request};
use fvd_format::header::HEADER_OFFSETS;
use fvd_format::{Header, PageZero, RegionKind};
use std::rc::Rc;

/// Most bytes one request moves.
const MOST: u64 = 16 << 10;
/// Pages of a region, or units of the journal, that patches reach.
const NEAR: u64 = 24;

/// Which checksums are put right after the patches.
struct Seals(u8);

impl Seals {
    fn has(&self, bit: u8) -> bool {
        self.0 >> bit & 1 == 0
    }
}

/// Byte 0: the template, byte 1: which checksums stay as they are. Patches (a structure, a place in
/// it, bytes) up to a structure of 15; then requests.
pub fn image_open(data: &[u8]) {
    let mut input = Input::new(data);
    let template = &templates()[usize::from(input.u8()) % TEMPLATES];
    let seals = Seals(input.u8());
    let mut file = template.file.clone();
    apply_patches(&mut input, &mut file, &template.header);
    seal(&mut file, &template.header, &seals);
    let config = |read_only| Config { read_only, metadata_memory: 8 << 20, checkpoint_after: 6, ..Config::default() };
    let align = 1 << (seals.0 >> 6) * 4;
    let config = |read_only| {
        let mut config = config(read_only);
        config.limits[0] = Limits { request_alignment: align, ..Limits::default() };
        config
    };
    for read_only in [true, false] {
        // What only the limit on metadata memory would stop, must be little as well.
        let most = Config { metadata_memory: Config::default().metadata_memory, ..config(read_only) };
        memory_of_an_open(&World::new(file.clone(), template.base.clone()), most);
    }
    let reader = Open::new(World::new(file.clone(), template.base.clone()), config(true));
    let writer = Open::new(World::new(file, template.base.clone()), config(false));
    let Some(writer) = writer else {
        if let Some(reader) = reader {
            reader.probe(&mut Input::new(&[]));
            reader.finish_reader();
        }
        return;
    };
    // A writable open is no laxer than a read-only one, and both see one disk.
    let reader = reader.expect("what opens writable opens read-only");
    for i in 0..8 {
        let at = i * 8192 + 256;
        if let (Ok(one), Ok(two)) = (reader.read(at, 900), writer.read(at, 900)) {
            assert_eq!(one, two, "byte {at}: recovery in memory and on disk differ");
        }
    }
    reader.finish_reader();
    writer.world.order.set(input.u64());
    let written = writer.work(&mut input);
    let world = Rc::clone(&writer.world);
    let closed = writer.request(Request::Close);
    writer.sound();
    if closed.is_err() {
        return;
    }
    let again = Open::new(world, config(false)).expect("what was closed in good order opens");
    // A table that names a chunk twice gives two guest chunks one content.
    let sound = matches!(again.request(Request::Check { repair: fvd_engine::Repair::None }), Ok(Reply::Check(report)) if report.corruptions == 0);
    for (at, bytes) in written.into_iter().filter(|_| sound || !template.header.is_compact()) {
        if let Ok(found) = again.read(at, bytes.len() as u64) {
            assert_eq!(found, bytes, "byte {at}: what was written and closed");
        }
    }
    let _ = again.request(Request::Close);
    again.sound();
}

/// Opening takes at most 64 MiB or 1.5 × the metadata that is really in the file, whichever is more.
fn memory_of_an_open(world: &Rc<World>, config: Config) {
    let present = world.image.borrow().pages.len() * 4096;
    world.forgets.set(true);
    let read_only = config.read_only;
    let (_queue, peak) = heap::peak_of(|| {
        let queue = world.queue(config);
        let _ = world.request(&queue, Request::Open);
        queue
    });
    let most = (present * 3 / 2).max(64 << 20);
    assert!(peak <= most, "an open (read-only: {read_only}) takes {peak} bytes of memory; {present} are in the file");
}

/// Patches of structures, at a place and with bytes from the input.
fn apply_patches(input: &mut Input<'_>, file: &mut File, header: &Header) {
    let start = |kind| header.region(kind).map_or(0, |r| r.offset);
    while !input.is_empty() {
        let what = input.u8();
        let (kind, n) = (what & 15, usize::from(what >> 4) + 1);
        let (offset, pages) = match kind {
            0 => (HEADER_OFFSETS[0], 1),
            1 => (HEADER_OFFSETS[1], 1),
            // Both copies: an update that finished.
            2 => (HEADER_OFFSETS[0], 1),
            3 => (0, 1),
            4 => (start(RegionKind::PageMap), 1),
            5 => (start(RegionKind::Bitmap), 2),
            6 => (start(RegionKind::DoubleWrite), 4),
            8 if header.is_compact() => (start(RegionKind::Table), 1),
            7 | 8 => (start(RegionKind::Journal), NEAR),
            9 => {
                file.resize(input.number() % (1 << 40));
                continue;
            }
            10 => {
                // A field of the header, as a number.
                let (at, value) = (usize::from(input.u16()) % 4088, input.number().to_le_bytes());
                for copy in HEADER_OFFSETS {
                    put(file, copy, at & !7, &value);
                }
                continue;
            }
            _ => return,
        };
        let page = if pages == 1 { 0 } else { u64::from(input.u8()) % pages };
        let (at, bytes) = (usize::from(input.u16()) % 4096, input.bytes(n));
        put(file, offset + page * 4096, at, bytes);
        if kind == 2 {
            put(file, HEADER_OFFSETS[1], at, bytes);
        }
    }
}

fn put(file: &mut File, page: u64, at: usize, bytes: &[u8]) {
    let mut content = file.page(page);
    let n = bytes.len().min(4096 - at);
    content[at..at + n].copy_from_slice(&bytes[..n]);
    file.set_page(page, &content);
}

/// Right checksums wherever `seals` says so, by what the patched header says.
fn seal(file: &mut File, old: &Header, seals: &Seals) {
    let edit = |file: &mut File, at: u64, f: &dyn Fn(&mut [u8; 4096])| {
        let mut page = file.page(at);
        f(&mut page);
        file.set_page(at, &page);
    };
    if seals.has(0) {
        edit(file, 0, &seal_page_zero);
    }
    let uuid = PageZero::decode(&file.page(0)).map_or(old.uuid, |zero| zero.uuid);
    if seals.has(1) {
        for (i, at) in HEADER_OFFSETS.into_iter().enumerate() {
            edit(file, at, &|page| seal_header(&uuid, i + 1, page));
        }
    }
    let header = Header::choose(&uuid, &file.page(HEADER_OFFSETS[0]), &file.page(HEADER_OFFSETS[1])).unwrap_or_else(|_| old.clone());
    if seals.has(2) {
        for kind in [RegionKind::PageMap, RegionKind::Bitmap, RegionKind::Table] {
            let Some(region) = header.region(kind) else { continue };
            for index in 0..region.pages().min(NEAR) {
                let at = region.offset + index * 4096;
                if file.pages.contains_key(&(at / 4096)) {
                    edit(file, at, &|page| seal_page(&uuid, kind, index, page));
                }
            }
        }
    }
    if let Some(area) = header.region(RegionKind::DoubleWrite).filter(|_| seals.has(3)) {
        seal_area(file, &uuid, area.offset);
    }
    if let Some(journal) = header.region(RegionKind::Journal).filter(|_| seals.has(4)) {
        let place = |i: u64| journal.offset + (header.first_seq + i) % journal.pages() * 4096;
        let mut units: Vec<Page> = (0..journal.pages().min(NEAR)).map(|i| Box::new(file.page(place(i)))).collect();
        seal_journal(&uuid, &mut units);
        for (i, unit) in units.iter().enumerate().filter(|(_, unit)| unit[4..].iter().any(|&b| b != 0)) {
            file.set_page(place(i as u64), unit);
        }
    }
}

/// The pages of the double-write area, then the head that lists their checksums.
fn seal_area(file: &mut File, uuid: &fvd_format::Uuid, area: u64) {
    let mut head = file.page(area);
    let count = (fvd_format::codec::get_u32(&head, 4) as usize).min(8);
    for i in 0..count {
        let at = area + (i as u64 + 1) * 4096;
        let (Some(kind), index) = batch_entry(&head, i) else { continue };
        let mut page = file.page(at);
        seal_page(uuid, kind, index, &mut page);
        file.set_page(at, &page);
        fvd_format::codec::put_u32(&mut head, 32 + 16 * i + 4, fvd_format::page::stored_crc(&page));
    }
    seal_batch(uuid, &mut head);
    file.set_page(area, &head);
}

/// An open image.
struct Open {
    world: Rc<World>,
    queue: Rc<Queue<MemoryHost>>,
}

impl Open {
    /// `None` where the image is refused, for a reason that has a text.
    fn new(world: Rc<World>, config: Config) -> Option<Self> {
        let read_only = config.read_only;
        let queue = world.queue(config);
        let before = world.counts.get().changes;
        let result = world.request(&queue, Request::Open);
        let open = Self { world, queue };
        open.sound();
        if read_only {
            assert_eq!(open.world.counts.get().changes, before, "a read-only open changes nothing");
        }
        match result {
            Ok(_) => Some(open),
            Err(error) => {
                assert!(!error.text.is_empty());
                assert!(!matches!(error.kind, Kind::Poisoned | Kind::State | Kind::Host(_)), "{error:?}");
                None
            }
        }
    }

    /// No panic was caught: nothing else poisons where no operation fails.
    fn sound(&self) {
        if self.queue.image().is_poisoned() {
            let why = self.world.request(&self.queue, Request::Flush);
            panic!("the engine poisoned the image: {why:?}");
        }
    }

    fn request(&self, request: Request<Buf>) -> Result<Reply, fvd_engine::Error> {
        let result = self.world.request(&self.queue, request);
        self.sound();
        result
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, fvd_engine::Error> {
        let buf = Buf::new(vec![0xee; len as usize]);
        self.request(Request::Read { offset, buf: buf.clone() }).map(|_| buf.0.take())
    }

    /// Requests that change nothing.
    fn probe(&self, input: &mut Input<'_>) {
        let offset = input.number();
        let _ = self.read(offset, MOST);
        let _ = self.request(Request::Check { repair: fvd_engine::Repair::None });
        if let Ok(Reply::Status(status)) = self.request(Request::BlockStatus { offset, len: input.number().max(1) }) {
            assert!(status.len > 0);
        }
    }

    fn finish_reader(&self) {
        let before = self.world.counts.get().changes;
        assert!(self.request(Request::Write { offset: 0, buf: Buf::new(vec![1; 512]), fua: false }).is_err());
        self.request(Request::Close).expect("closing what was only read");
        assert_eq!(self.world.counts.get().changes, before);
    }

    /// Requests from the input. Returns ranges that were written last, not overwritten since.
    fn work(&self, input: &mut Input<'_>) -> Vec<(u64, Vec<u8>)> {
        let mut written: Vec<(u64, Vec<u8>)> = Vec::new();
        let forget = |written: &mut Vec<(u64, Vec<u8>)>, offset: u64, len: u64| {
            written.retain(|(at, bytes)| at + bytes.len() as u64 <= offset || offset.saturating_add(len) <= *at);
        };
        for _ in 0..40 {
            if input.is_empty() {
                break;
            }
            let (op, offset) = (input.u8(), input.number());
            let len = input.number() % MOST + 1;
            let fua = op & 16 != 0;
            match op & 7 {
                0 | 1 => {
                    let bytes = vec![op; len as usize];
                    forget(&mut written, offset, len);
                    if self.request(Request::Write { offset, buf: Buf::new(bytes.clone()), fua }).is_ok() {
                        assert_eq!(self.read(offset, len), Ok(bytes.clone()), "a write is read");
                        written.push((offset, bytes));
                    }
                }
                2 => {
                    forget(&mut written, offset, len);
                    let request = Request::WriteZeroes { offset, len, may_unmap: op & 32 != 0, fua };
                    if self.request(request).is_ok() {
                        assert_eq!(self.read(offset, len), Ok(vec![0; len as usize]), "zeroes are read");
                        written.push((offset, vec![0; len as usize]));
                    }
                }
                3 => {
                    forget(&mut written, offset, len);
                    let _ = self.request(Request::Discard { offset, len });
                }
                4 => {
                    let _ = self.request(Request::Flush);
                }
                5 => {
                    let _ = self.request(Request::Resize { size: offset & !511, zeroed: fua });
                }
                6 => self.probe(input),
                _ => {
                    let name = if fua { "other" } else { "" };
                    let format = if op & 32 != 0 { "raw" } else { "" };
                    let _ = self.request(Request::ChangeBase { name: name.into(), format: format.into() });
                }
            }
        }
        written
    }
}
