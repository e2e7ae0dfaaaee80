// SPDX-License-Identifier: MIT OR Apache-2.0
//! The copying itself, on one thread. Pieces are read many at a time and written in the order of the
//! disk: a compact image gives storage in the order of the writes, and neighbours shall be neighbours.

use super::end::{Done, End};
use super::{Converted, Step};
use crate::iovec::IoVecBuf;
use fvd_engine::host::{Page, STATUS_DATA};
use fvd_engine::{Error, Kind, Place, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Most bytes that are read and written at once; no piece crosses a multiple of it.
pub(super) const PIECE: u64 = 1 << 20;
/// Pieces under way at once.
const SLOTS: usize = 16;
/// Most bytes that are zeroed, or asked about, at once.
const STEP: u64 = 1 << 30;
/// Pieces begin and end at multiples of this, and at the end of the disk: direct I/O needs no more.
const ALIGNMENT: u64 = 4096;
/// How often the caller is told how far the copy is.
const TICK: Duration = Duration::from_millis(200);

/// What is known before copying.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Bytes of the disk.
    pub size: u64,
    /// See [`super::Target::sparse`].
    pub sparse: u64,
    /// What is not written reads as zero in the target.
    pub zeroed: bool,
    /// Copy-on-write unit of a target with a base, in bytes; 0: it has none.
    pub block: u64,
    /// Allocation unit of a compact target, in bytes; 0: it is not compact.
    pub chunk: u64,
    /// Source and target have the very same base.
    pub same_base: bool,
}

impl Plan {
    /// The unit in which content is judged: bytes.
    fn unit(&self) -> usize {
        // A block of which one sector is written costs a whole block.
        match self.block.max(self.sparse) {
            0 => PIECE as usize,
            unit => unit.min(PIECE) as usize,
        }
    }

    /// Where a write that begins at `at` and could go on to `end` should end: within the chunk, if others
    /// may be writing to that. It would wait for them, and whatever comes behind it get storage first.
    fn cut(&self, at: u64, end: u64) -> u64 {
        if self.chunk == 0 || at.is_multiple_of(self.chunk) { end } else { end.min(at.next_multiple_of(self.chunk)) }
    }
}

/// What becomes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// It is read, looked at, and written.
    Data,
    /// It is zeroed.
    Zero,
    /// The target reads so already.
    Skip,
}

/// Requests of one slot that are under way, shared with their callbacks.
type Count = Rc<Cell<usize>>;

/// What callbacks of all slots share.
#[derive(Default)]
struct Shared {
    under_way: Cell<usize>,
    /// Callbacks so far.
    called: Cell<u64>,
    /// The first error.
    failed: RefCell<Option<Error>>,
}

/// One piece on its way.
struct Slot {
    /// The source's bytes, and the target's where it has a base. The pages stay in place, and nothing
    /// here refers to them, while `count` > 0.
    data: Box<[Page]>,
    base: Box<[Page]>,
    /// Lists for requests under way: not changed while `count` > 0.
    iov: Vec<libc::iovec>,
    at: u64,
    len: u64,
    /// `Data` or `Zero`.
    what: What,
    count: Count,
}

/// See the module's text.
pub(super) struct Copier {
    from: End,
    to: End,
    plan: Plan,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Slots whose content is being read, in the order of the disk.
    reading: VecDeque<usize>,
    writing: Vec<usize>,
    shared: Rc<Shared>,
    /// `Shared::called` when this last looked.
    seen: u64,
    /// Everything before this has been looked at.
    at: u64,
    /// What `at` up to `run_end` is.
    run: What,
    run_end: u64,
    done: u64,
    written: u64,
    begin: Instant,
    next_tick: Duration,
}

impl Drop for Copier {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.from.quiesce();
            self.to.quiesce();
            return;
        }
        self.drain();
        // A copy that failed: nobody wants what the engine still has to do.
        for end in [&self.from, &self.to] {
            if let End::Fvd(disk) = end {
                disk.queue.abandon();
            }
        }
    }
}

impl Copier {
    pub fn new(from: End, to: End, mut plan: Plan) -> Self {
        if plan.sparse > 0 {
            plan.sparse = plan.sparse.max(to.granule());
        }
        Self {
            from,
            to,
            plan,
            slots: Vec::new(),
            free: Vec::new(),
            reading: VecDeque::new(),
            writing: Vec::new(),
            shared: Rc::default(),
            seen: 0,
            at: 0,
            run: What::Skip,
            run_end: 0,
            done: 0,
            written: 0,
            begin: Instant::now(),
            next_tick: TICK,
        }
    }

