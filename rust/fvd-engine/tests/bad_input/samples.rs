// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images to damage, and the two questions asked of a damaged one.

use crate::common::sim::*;
use crate::common::*;
use fvd_engine::host::OpKind;
use fvd_engine::{Config, Kind, Reply, Request};
use fvd_format::{Header, PageZero, RegionKind};

pub const BLOCK: u64 = 4096;
pub const SIZE: u64 = 256 * KIB;

/// An image and what its disk holds.
#[derive(Clone)]
pub struct Sample {
    pub name: &'static str,
    pub bytes: Store,
    pub base: Vec<u8>,
    /// As the guest must see it.
    pub data: Vec<u8>,
    /// As it was before the last commit, which rot can take away as a cut could have.
    pub older: Option<Vec<u8>>,
    pub header: Header,
}

impl Sample {
    fn new(name: &'static str, bytes: Store, base: &[u8], data: &[u8]) -> Self {
        let header = header_of(&bytes);
        Self { name, bytes, base: base.to_vec(), data: data.to_vec(), older: None, header }
    }

    /// Byte ranges of the metadata that is in use, and a little of what is not.
    pub fn structures(&self) -> Vec<(&'static str, u64, u64)> {
        let region = |kind| *self.header.region(kind).unwrap();
        let journal = region(RegionKind::Journal);
        let area = region(RegionKind::DoubleWrite);
        let used = journal.offset + self.header.first_seq % journal.pages() * 4096;
        vec![
            ("page 0", 0, 4096),
            ("header copy 1", 4096, 4096),
            ("header copy 2", 128 << 10, 4096),
            ("page map", region(RegionKind::PageMap).offset, 4096),
            ("bitmap", region(RegionKind::Bitmap).offset, 4096),
            ("double-write area", area.offset, 4 * 4096),
            ("journal", used, 7 * 4096),
        ]
    }
}

pub fn header_of(bytes: &Store) -> Header {
    let page = |at| {
        let mut page = vec![0; 4096];
        bytes.read(at, &mut page);
        page
    };
    let zero = PageZero::decode(&page(0)).unwrap();
    Header::choose(&zero.uuid, &page(4096), &page(128 << 10)).unwrap()
}

/// Writes `header` to both copies, with right checksums, whatever it says.
pub fn with_header(sample: &Sample, change: impl FnOnce(&mut Header)) -> Store {
    let mut header = sample.header.clone();
    change(&mut header);
    let mut bytes = sample.bytes.clone();
    for (copy, at) in [(1, 4096), (2, 128 << 10)] {
        bytes.write(at, &header.encode(copy));
    }
    bytes
}

fn base() -> Vec<u8> {
    base_image(SIZE / 512)
}

fn session(sim: &Sim, data: &mut [u8], first: u64, count: u64) {
    for i in first..first + count {
        let at = i * 2 * BLOCK + 512;
        sim.write(at, vec![i as u8 + 1; 2000]);
        data[at as usize..at as usize + 2000].fill(i as u8 + 1);
        sim.flush();
    }
}

/// Closed in good order; pages in place, from two sessions.
pub fn closed() -> Sample {
    let mut data = base();
    let sim = Sim::new(over_base(SIZE), Some(base()));
    session(&sim, &mut data, 0, 5);
    let sim = Sim::open(&sim.close(), Some(base()));
    session(&sim, &mut data, 5, 5);
    let bytes = sim.close();
    Sample::new("closed", bytes, &base(), &data)
}

/// After a cut, with pages in place and six commits in the journal.
pub fn cut() -> Sample {
    let mut data = closed().data;
    let sim = Sim::open(&closed().bytes, Some(base()));
    session(&sim, &mut data, 12, 5);
    let older = data.clone();
    session(&sim, &mut data, 17, 1);
    let mut sample = Sample::new("cut", sim.crash(), &base(), &data);
    sample.older = Some(older);
    sample
}

/// After a cut in a checkpoint: the area is whole, the page in place is half new.
pub fn torn() -> Sample {
    let sample = cut();
    let sim = Sim::open(&closed().bytes, Some(base()));
    let mut data = closed().data;
    session(&sim, &mut data, 12, 5);
    session(&sim, &mut data, 17, 1);
    let before = sim.world.disk.borrow().stable.clone();
    sim.queue.submit(Request::Close, 1);
    let bitmap = sample.header.region(RegionKind::Bitmap).unwrap().offset;
    // Up to the write in place.
    while !sim.world.trace.borrow().iter().any(|t| matches!(t.kind, OpKind::Write { .. }) && t.offset == bitmap) {
        assert!(sim.world.step(&sim.queue));
        sim.queue.run();
    }
    let (mut stable, view) = (sim.world.disk.borrow().stable.clone(), sim.world.disk.borrow().view.clone());
    std::mem::forget(sim.queue);
    let mut page = vec![0; 4096];
    before.read(bitmap, &mut page);
    let mut new = vec![0; 4096];
    view.read(bitmap, &mut new);
    // More than the promised tear: bytes of neither.
    page[..512].copy_from_slice(&new[..512]);
    page[1024..1536].fill(0xaa);
    stable.write(bitmap, &page);
    let mut sample = Sample::new("torn", stable, &base(), &data);
    // The journal still holds it all, but the page cannot be read without the area.
    sample.older = None;
    sample
}

