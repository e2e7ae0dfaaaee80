#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Power cuts: what was flushed is there, whatever the disk lost of the rest.

A qemu-storage-daemon writes to an fvd image over NBD - many requests in flight, flushes, FUA,
discards, zeroes among them - while QEMU's `blklogwrites` under the fvd node records all that
happens to the file. Then writelog.py makes the file as a power cut would have left it: at
every flush and at random points; what was not flushed is there, lost, or torn at 512 bytes, as
drawn from the seed. For each such file: a read-only open reads what rule C4 of
docs/crash-consistency.md allows for each sector and changes no byte; `qemu-img check` finds
nothing (but a header copy, if this cut tore it); a writable open recovers, takes a write, all
reads stay the same, and `qemu-img check` finds nothing.

The log says nothing of the file's length: the replayed file gets the length that the real one had
when the client next looked, so growth may be ahead of the cut, which a disk allows.

Each session starts where the power was cut in the one before, so the recovery is recorded and
cut, too. Canaries: files that lack a flushed write, and wrong expectations, must be found out.

Every flush of the file that is not among the cut points is read through a read-only open only;
of the session with many flushes a sample.

Environment: see common.py; CUTS (240), at least as many cut points; ONLY=text, setups whose name has it. A failure keeps the folder;
`powercut.py --again FOLDER` judges the file that failed once more.
"""

import bisect
import os
import pickle
import random
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import writelog
from common import (MIB, NBD, SECTOR, VERBOSE, Daemon, Failure, NBDError, Skip, Suite, check, check_gets_leaks_back, check_sound, direct_io,
                    img, io, read_stamp, run, stamp, stamps)

CUTS = int(os.environ.get("CUTS", "240"))
DISK = 8 * MIB
SECTORS = DISK // SECTOR
HEADERS = {4096: 1, 131072: 2}      # where the header copies are (FMT-6)
LIFE = 1 << 62              # a place in the log that is never reached


class Op:
    """A write of one guest; numbers stand for contents: 0 zeroes, else the number of the write."""

    __slots__ = ("first", "count", "number", "discard", "fua", "begin", "end", "low", "high", "safe")

    def __init__(self, first, count, number, discard=False, fua=False):
        self.first, self.count, self.number, self.discard, self.fua = first, count, number, discard, fua
        self.begin = self.end = None        # order of events as the client saw them
        self.low = self.high = None         # the log's length before it began, after it was answered


class History:
    """What the guest did, and what each sector may hold at any point of the log.

    The log's length, read before a request is sent, is a lower bound of where it has effects;
    read after a flush is answered, an upper bound of where the flush was complete.
    """

    def __init__(self, content, log_path, image_path):
        self.lock = threading.Lock()
        self.content = list(content)
        self.log_path, self.image_path = log_path, image_path
        self.lengths = []           # [log's length, then the file's]
        self.clock = 0
        self.ops = []
        self.flushes = []           # [begin, log's length when answered or None]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def _place(self):
        place = os.stat(self.log_path).st_size
        self.lengths.append((place, os.stat(self.image_path).st_size))
        return place

    def _tick(self):
        self.clock += 1
        return self.clock

    def begin(self, op):
        with self.lock:
            op.low, op.begin = self._place(), self._tick()
            self.ops.append(op)

    def end(self, op):
        with self.lock:
            op.end, op.high = self._tick(), self._place()

    def flush_begin(self):
        with self.lock:
            self.flushes.append([self._tick(), None])
            return self.flushes[-1]

    def flush_end(self, flush):
        with self.lock:
            flush[1] = self._place()

    def settle(self, entries):
        """Places in the log become numbers of entries."""
        starts = [e.start for e in entries]
        ends = [e.end for e in entries]
        # A flush covers the writes answered before it began; the earliest such flush counts.
        covers = []
        best = LIFE
        for begin, place in reversed(self.flushes):
            if place is not None:
                best = min(best, bisect.bisect_left(starts, place))
            covers.append((begin, best))
        covers.reverse()
        begins = [c[0] for c in covers]
        self.lengths = [(bisect.bisect_right(ends, place), length) for place, length in self.lengths]
        self.flush_places = sorted({bisect.bisect_left(starts, p) for _, p in self.flushes if p is not None})
        self.by_sector = {}
        for op in self.ops:
            op.low = bisect.bisect_right(ends, op.low)
            op.safe = LIFE
            if op.end is not None:
                at = bisect.bisect_right(begins, op.end)
                if at < len(covers):
                    op.safe = covers[at][1]
                if op.fua:
                    op.safe = min(op.safe, bisect.bisect_left(starts, op.high))
            for sector in range(op.first, op.first + op.count):
                self.by_sector.setdefault(sector, []).append(op)

    def length_at(self, cut):
        """The file's length, when the first cut entries of the log happened, or a little later."""
        at = bisect.bisect_left(self.lengths, (cut, 0))
        return self.lengths[min(at, len(self.lengths) - 1)][1]

    def allowed(self, sector, cut):
        """C4, when the first cut entries of the log happened."""
        ops = [op for op in self.by_sector.get(sector, ()) if op.low < cut]
        # The last write that is safe takes away what was answered before it began. Not so a
        # discard: what it discards may stay.
        last = max((op.begin for op in ops if op.safe <= cut and not op.discard), default=-1)
        allowed = {op.number for op in ops if op.end is None or op.end >= last}
        if last < 0:
            allowed.add(self.content[sector])
        return allowed

    def wrong(self, found, cut):
        """Sectors that hold something else than they may, as texts."""
        texts = []
        for sector in range(SECTORS):
            if sector not in self.by_sector:
                if found[sector] != self.content[sector]:
                    texts.append("%d: %d, never written, was %d" % (sector, found[sector], self.content[sector]))
            elif found[sector] not in self.allowed(sector, cut):
                texts.append("%d: %d, allowed %s" % (sector, found[sector], sorted(self.allowed(sector, cut))))
        return texts