    /// Copies all of the disk. The target still has to be synced.
    pub fn run(&mut self, tick: &mut dyn FnMut(Step) -> bool) -> Result<Converted> {
        let pages = if self.plan.block > 0 { PIECE / 4096 } else { 0 } as usize;
        for number in 0..SLOTS {
            let fresh = |pages: usize| std::iter::repeat_with(|| Page([0; 4096])).take(pages).collect();
            let slot = Slot { data: fresh((PIECE / 4096) as usize), base: fresh(pages), iov: Vec::new(), at: 0, len: 0, what: What::Skip, count: Count::default() };
            self.slots.push(slot);
            self.free.push(number);
        }
        loop {
            self.retire();
            self.write_what_was_read();
            while !self.free.is_empty() && self.start_next(tick)? {}
            if self.reading.is_empty() && self.writing.is_empty() {
                return Ok(Converted { size: self.plan.size, written: self.written });
            }
            self.drive(tick)?;
        }
    }

    /// Closes a target that is an FVD image, in good order.
    pub fn close_target(&mut self) -> Result<()> {
        let End::Fvd(disk) = &self.to else { return Ok(()) };
        disk.finish()
    }

    /// A callback that counts for `count`; `what` was done at byte `at` of the image at `end`.
    fn expect<T: 'static>(&self, end: &End, what: &'static str, at: u64, count: &Count, then: impl FnOnce(T) + 'static) -> Done<T> {
        let (shared, count, path) = (Rc::clone(&self.shared), Rc::clone(count), end.path().to_owned());
        count.set(count.get() + 1);
        shared.under_way.set(shared.under_way.get() + 1);
        Box::new(move |result| {
            count.set(count.get() - 1);
            shared.under_way.set(shared.under_way.get() - 1);
            shared.called.set(shared.called.get() + 1);
            match result {
                Ok(value) => then(value),
                Err(error) => {
                    let error = error.context(&format!("{what} '{}' at byte {at}", path.display()));
                    shared.failed.borrow_mut().get_or_insert(error);
                }
            }
        })
    }

    /// Slots whose writes are done are free again.
    fn retire(&mut self) {
        for i in (0..self.writing.len()).rev() {
            let number = self.writing[i];
            if self.slots[number].count.get() == 0 {
                self.writing.swap_remove(i);
                self.free.push(number);
                self.done += self.slots[number].len;
            }
        }
    }

    /// Writes what was read, as far as nothing that comes before it is missing.
    fn write_what_was_read(&mut self) {
        while let Some(&number) = self.reading.front() {
            if self.slots[number].count.get() > 0 || self.shared.failed.borrow().is_some() {
                return;
            }
            self.reading.pop_front();
            self.writing.push(number);
            self.write(number);
        }
    }

    /// Takes on the next piece of the disk; false at its end.
    fn start_next(&mut self, tick: &mut dyn FnMut(Step) -> bool) -> Result<bool> {
        loop {
            if self.at == self.plan.size {
                return Ok(false);
            }
            if self.at == self.run_end {
                self.look_ahead(tick)?;
            }
            if self.run != What::Skip {
                break;
            }
            self.done += self.run_end - self.at;
            self.at = self.run_end;
        }
        let step = if self.run == What::Zero { STEP } else { PIECE };
        let end = self.plan.cut(self.at, self.run_end.min((self.at / step + 1) * step));
        let number = self.free.pop().expect("a free slot: checked by the caller");
        let slot = &mut self.slots[number];
        (slot.at, slot.len, slot.what) = (self.at, end - self.at, self.run);
        self.at = end;
        self.reading.push_back(number);
        if self.run == What::Data {
            self.read(number);
        }
        Ok(true)
    }

    /// Finds out what begins at `at`.
    fn look_ahead(&mut self, tick: &mut dyn FnMut(Step) -> bool) -> Result<()> {
        let (at, size) = (self.at, self.plan.size);
        let ask = (size - at).min(STEP);
        let (mut what, mut len) = (What::Data, ask);
        if self.plan.same_base
            && let End::Fvd(disk) = &self.from
        {
            let status = disk.status(at, ask).map_err(|error| error.context(&format!("reading '{}' at byte {at}", self.from.path().display())))?;
            if status.place == Place::Base {
                what = What::Skip;
            }
            len = status.len;
        }
        if what == What::Data && self.plan.sparse > 0 {
            let (zero, n) = self.status(true, at, len, tick)?;
            (what, len) = (if zero { What::Zero } else { What::Data }, n);
        }
        if what == What::Zero && self.plan.zeroed {
            what = What::Skip;
        }
        if what == What::Zero && self.plan.block > 0 {
            // Where the base is known to have zeroes too there is nothing to do; else it may have all the same.
            let (zero, n) = self.status(false, at, len, tick)?;
            (what, len) = (if zero { What::Skip } else { What::Data }, n);
        }
        let mut end = at + len;
        if end < size && what != What::Data {
            end = end / ALIGNMENT * ALIGNMENT;
            if end <= at {
                // What else is in there is found by reading it.
                what = What::Data;
            }
        }
        if what == What::Data {
            end = end.max(at + 1).next_multiple_of(ALIGNMENT).min(size);
        }
        (self.run, self.run_end) = (what, end);
        Ok(())
    }

    /// Whether `at` is known to read as zero in the source, or the target, and for how many of `len`
    /// bytes that answer holds.
    fn status(&mut self, source: bool, at: u64, len: u64, tick: &mut dyn FnMut(Step) -> bool) -> Result<(bool, u64)> {
        let end = if source { &self.from } else { &self.to };
        let answer: Rc<Cell<i64>> = Rc::new(Cell::new(0));
        let (slot, count) = (Rc::clone(&answer), Count::default());
        end.status(at, len, self.expect(end, "looking at", at, &count, move |status| slot.set(status)));
        while count.get() > 0 {
            self.drive(tick)?;
        }
        self.check_failed()?;
        let status = answer.get();
        let n = (status & !STATUS_DATA) as u64;
        assert!((1..=len).contains(&n), "a status of {n} bytes where {len} were asked for");
        Ok((status & STATUS_DATA == 0, n))
    }

    /// Starts to read the piece in a slot, from both ends if they are to be compared.
    fn read(&mut self, number: usize) {
        let granule = self.from.granule();
        let compare = self.plan.block > 0;
        let slot = &mut self.slots[number];
        let entry = |pages: &mut Box<[Page]>, len: u64| libc::iovec { iov_base: pages.as_mut_ptr().cast(), iov_len: len as usize };
        slot.iov.clear();
        slot.iov.push(entry(&mut slot.data, slot.len.next_multiple_of(granule)));
        if compare {
            slot.iov.push(entry(&mut slot.base, slot.len));
        }
        let slot = &self.slots[number];
        for (i, end) in [&self.from, &self.to].into_iter().take(slot.iov.len()).enumerate() {
            let done = self.expect(end, "reading", slot.at, &slot.count, |()| ());
            // SAFETY: list and pages stay in the slot, which nobody touches while `count` > 0; `drain`
            // or `quiesce` waits for that before they are dropped.
            let buf = unsafe { IoVecBuf::new(&slot.iov[i], 1) }.expect("a piece fits an address space");
            end.read(slot.at, buf, done);
        }
    }

    /// Starts to write the piece in a slot.
    fn write(&mut self, number: usize) {
        let (plan, granule) = (self.plan, self.to.granule());
        let slot = &mut self.slots[number];
        slot.iov.clear();
        // The end of the disk may lie within what the storage takes.
        let (len, padded) = (slot.len as usize, slot.len.next_multiple_of(granule) as usize);
        let mut runs = vec![(0, padded, What::Zero)];
        if slot.what == What::Data {
            let data = bytes_mut(&mut slot.data);
            data[len..padded].fill(0);
            let base = (plan.block > 0).then(|| &bytes(&slot.base)[..len]);
            runs = judge(&data[..len], base, slot.at, &plan);
            let start = data.as_mut_ptr();
            for (from, to, _) in &mut runs {
                if *to == len {
                    *to = padded;
                }
                slot.iov.push(libc::iovec { iov_base: start.wrapping_add(*from).cast(), iov_len: *to - *from });
            }
        }
        let slot = &self.slots[number];
        let mut written = 0;
        for (i, &(from, to, what)) in runs.iter().enumerate() {
            let at = slot.at + from as u64;
            let done = self.expect(&self.to, "writing", at, &slot.count, |()| ());
            if what == What::Zero {
                self.to.write_zeroes(at, (to - from) as u64, done);
                continue;
            }
            written += (to - from) as u64;
            // SAFETY: as in `read`.
            let buf = unsafe { IoVecBuf::new(&slot.iov[i], 1) }.expect("a piece fits an address space");
            self.to.write(at, buf, done);
        }
        self.written += written;
    }

    /// Lets both ends do what they can; waits if there is nothing.
    fn drive(&mut self, tick: &mut dyn FnMut(Step) -> bool) -> Result<()> {
        self.turn();
        let elapsed = self.begin.elapsed();
        if elapsed >= self.next_tick {
            self.next_tick = elapsed + TICK;
            if !tick(Step::Copying { elapsed, done: self.done, size: self.plan.size }) {
                return Err(Error::new(Kind::Host(libc::EINTR), format!("interrupted at {} of {} bytes", self.done, self.plan.size)));
            }
        }
        self.check_failed()
    }

    fn check_failed(&self) -> Result<()> {
        self.shared.failed.borrow().clone().map_or(Ok(()), Err)
    }

    fn turn(&mut self) {
        let turned = self.from.turn().and_then(|()| self.to.turn());
        if self.shared.called.get() == self.seen && turned.is_ok() {
            let mut both = [PollFd::from_borrowed_fd(self.from.event_fd(), PollFlags::IN), PollFd::from_borrowed_fd(self.to.event_fd(), PollFlags::IN)];
            let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as _ };
            match rustix::event::poll(&mut both, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // As below.
                Err(_) => std::process::abort(),
            }
        }
        if turned.is_err() {
            // Memory is on its way through the kernel and cannot be had back.
            std::process::abort();
        }
        self.seen = self.shared.called.get();
    }

    /// Waits for everything under way, whatever comes of it.
    fn drain(&mut self) {
        while self.shared.under_way.get() > 0 {
            self.turn();
        }
    }
}