/// What an open of a damaged image led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Open failed.
    Refused(Kind),
    /// Everything reads right.
    Right,
    /// Some reads failed, the others are right.
    Partly,
    /// Something reads wrong: at this byte.
    Wrong(usize),
    /// As it was before the last commit.
    Older,
}

/// Opens, reads everything block by block, uses the image a little, closes. Panics pass through.
pub fn ask(bytes: &Store, sample: &Sample, read_only: bool) -> Outcome {
    let config = Config { read_only, metadata_memory: 16 << 20, ..Config::default() };
    let world = World::new(bytes.clone(), Some(sample.base.clone()), 5, limits(1));
    let queue = world.queue(config);
    if let Err(error) = world.request(&queue, Request::Open).unwrap() {
        assert!(!error.text.is_empty());
        assert!(!queue.image().is_poisoned(), "{error}");
        return Outcome::Refused(error.kind);
    }
    let size = queue.image().info().unwrap().header.virtual_size;
    let sim = Sim { world, queue };
    let mut outcome = Outcome::Right;
    let mut older = sample.older.is_some();
    // At once where that works: most images are.
    let right = sim.try_read(0, SIZE).is_ok_and(|found| found == sample.data);
    for at in (0..if right { 0 } else { SIZE }).step_by(BLOCK as usize) {
        match sim.try_read(at, BLOCK) {
            Ok(found) => {
                let range = at as usize..(at + BLOCK) as usize;
                older &= sample.older.as_ref().is_some_and(|o| o[range.clone()] == found);
                if let Some(i) = (0..found.len()).find(|&i| found[i] != sample.data[range.start + i])
                    && !matches!(outcome, Outcome::Wrong(_))
                {
                    outcome = Outcome::Wrong(range.start + i);
                }
            }
            Err(error) => {
                assert!(matches!(error.kind, Kind::Corrupt | Kind::OutOfRange | Kind::NoMemory | Kind::Host(_)), "{error:?}");
                if outcome == Outcome::Right {
                    outcome = Outcome::Partly;
                }
            }
        }
    }
    if older && matches!(outcome, Outcome::Wrong(_)) {
        outcome = Outcome::Older;
    }
    let _ = sim.ask(Request::BlockStatus { offset: 0, len: size.clamp(1, SIZE) });
    assert!(matches!(sim.ask(Request::Check { repair: fvd_engine::Repair::None }), Ok(Reply::Check(_)) | Err(_)));
    if !read_only && sim.ask(Request::Write { offset: 3 * BLOCK + 7, buf: Buf::new(vec![0xaa; 30]), fua: true }).is_ok() {
        assert_eq!(sim.read(3 * BLOCK + 7, 30), vec![0xaa; 30]);
    }
    match sim.ask(Request::Close) {
        Ok(_) => {}
        // The engine catches its own panics and poisons the image: here that is one all the same.
        Err(error) => assert!(!read_only && !sim.queue.image().is_poisoned(), "{error:?}"),
    }
    if read_only {
        assert_eq!(sim.world.counts.borrow().writes, 0, "a read-only open writes nothing");
    }
    outcome
}

/// The same; a panic, the engine's own included, is an error with its text.
pub fn tried(bytes: &Store, sample: &Sample, read_only: bool) -> Result<Outcome, String> {
    caught(|| ask(bytes, sample, read_only))
}

/// Fails with the first of these findings.
#[track_caller]
pub fn none(wrong: &[String]) {
    assert!(wrong.is_empty(), "{} findings:\n{}", wrong.len(), wrong[..wrong.len().min(25)].join("\n"));
}

#[test]
fn the_samples_are_what_they_say() {
    for sample in [closed(), cut(), torn()] {
        for read_only in [true, false] {
            assert_eq!(ask(&sample.bytes, &sample, read_only), Outcome::Right, "{}", sample.name);
        }
        assert_eq!(sample.header.clean, sample.name == "closed");
    }
    // Without the area the torn page is damage: the area is needed.
    let sample = torn();
    let mut bytes = sample.bytes.clone();
    bytes.write(sample.header.region(RegionKind::DoubleWrite).unwrap().offset, &[0; 4096]);
    assert!(matches!(ask(&bytes, &sample, false), Outcome::Refused(Kind::Corrupt) | Outcome::Partly));
}