def numbers_of(data):
    check(len(data) == DISK, "the disk has %d bytes, not %d", len(data), DISK)
    return [read_stamp(data[s * SECTOR:(s + 1) * SECTOR], s) for s in range(SECTORS)]


def check_read_only(path, torn_headers):
    """Nothing is found, but that a header copy is torn if this cut tore it: a reader cannot mend it."""
    if not torn_headers:
        check_sound(path)
        return False
    out = img("check", "-f", "fvd", path, status=(0, 2, 3))
    errors = [line for line in out.splitlines() if line.startswith("ERROR")]
    known = ["ERROR header: copy %d: checksum mismatch" % copy for copy in torn_headers]
    check(all(any(e.startswith(k) for k in known) for e in errors) and ("No errors" in out or "leaked" in out or errors),
          "qemu-img check of a file with torn header copies %s says: %s", sorted(torn_headers), out)
    return bool(errors)


def judge(folder, image, history, cut, rng, full=True, torn_headers=()):
    """All checks of one file, or only its reads; gives back what its sectors hold."""
    path, out = os.path.join(folder, "cut.fvd"), os.path.join(folder, "cut.raw")

    def contents():
        img("convert", "-f", "fvd", "-O", "raw", path, out)
        with open(out, "rb") as f:
            return f.read()

    with open(path, "wb") as f:
        f.write(image)
    first = contents()
    if full:
        judge.headers_seen += check_read_only(path, torn_headers)
    with open(path, "rb") as f:
        check(f.read() == image, "a read-only open changed the file")
    found = numbers_of(first)
    wrong = history.wrong(found, cut)
    check(not wrong, "%d sectors are wrong, first %s", len(wrong), wrong[:5])
    if not full:
        return found

    # A writable open recovers; a write gets in; nothing else moves.
    sector = rng.choice([0, SECTORS - 1, rng.randrange(SECTORS)])
    pattern = os.path.join(folder, "pattern")
    with open(pattern, "wb") as f:
        f.write(stamp(sector, LIFE))
    io(path, "write -q -s %s %d %d" % (pattern, sector * SECTOR, SECTOR), "flush")
    wanted = first[:sector * SECTOR] + stamp(sector, LIFE) + first[(sector + 1) * SECTOR:]
    check(contents() == wanted, "reads differ after the writable open")
    check_gets_leaks_back(path)
    check(contents() == wanted, "reads differ after the repair")
    return found


judge.headers_seen = 0      # how often a torn header copy was reported before the recovery


TORN = 3                    # its place among the fates