fn bytes(pages: &[Page]) -> &[u8] {
    // SAFETY: a `Page` is 4096 bytes without padding, one behind the other in a slice.
    unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), size_of_val(pages)) }
}

fn bytes_mut(pages: &mut [Page]) -> &mut [u8] {
    // SAFETY: as in `bytes`; any byte is valid in a `Page`.
    unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), size_of_val(pages)) }
}

fn is_zero(bytes: &[u8]) -> bool {
    // Without a branch a byte: the compiler makes vectors of it.
    bytes.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Cuts a piece that begins at guest byte `at` into runs that are to be written or zeroed: from, to, and
/// which. What is in none of them is left out. `base`: what the target reads as before.
fn judge(data: &[u8], base: Option<&[u8]>, at: u64, plan: &Plan) -> Vec<(usize, usize, What)> {
    let unit = plan.unit();
    let mut runs: Vec<(usize, usize, What)> = Vec::new();
    let mut from = 0;
    while from < data.len() {
        let to = (from + unit - (at as usize + from) % unit).min(data.len());
        let part = &data[from..to];
        let what = match base {
            Some(base) if base[from..to] == *part => What::Skip,
            _ if plan.sparse == 0 || !is_zero(part) => What::Data,
            _ if plan.zeroed => What::Skip,
            _ => What::Zero,
        };
        match runs.last_mut() {
            Some((start, end, last)) if *end == from && *last == what && plan.cut(at + *start as u64, at + to as u64) == at + to as u64 => *end = to,
            _ if what == What::Skip => {}
            _ => runs.push((from, to, what)),
        }
        from = to;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(sparse: u64, zeroed: bool, block: u64) -> Plan {
        Plan { size: 1 << 30, sparse, zeroed, block, chunk: 0, same_base: false }
    }

    #[test]
    fn zeroes_are_left_out_in_whole_aligned_units() {
        let mut data = vec![0; 16384];
        data[4096 + 5] = 1;
        data[12288] = 2;
        assert_eq!(judge(&data, None, 0, &plan(4096, true, 0)), [(4096, 8192, What::Data), (12288, 16384, What::Data)]);
        assert_eq!(
            judge(&data, None, 0, &plan(4096, false, 0)),
            [(0, 4096, What::Zero), (4096, 8192, What::Data), (8192, 12288, What::Zero), (12288, 16384, What::Data)]
        );
        // The same bytes elsewhere in the disk: units begin elsewhere.
        assert_eq!(judge(&data, None, 4096, &plan(8192, true, 0)), [(4096, 16384, What::Data)]);
        assert_eq!(judge(&data, None, 0, &plan(0, true, 0)), [(0, 16384, What::Data)]);
        assert_eq!(judge(&vec![0; 16384], None, 0, &plan(4096, true, 0)), []);
    }

    #[test]
    fn a_write_that_begins_within_a_chunk_ends_there() {
        let mut data = vec![1; 3 << 16];
        data[..4096].fill(0);
        let plan = Plan { chunk: 1 << 16, ..plan(4096, true, 0) };
        assert_eq!(judge(&data, None, 0, &plan), [(4096, 65536, What::Data), (65536, 3 << 16, What::Data)]);
        assert_eq!(judge(&vec![1; 3 << 16], None, 0, &plan), [(0, 3 << 16, What::Data)]);
        assert_eq!(plan.cut(4096, 1 << 20), 1 << 16);
        assert_eq!(plan.cut(65536, 1 << 20), 1 << 20);
    }

    #[test]
    fn what_the_base_has_is_left_out_in_whole_blocks() {
        let base = vec![7; 32768];
        let mut data = base.clone();
        data[9000] = 0;
        data[16384..24576].fill(0);
        let wanted = [(8192, 16384, What::Data), (16384, 24576, What::Zero)];
        assert_eq!(judge(&data, Some(&base), 0, &plan(4096, false, 8192)), wanted);
        assert_eq!(judge(&data, Some(&base), 0, &plan(0, false, 8192)), [(8192, 24576, What::Data)]);
        assert_eq!(judge(&data, Some(&data), 0, &plan(4096, false, 8192)), []);
    }
}
