#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""SIGKILL in the middle of writes: what was flushed is there, and nothing is made up.

Each sector written carries its own number and that of its write. After the kill a sector
may hold what the last answered flush covered or anything written to it since (answered or
not), nothing else. First the image is opened read-only, which must not change one byte of
the file; then writable; both must show the same. `qemu-img check` is clean before and after.

Half of the cycles kill qemu-io, half a qemu-storage-daemon with two NBD connections and
many requests in flight. Environment: see common.py; CYCLES (60).
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import (KIB, MIB, NBD, SECTOR, VERBOSE, Daemon, Failure, NBDError, Suite, check, check_gets_leaks_back, check_leaks, check_sound, direct_io, img,
                    io, program, quote, read_stamp, stamps)

CYCLES = int(os.environ.get("CYCLES", "60"))
suite = Suite("kill9")
rnd = suite.random
DISK = 24 * MIB
# Bytes of the largest request.
LARGEST_WRITE = 128 * KIB
SECTORS = DISK // SECTOR


class Model:
    """What each sector may hold: the flushed number, and those of writes since.

    Numbers stand for contents: 0 zeroes, else the number of the write. Thread-safe.
    """

    def __init__(self, content):
        self.lock = threading.Lock()
        self.flushed = list(content)
        self.later = {}             # sector -> [(number, answered before flush number n, or None)]
        self.flushes = 0            # started

    def begin(self, first, count, number):
        """A write starts. Its place in the lists is given back for end()."""
        with self.lock:
            entries = []
            for sector in range(first, first + count):
                entry = [number, None]
                self.later.setdefault(sector, []).append(entry)
                entries.append(entry)
            return entries

    def end(self, entries):
        with self.lock:
            for entry in entries:
                entry[1] = self.flushes     # only a flush started later covers it

    def flush_begin(self):
        with self.lock:
            self.flushes += 1
            return self.flushes

    def flush_end(self, number):
        """Writes answered before the flush started are safe; of several on one sector the last."""
        with self.lock:
            for sector in list(self.later):
                entries = self.later[sector]
                last = None
                for at, (_, answered) in enumerate(entries):
                    if answered is not None and answered < number:
                        last = at
                if last is not None:
                    # No two writes to one sector are ever in flight together, so order is known.
                    self.flushed[sector] = entries[last][0]
                    del entries[:last + 1]
                    if not entries:
                        del self.later[sector]

    def allowed(self, sector):
        return {self.flushed[sector]} | {number for number, _ in self.later.get(sector, ())}


def contents(path, fmt):
    """The numbers of all sectors, through a read-only open."""
    out = suite.path("contents")
    img("convert", "-f", fmt, "-O", "raw", path, out)
    numbers = []
    with open(out, "rb") as f:
        for sector in range(SECTORS):
            numbers.append(read_stamp(f.read(SECTOR), sector))
    os.unlink(out)
    return numbers


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()