def fates(rng, data_offset, tear=False):
    """Draws what becomes of the writes that were not flushed; a name and a function for Replay.image()."""
    torn_like = rng.random()

    def torn(entry):
        return [rng.random() < torn_like for _ in range(entry.pieces())]

    def none(entry):
        return [False] * entry.pieces()

    def one_of(number, entry, keep, lose):
        return keep(entry) if rng.random() < torn_like else lose(entry)

    def whole(_):
        return None

    chosen = TORN if tear and rng.randrange(2) else rng.randrange(6)
    return [
        ("lost", lambda n, e: none(e)),
        ("kept", lambda n, e: None),
        ("some", lambda n, e: one_of(n, e, whole, none)),
        ("torn", lambda n, e: torn(e)),
        ("metadata first", lambda n, e: whole(e) if e.offset < data_offset else one_of(n, e, torn, none)),
        ("data first", lambda n, e: whole(e) if e.offset >= data_offset else one_of(n, e, torn, none)),
    ][chosen]


class Setup:
    def __init__(self, name, options, base=0, cache="writeback", aio="threads", log_sector=512, operations=90,
                 flush_every=9, iothread=True, unmap=True, commits=False):
        self.name, self.options, self.base = name, options, base
        self.cache, self.aio, self.log_sector = cache, aio, log_sector
        self.operations, self.flush_every = operations, flush_every
        self.iothread, self.unmap, self.commits = iothread, unmap, commits