class Image:
    def __init__(self, name, base, options):
        self.path = suite.path(name)
        self.number = 1             # that of the next write; 1 is the base's
        content = [0] * SECTORS
        words = []
        if base:
            base_path = self.path + ".base"
            with open(base_path, "wb") as f:
                for at in range(0, base // SECTOR, 64):
                    if (at // 64) % 4 != 3:                 # a hole in every fourth place
                        f.seek(at * SECTOR)
                        f.write(stamps(at, 64, 1))
                        content[at:at + 64] = [1] * 64
                f.truncate(base)
            content = content[:SECTORS]
            words = ["-b", base_path, "-F", "raw"]
        img("create", "-q", "-f", "fvd", *words, "-o", options, self.path, str(DISK))
        self.content = content

    def next(self):
        self.number += 1
        return self.number

    def pick(self, most=LARGEST_WRITE // SECTOR):
        count = min(rnd.choice([1, 1, 3, 8, 8, 8, 16, 40, most]), SECTORS)
        # A few busy places: overwrites and neighbours in one block, not only first writes.
        first = rnd.choice([rnd.randrange(SECTORS), rnd.randrange(4) * SECTORS // 4 + rnd.randrange(300)])
        return min(first, SECTORS - count), count

    def after(self, model, what):
        """All checks after a kill; the content found is the next cycle's start."""
        before = file_hash(self.path)
        check_sound(self.path)
        check_leaks(self.path, LARGEST_WRITE)
        found = contents(self.path, "fvd")
        check(file_hash(self.path) == before, "%s: a read-only open changed the file", what)
        wrong = [s for s in range(SECTORS) if found[s] not in model.allowed(s)]
        check(not wrong, "%s: %d sectors are wrong, first %s", what, len(wrong),
              ["%d: %d, allowed %s" % (s, found[s], sorted(model.allowed(s))) for s in wrong[:5]])
        # A writable open replays for good and closes clean.
        io(self.path, "write -q -z 0 512" if found[0] == 0 else "flush")
        check_gets_leaks_back(self.path)
        check(contents(self.path, "fvd") == found, "%s: reads differ after the writable open and the repair", what)
        self.content = found


def unit_file(data):
    path = suite.path("pattern")
    with open(path, "wb") as f:
        f.write(data)
    return path


def kill_qemu_io(image, cache, aio, seconds):
    """One writer, one request at a time; answers are seen on qemu-io's output."""
    model = Model(image.content)
    words = [program("qemu-io"), "-f", "fvd", "-t", cache, "-i", aio, image.path]
    if VERBOSE:
        print("# $ " + quote(words))
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    writes = flushes = 0
    seen = []

    def prompt():
        """Waits for the prompt: the command before it is over. False if qemu-io died."""
        text = b""
        while not text.endswith(b"qemu-io> "):
            more = os.read(process.stdout.fileno(), 4096)
            if not more:
                return False
            text += more
        seen.append(text.decode(errors="replace"))
        check(b"failed" not in text, "qemu-io: %s", seen[-1])
        return True

    def command(text):
        try:
            process.stdin.write((text + "\n").encode())
            process.stdin.flush()
        except OSError:
            return False
        return prompt()

    try:
        alive = prompt()
        while alive:
            kind = rnd.randrange(10)
            if kind < 2:
                number = model.flush_begin()
                if not command("flush"):
                    break
                model.flush_end(number)
                flushes += 1
                continue
            first, count = image.pick()
            number = 0 if kind == 2 else image.next()
            entries = model.begin(first, count, number)
            if kind == 2:
                done = command("write -q -z %s%d %d" % (rnd.choice(["", "-u "]), first * SECTOR, count * SECTOR))
            else:
                source = unit_file(stamps(first, count, number))
                done = command("write -q -s %s %d %d" % (source, first * SECTOR, count * SECTOR))
            if not done:
                break
            model.end(entries)
            writes += 1
    finally:
        killer.cancel()
        process.kill()
        process.wait(30)
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
    check(process.returncode == -9, "qemu-io ended by itself with %s: %s", process.returncode, "".join(seen[-5:]))
    return model, writes, flushes


def kill_daemon(image, cache, aio, seconds):
    """Two connections, up to 16 requests in flight on each, flushes among them."""
    model = Model(image.content)
    socket_path = suite.path("nbd")
    if os.path.exists(socket_path):
        os.unlink(socket_path)
    direct = "on" if cache == "none" else "off"
    daemon = Daemon(
        "--object", "iothread,id=io",
        "--blockdev", "driver=fvd,node-name=disk,discard=unmap,commit-interval=1,file.driver=file,file.filename=%s,"
        "file.aio=%s,file.cache.direct=%s,cache.direct=%s" % (image.path, aio, direct, direct),
        "--nbd-server", "addr.type=unix,addr.path=%s" % socket_path,
        "--export", "nbd,id=e,node-name=disk,writable=on,iothread=io")
    busy = set()                    # sectors with a write in flight
    lock = threading.Lock()
    counts = [0, 0]
    broken = []

    def writer(seed):
        import random
        own = random.Random(seed)
        try:
            link = NBD(socket_path, "disk")
            slots = threading.Semaphore(16)
            while True:
                with lock:
                    first, count = image.pick()
                    mine = set(range(first, first + count))
                    if mine & busy:
                        continue
                    busy.update(mine)
                    number = image.next()
                kind = own.randrange(20)
                zero = kind in (2, 3)
                entries = model.begin(first, count, 0 if zero else number)
                slots.acquire()

                def done(pending, entries=entries, mine=mine, fua=kind == 4):
                    if pending.error is None:
                        model.end(entries)
                        counts[0] += 1
                    elif pending.error > 0:
                        broken.append("write: %s" % NBDError(pending.error))
                    with lock:
                        busy.difference_update(mine)
                    slots.release()

                if zero:
                    last = link.request(NBD.WRITE_ZEROES, first * SECTOR, count * SECTOR,
                                        flags=0 if kind == 2 else NBD.NO_HOLE, on_done=done)
                else:
                    last = link.request(NBD.WRITE, first * SECTOR, data=stamps(first, count, number), on_done=done)
                if last.error is not None and last.error < 0:
                    return
                if own.randrange(12) == 0:
                    number = model.flush_begin()
                    link.request(NBD.FLUSH).wait()
                    model.flush_end(number)
                    counts[1] += 1
        except (EOFError, OSError):
            return                  # killed
        except Exception as error:
            broken.append(repr(error))

    threads = [threading.Thread(target=writer, args=(rnd.randrange(1 << 32),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    check(daemon.process.poll() is None, "the daemon ended by itself: %s", daemon.text())
    daemon.kill()
    for thread in threads:
        thread.join(60)
        check(not thread.is_alive(), "a writer hangs")
    check(not broken, "%s; %s", broken[:3], daemon.text())
    return model, counts[0], counts[1]


images = [
    Image("base4k", 16 * MIB, "block_size=4k,journal_size=1M"),
    Image("base64k", DISK, "block_size=64k,journal_size=1M"),
    Image("base2M-longer", DISK + 3 * MIB, "block_size=2M,detect_sparse_hole=on"),
    Image("nobase", 0, "journal_size=1M"),
    Image("compact", 0, "compact_image=on,chunk_size=64k,storage_grow_unit=256k,journal_size=1M"),
    Image("compact-base4k", 16 * MIB, "compact_image=on,chunk_size=64k,storage_grow_unit=64k,block_size=4k,journal_size=1M"),
    Image("compact-base64k", DISK, "compact_image=on,block_size=64k,storage_grow_unit=4M"),
    Image("compact-metadata", DISK, "compact_image=on,chunk_size=256k,preallocation=metadata,journal_size=1M"),
]
direct = direct_io(suite.dir)
modes = [("writeback", "threads"), ("writeback", "io_uring")]
if direct:
    modes += [("none", "io_uring"), ("none", "native")]
with suite.test("%d kills" % CYCLES):
    total_writes = total_flushes = 0
    for cycle in range(CYCLES):
        image = images[cycle // 2 % len(images)]
        cache, aio = modes[(cycle // 2 + cycle // 2 // len(images)) % len(modes)]
        # Some kills hit the open and the first commit, some the journal's turn.
        seconds = rnd.choice([0.05, 0.2, 0.5, 1.0, 1.5]) * (0.7 + 0.6 * rnd.random())
        target = kill_qemu_io if cycle % 2 else kill_daemon
        what = "cycle %d: %s, %s, %s/%s, %.2f s" % (cycle, target.__name__, os.path.basename(image.path), cache, aio, seconds)
        try:
            model, writes, flushes = target(image, cache, aio, seconds)
            image.after(model, what)
        except Failure as error:
            raise Failure("%s\n%s" % (what, error))
        total_writes += writes
        total_flushes += flushes
        if VERBOSE:
            print("# %s: %d writes, %d flushes" % (what, writes, flushes))
    print("# %d writes and %d flushes answered before the kills" % (total_writes, total_flushes))
    check(total_flushes > CYCLES and total_writes > 10 * CYCLES, "only %d writes, %d flushes: the test was idle",
          total_writes, total_flushes)
suite.finish()