class Run:
    """The sessions of one image."""

    def __init__(self, suite, setup):
        self.suite, self.setup, self.rnd = suite, setup, suite.random
        self.folder = suite.path(setup.name)
        os.mkdir(self.folder)
        self.image = os.path.join(self.folder, "disk.fvd")
        self.number = 1
        self.fresh = self.rnd.sample(range(SECTORS // 8), SECTORS // 8)
        content = [0] * SECTORS
        words = []
        if setup.base:
            base = os.path.join(self.folder, "base.raw")
            with open(base, "wb") as f:
                for at in range(0, setup.base // SECTOR, 64):
                    count = min(64, setup.base // SECTOR - at)
                    if (at // 64) % 4 != 3:             # a hole in every fourth place
                        f.seek(at * SECTOR)
                        f.write(stamps(at, count, 1))
                        content[at:at + count] = [1] * count
                f.truncate(setup.base)
            content = content[:SECTORS]
            words = ["-b", base, "-F", "raw"]
        img("create", "-q", "-f", "fvd", *words, "-o", setup.options, self.image, str(DISK))
        self.content, self.torn_headers = content, set()
        self.places()

    def places(self):
        """Where the file's parts are: for choosing points, not for judging."""
        self.data_offset, self.journal = 0, range(0)
        for line in run("fvd", "dump", self.image).splitlines():
            words = line.replace(",", " ").split()
            if words[:2] == ["data", "offset:"]:
                self.data_offset = int(words[2])
            if words[:2] == ["region", "Journal:"]:
                self.journal = range(int(words[3]), int(words[3]) + int(words[5]))
        check(self.data_offset > 0, "fvd dump names no data offset")

    def session(self):
        """Writes under the log. Sets start, entries, history."""
        setup = self.setup
        with open(self.image, "rb") as f:
            self.start = f.read()
        log_path = os.path.join(self.folder, "log")
        with open(log_path, "wb"):
            pass
        socket_path = self.suite.path("nbd")
        if os.path.exists(socket_path):
            os.unlink(socket_path)
        direct = "on" if setup.cache == "none" else "off"
        unmap = "unmap" if setup.unmap else "ignore"
        history = History(self.content, log_path, self.image)
        words = [
            "--object", "iothread,id=io",
            "--blockdev", "driver=file,node-name=raw,filename=%s,aio=%s,cache.direct=%s,discard=%s"
            % (self.image, setup.aio, direct, unmap),
            # The log need not survive anything.
            "--blockdev", "driver=file,node-name=log,filename=%s,cache.no-flush=on" % log_path,
            "--blockdev", "driver=blklogwrites,node-name=logged,file=raw,log=log,log-sector-size=%d,cache.direct=%s,"
            "discard=%s" % (setup.log_sector, direct, unmap),
            "--blockdev", "driver=fvd,node-name=disk,file=logged,commit-interval=1,cache.direct=%s,discard=%s"
            % (direct, unmap),
            "--nbd-server", "addr.type=unix,addr.path=%s" % socket_path,
            "--export", "nbd,id=e,node-name=disk,writable=on" + (",iothread=io" if setup.iothread else "")]
        with Daemon(*words) as daemon:
            link = NBD(socket_path, "disk")
            self.guest(link, history)
            link.close()
            daemon.qmp("block-export-del", id="e", mode="hard")
            deadline = time.monotonic() + 20
            while daemon.qmp("query-block-exports"):
                check(time.monotonic() < deadline, "the export stays")
                time.sleep(0.01)
            text = daemon.quit()
            check("fvd" not in text, "the daemon said: %s", text)
        self.entries = writelog.parse(log_path)
        # The last look, with all that the close did.
        history._place()
        history.settle(self.entries)
        self.history = history

        # The replayer against the truth: the whole log gives the file that is there.
        replay = writelog.Replay(self.start, self.entries)
        replay.to(len(self.entries))
        with open(self.image, "rb") as f:
            real = f.read()
        replayed = bytes(replay.image()).ljust(len(real), b"\0")
        if replayed != real:
            at = next((i for i in range(min(len(real), len(replayed))) if real[i] != replayed[i]), len(real))
            raise Failure("replay of the whole log is not the file: first difference at %d, lengths %d and %d"
                          % (at, len(replayed), len(real)))

    def pick(self):
        rnd = self.rnd
        if self.setup.commits and self.fresh and rnd.randrange(2):
            # A block never written, so that the next flush has a bit to commit.
            return self.fresh.pop() * 8 + rnd.randrange(4), rnd.choice([1, 4])
        count = rnd.choice([1, 1, 3, 8, 8, 8, 16, 40, 128])
        # A few busy places: overwrites and neighbours in one block, not only first writes.
        first = rnd.choice([rnd.randrange(SECTORS), rnd.randrange(4) * SECTORS // 4 + rnd.randrange(200)])
        return min(first, SECTORS - count), count

    def guest(self, link, history):
        rnd, setup = self.rnd, self.setup
        lock, busy, broken = threading.Lock(), set(), []
        depth = rnd.choice([1, 4, 16])
        slots = threading.Semaphore(depth)

        def answered(pending, what, release):
            if pending.error is not None:
                broken.append("%s: %s" % (what, NBDError(pending.error)))
            release()
            slots.release()

        done = 0
        while done < setup.operations:
            first, count = self.pick()
            mine = set(range(first, first + count))
            with lock:
                if mine & busy:             # no two requests on one sector at once: their order is known
                    time.sleep(0.0005)
                    continue
                busy.update(mine)
            done += 1
            kind = rnd.randrange(20)
            self.number += 1
            zero, discard, fua = kind in (0, 1), kind in (2, 3), kind in (4, 5)
            op = Op(first, count, 0 if zero or discard else self.number, discard, fua)
            slots.acquire()
            history.begin(op)

            def release(op=op, mine=mine):
                history.end(op)
                with lock:
                    busy.difference_update(mine)

            def on_done(pending, release=release):
                answered(pending, "write", release)

            if discard:
                link.request(NBD.TRIM, first * SECTOR, count * SECTOR, on_done=on_done)
            elif zero:
                link.request(NBD.WRITE_ZEROES, first * SECTOR, count * SECTOR,
                             flags=rnd.choice([0, NBD.NO_HOLE]), on_done=on_done)
            else:
                link.request(NBD.WRITE, first * SECTOR, data=stamps(first, count, self.number),
                             flags=NBD.FUA if fua else 0, on_done=on_done)
            if rnd.randrange(setup.flush_every) == 0 or setup.commits and done % 2:
                slots.acquire()
                flush = history.flush_begin()
                pending = link.request(NBD.FLUSH, on_done=lambda p, f=flush: answered(
                    p, "flush", lambda: history.flush_end(f)))
                if rnd.randrange(2) or setup.commits:
                    pending.wait()
        for _ in range(depth):
            slots.acquire()
        check(not broken, "%s", broken[:3])

    def points(self, wanted):
        """Places for a cut, and whether it is judged in full: flushes of the file, of the guest, random ones."""
        entries, rnd = self.entries, self.rnd
        total = len(entries)
        after = [n + 1 for n, e in enumerate(entries) if e.flush]
        check(after, "no flush of the file")
        full = rnd.sample(after, min(len(after), wanted // 4))
        # Around header updates, the double-write area, pages in place.
        rare = [n for n, e in enumerate(entries)
                if e.changes and e.offset < self.data_offset and e.offset not in self.journal]
        full += [min(total, rnd.choice(rare) + 1 + rnd.randrange(2)) for _ in range(wanted // 6) if rare]
        headers = [n for n, e in enumerate(entries) if e.changes and e.offset in HEADERS]
        full += [rnd.choice(headers) + 1 for _ in range(2) if headers]
        guest = [p for p in self.history.flush_places if p <= total]
        full += rnd.sample(guest, min(len(guest), wanted // 6))
        # Right before a flush most is open; the more, the likelier.
        opens = [b - a - 1 for a, b in zip([0] + after, after)]
        while len(full) < wanted:
            before_flush = rnd.choices(after, [n + 1 for n in opens])[0] - 1
            full.append(before_flush if rnd.randrange(3) else rnd.randrange(total + 1))
        full.append(total)
        quick = sorted(set(after) - set(full))
        self.every_flush = len(quick) <= 80
        if not self.every_flush:
            quick = rnd.sample(quick, 20)
        return sorted([(p, True) for p in full] + [(p, False) for p in quick])


class Counts:
    def __init__(self):
        self.cuts = self.flush_cuts = self.read_only = self.entries = self.flushes = self.guest_flushes = 0
        self.open = self.lost = self.torn = self.reused = self.whole_sessions = self.sessions = 0
        self.fates = {}


def cut_session(runner, wanted, counts, canaries):
    setup, rnd = runner.setup, runner.rnd
    runner.session()
    entries, history = runner.entries, runner.history
    counts.sessions += 1
    counts.entries += len(entries)
    counts.flushes += sum(e.flush for e in entries)
    counts.guest_flushes += sum(1 for f in history.flushes if f[1] is not None)
    units = [e.offset for e in entries if e.changes and e.offset in runner.journal]
    counts.reused += len(units) - len(set(units))
    # Not every operation reaches the file: some discards are ignored.
    check(counts.guest_flushes > 0 and len(entries) > setup.operations // 2, "the session was idle: %d entries", len(entries))
    points = runner.points(wanted)
    counts.whole_sessions += runner.every_flush
    follow = rnd.choice([p for p, full in points if full])
    follow_image = follow_found = follow_torn = None
    replay = writelog.Replay(runner.start, entries)
    for number, (cut, full) in enumerate(points):
        replay.to(cut)
        rng = random.Random("%d %s %d %d" % (runner.suite.seed, setup.name, counts.sessions, number))
        fate_name, fate = fates(rng, runner.data_offset, cut > 0 and entries[cut - 1].offset in HEADERS)
        drawn = []

        def noted(n, entry, fate=fate, drawn=drawn):
            what = fate(n, entry) if full else [False] * entry.pieces()
            drawn.append((entry, what))
            return what

        image = bytes(replay.image(noted)).ljust(history.length_at(cut), b"\0")
        torn_headers = set(runner.torn_headers)
        changed = [(e, None) for e in entries[:replay.flushed]] + drawn
        for entry, what in changed:
            copy = HEADERS.get(entry.offset) if entry.changes else None
            if copy and (what is None or all(what)):
                torn_headers.discard(copy)
            elif copy and any(what):
                torn_headers.add(copy)
        for entry, what in drawn:
            counts.open += 1
            if what is not None and not all(what):
                if any(what):
                    counts.torn += 1
                else:
                    counts.lost += 1
        if full:
            counts.fates[fate_name] = counts.fates.get(fate_name, 0) + 1
            counts.cuts += 1
        counts.flush_cuts += cut > 0 and entries[cut - 1].flush
        counts.read_only += not full
        try:
            found = judge(runner.folder, image, history, cut, rng, full, torn_headers)
        except (Failure, writelog.LogError) as error:
            case = os.path.join(runner.folder, "failed")
            with open(case, "wb") as f:
                pickle.dump({"image": image, "history": history, "cut": cut, "torn": torn_headers}, f)
            os.environ["KEEP"] = "1"
            raise Failure("%s\n%s, session %d, cut after %d of %d entries (%s), unflushed: %s\n"
                          "the file is kept: python3 tests/qemu/powercut.py --again %s"
                          % (error, setup.name, counts.sessions, cut, len(entries), fate_name,
                             ["%s%s" % (e, "" if w is None else " kept %d of %d" % (sum(w), len(w)))
                              for e, w in drawn][:20], runner.folder))
        if full and cut == follow and follow_image is None:
            follow_image, follow_found, follow_torn = image, found, torn_headers
    if canaries is not None:
        try_canaries(runner, canaries)
    if VERBOSE:
        print("# %s: %d entries, %d cuts" % (setup.name, len(entries), len(points)), flush=True)
    # The next session finds the file as the power cut left it.
    with open(runner.image, "wb") as f:
        f.write(follow_image)
    runner.content, runner.torn_headers = follow_found, follow_torn


def must_fail(runner, name, image, cut, text, canaries):
    try:
        image = bytes(image).ljust(runner.history.length_at(cut), b"\0")
        judge(runner.folder, image, runner.history, cut, random.Random(0))
    except Failure as error:
        check(text in str(error), "canary '%s' was noticed by the wrong check: %s", name, error)
        canaries.append(name)
        return
    raise Failure("canary '%s' was not noticed (%s)" % (name, runner.setup.name))


def try_canaries(runner, canaries):
    """Files and expectations that are wrong; a check that lets one pass is none."""
    entries, history = runner.entries, runner.history
    total = len(entries)
    # Writes whose content alone is allowed somewhere at the end.
    sure = [(op, s) for op in history.ops for s in (op.first,) if op.number and op.safe <= total
            and history.allowed(s, total) == {op.number}]
    check(sure, "no write for the canaries")

    def without(refused):
        image = bytearray(runner.start)
        for entry in entries:
            writelog.apply(image, entry, refused(entry))
        return image

    op, sector = runner.rnd.choice(sure)
    needle = stamp(sector, op.number)

    def lose_data(entry):
        if entry.data is None or not entry.changes or needle not in bytes(entry.data):
            return None
        return [bytes(entry.data[i * SECTOR:(i + 1) * SECTOR]) != needle for i in range(entry.pieces())]

    must_fail(runner, "one flushed sector lost", without(lose_data), total, "1 sectors are wrong", canaries)
    must_fail(runner, "judged by a later flush", runner.start, total, "sectors are wrong", canaries)
    history.content[SECTORS - 1] += 5
    try:
        untouched = SECTORS - 1 not in history.by_sector
        if untouched:
            must_fail(runner, "wrong expectation of a sector never written", without(lambda e: None), total,
                      "never written", canaries)
    finally:
        history.content[SECTORS - 1] -= 5
    rotten = without(lambda e: None)
    rotten[4096 + 100] ^= 1
    must_fail(runner, "a header copy that no cut tore", rotten, total, "header: copy 1: checksum", canaries)
    if runner.setup.base:
        # A new block whose bit is lost shows the base.
        must_fail(runner, "metadata lost", without(
            lambda e: [False] * e.pieces() if e.changes and e.offset < runner.data_offset else None),
            total, "sectors are wrong", canaries)
        no_data_sync(runner, canaries)


def no_data_sync(runner, canaries):
    """The log as an engine would write it that forgets CC-3, the sync between data and its record.

    Not in each image is there a place where it shows (a base's hole, too, reads as zero): main() counts.
    """
    entries = runner.entries
    flushes = [n for n, e in enumerate(entries) if e.flush]
    tried = 0
    for before, sync, after in zip(flushes, flushes[1:], flushes[2:]):
        data = [e for e in entries[before:sync] if e.changes and e.offset >= runner.data_offset]
        records = [e for e in entries[sync:after] if e.changes and e.offset in runner.journal]
        if not data or not records:
            continue
        tried += 1
        image = bytearray(runner.start)
        for number, entry in enumerate(entries[:after]):
            lost = before < number < sync and entry.offset >= runner.data_offset
            writelog.apply(image, entry, [False] * entry.pieces() if lost else None)
        try:
            image = bytes(image).ljust(runner.history.length_at(after), b"\0")
            judge(runner.folder, image, runner.history, after, random.Random(0), False)
        except Failure as error:
            check("sectors are wrong" in str(error), "canary 'no data sync' was noticed by the wrong check: %s", error)
            canaries.append("no data sync")
            return
        if tried == 10:
            break


def again(folder):
    with open(os.path.join(folder, "failed"), "rb") as f:
        case = pickle.load(f)
    try:
        judge(folder, case["image"], case["history"], case["cut"], random.Random(0), True, case.get("torn") or ())
    except Failure as error:
        print("not ok - %s" % error)
        sys.exit(1)
    print("ok - this file passes")


def main():
    suite = Suite("powercut")
    print("# seed %d" % suite.seed, flush=True)
    direct = direct_io(suite.dir)
    none = ("none", "io_uring") if direct else ("writeback", "io_uring")
    native = ("none", "native") if direct else ("writeback", "threads")
    small = "block_size=4k,journal_size=1M"
    compact = "compact_image=on,journal_size=1M,chunk_size="
    setups = [
        Setup("base4k", small, 6 * MIB + 512),
        Setup("base4k-none", small, 12 * MIB, *none),
        Setup("base64k", "block_size=64k,journal_size=1M", DISK, *native, iothread=False),
        Setup("base2M", "block_size=2M,detect_sparse_hole=on", 5 * MIB),
        Setup("log4k", "block_size=16k,journal_size=1M", DISK, log_sector=4096),
        Setup("nobase", "journal_size=1M", 0, unmap=False),
        # More commits than the journal has units: checkpoints, and the journal starts over.
        Setup("many-flushes", small, DISK, *none, operations=800, commits=True),
        # Chunks are given and taken away; the file grows by one chunk at a time, by some, and not at all.
        Setup("compact", compact + "64k,storage_grow_unit=64k", 0),
        Setup("compact-base4k", compact + "64k,storage_grow_unit=256k,block_size=4k", 6 * MIB + 512, *none),
        Setup("compact-base64k", compact + "128k,storage_grow_unit=1M,block_size=64k", DISK, *native, iothread=False),
        Setup("compact-full", compact + "64k,preallocation=falloc", 0, unmap=False),
        Setup("compact-log4k", compact + "1M,storage_grow_unit=1M,block_size=16k", 3 * MIB, log_sector=4096),
        Setup("compact-many-flushes", compact + "64k,storage_grow_unit=512k,block_size=4k", DISK, *none, operations=800,
              commits=True),
    ]
    setups = [s for s in setups if os.environ.get("ONLY", "") in s.name]
    rounds = 2
    each = -(-CUTS // (rounds * len(setups)))
    counts, noticed = Counts(), []
    for setup in setups:
        with suite.test("cuts of %s, %s/%s" % (setup.name, setup.cache, setup.aio)):
            runner = Run(suite, setup)
            before = counts.reused
            for turn in range(rounds):
                cut_session(runner, each, counts, noticed if turn == 0 else None)
            if setup.commits:
                # Units are used again only after a checkpoint (CC-23).
                check(counts.reused > before, "the journal did not start over: no checkpoint was cut")
    print("# %d cut points judged in full, %d more read; %d of both right after a flush of the file; %d sessions, "
          "%d of them cut at every flush" % (counts.cuts, counts.read_only, counts.flush_cuts, counts.sessions,
                                             counts.whole_sessions))
    print("# logged: %d operations, %d flushes; guest flushes answered: %d" % (
        counts.entries, counts.flushes, counts.guest_flushes))
    print("# unflushed operations at the cuts: %d, lost %d, torn %d; %s" % (
        counts.open, counts.lost, counts.torn, ", ".join("%s %d" % f for f in sorted(counts.fates.items()))))
    print("# journal units written again after a checkpoint: %d" % counts.reused)
    print("# torn header copies reported before the recovery: %d" % judge.headers_seen)
    with suite.test("canaries are noticed (%d)" % len(noticed)):
        if suite.failed:
            raise Skip("a session failed before its canaries")
        based = sum(1 for s in setups if s.base)
        flat_based = sum(1 for s in setups if s.base and "compact" not in s.options)
        for name, least in [("one flushed sector lost", len(setups)), ("judged by a later flush", len(setups)),
                            ("wrong expectation of a sector never written", 1),
                            ("a header copy that no cut tore", len(setups)), ("metadata lost", based),
                            ("no data sync", flat_based // 2)]:
            check(noticed.count(name) >= least, "'%s' was noticed %d times, not %d", name,
                  noticed.count(name), least)
    with suite.test("the cuts were many, and cut something"):
        check(counts.cuts >= CUTS, "only %d cuts", counts.cuts)
        check(counts.open > CUTS and counts.lost > CUTS // 10 and counts.torn > CUTS // 10,
              "open %d, lost %d, torn %d", counts.open, counts.lost, counts.torn)
    suite.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--again"]:
        again(sys.argv[2])
    else:
        main()
