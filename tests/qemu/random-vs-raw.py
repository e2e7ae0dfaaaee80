#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Random operations on an FVD image and on a raw file: both must read the same.

Each case is one image (base, block size, cache mode, ...) and some batches. A batch is one
qemu-io process with random commands, the same on both files; then qemu-img compare, check
and map, sometimes convert and resize.

A discard is done on the image only: what it covers may read as before or as zero, until it
is written again. Such bytes are checked for that and then copied to the raw file.

Environment: see common.py; BATCHES (6) for longer runs; ONLY=text runs the cases whose name has it.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import KIB, MIB, SECTOR, Failure, Skip, Suite, check, check_clean, direct_io, img, io, run, run_json

BATCHES = int(os.environ.get("BATCHES", "6"))
ONLY = os.environ.get("ONLY", "")
suite = Suite("random")
rnd = suite.random


def pick_range(size, borders, align=None):
    """Offset and length; small and large, aligned and not, often at a border."""
    align = align or rnd.choice([1, SECTOR, 4096, 4096, 64 * KIB])
    length = rnd.choice([1, 17, SECTOR, 4096, 4097, 64 * KIB, 100001, 300 * KIB, MIB])
    length = max(align, length // align * align)
    border = rnd.choice([0, size, size // 2, MIB, 2 * MIB, 64 * KIB * rnd.randrange(1 + size // (64 * KIB)),
                         *borders])
    offset = rnd.choice([rnd.randrange(size), border, border - length, border - length // 2])
    offset = max(0, min(offset, size - 1)) // align * align
    length = min(length, size - offset) // align * align
    return (offset, length) if length > 0 else (0, min(align, size))


def write_base(path, size):
    """A raw file with data, written zeroes and holes, not all of them aligned to blocks."""
    with open(path, "wb") as f:
        f.truncate(size)
        at = 0
        while at < size:
            length = min(rnd.choice([SECTOR, 4096, 20 * KIB, 64 * KIB, 300 * KIB]), size - at)
            kind = rnd.randrange(3)
            f.seek(at)
            if kind == 0:
                f.write(rnd.randbytes(length))
            elif kind == 1:
                f.write(bytes(length))
            at += length
        f.truncate(size)


class Case:
    def __init__(self, name, size, base=None, base_format="raw", options=(), cache="writeback", aio="threads",
                 shorter_by=0, hole=None):
        self.name, self.size, self.cache, self.aio = name, size, cache, aio
        self.fvd, self.raw = suite.path(name + ".img"), suite.path(name + ".raw")
        self.borders = [size, min(size, base or size)]  # where copy-on-write ends, where the disk ended once
        self.discarded = []         # ranges that may read as before or as zero
        options = list(options)
        if base is not None:
            base_raw, base_path = suite.path(name + ".base.raw"), suite.path(name + ".base")
            write_base(base_raw, base)
            img("convert", "-f", "raw", "-O", base_format, base_raw, base_path)
            if hole:
                options.append("detect_sparse_hole=%s" % hole)
            words = ["-b", os.path.basename(base_path), "-F", base_format]
            with open(base_raw, "rb") as f:
                content = f.read(size)
        else:
            words, content = [], b""
        if options:
            words += ["-o", ",".join(options)]
        img("create", "-q", "-f", "fvd", *words, self.fvd, str(size))
        with open(self.raw, "wb") as f:
            f.write(content)
            f.truncate(size)

    def commands(self):
        """For the image and for the raw file; those of a batch of asynchronous ones never overlap."""
        both, only = [], []

        def add(command, mirror=True):
            only.append(command)
            if mirror:
                both.append(command)

        size = self.size
        for _ in range(rnd.randrange(8, 25)):
            kind = rnd.randrange(100)
            offset, length = pick_range(size, self.borders)
            pattern = rnd.randrange(1, 256)
            flags = rnd.choice(["", "", "-f "])
            if kind < 40:
                add("write -q %s-P %d %d %d" % (flags, pattern, offset, length))
                self.written(offset, length)
                if rnd.randrange(3) == 0:
                    add("read -q -P %d %d %d" % (pattern, offset, length))
            elif kind < 60:
                add("write -q %s-z %s%d %d" % (flags, rnd.choice(["", "-u "]), offset, length))
                self.written(offset, length)
                if rnd.randrange(3) == 0:
                    add("read -q -P 0 %d %d" % (offset, length))
            elif kind < 68:
                offset, length = pick_range(size, self.borders, SECTOR)
                add("discard -q %d %d" % (offset, length), mirror=False)
                self.discarded.append((offset, offset + length))
            elif kind < 76:
                add("flush")
            elif kind < 80:
                # Reading and opening again must not depend on what is dirty.
                add("reopen -r")
                add("read -q %d %d" % (offset, length))
                add("reopen -w")
            else:
                # Neighbours in flight together; borders inside one block and one sector.
                at = offset
                for _ in range(rnd.randrange(2, 9)):
                    piece = rnd.choice([1, 100, SECTOR, 3000, 4096, 40000])
                    piece = min(piece, size - at)
                    if piece <= 0:
                        break
                    if rnd.randrange(5):
                        add("aio_write -q -P %d %d %d" % (rnd.randrange(1, 256), at, piece))
                    else:
                        add("aio_write -q -z %d %d" % (at, piece))
                    self.written(at, piece)
                    if rnd.randrange(4) == 0:
                        add("aio_read -q %d %d" % (at, piece), mirror=False)
                    at += piece
                add("aio_flush")
        return only, both

    def written(self, offset, length):
        """The range has a known content again."""
        end, left = offset + length, []
        for a, b in self.discarded:
            if b <= offset or a >= end:
                left.append((a, b))
                continue
            if a < offset:
                left.append((a, offset))
            if b > end:
                left.append((end, b))
        self.discarded = left

    def batch(self):
        only, both = self.commands()
        try:
            io(self.fvd, *only, args=["-t", self.cache, "-i", self.aio, "-d", "unmap"])
            io(self.raw, *both, fmt="raw")
            self.settle()
            out = img("compare", "-f", "fvd", "-F", "raw", self.fvd, self.raw, status=(0, 1))
            check("Images are identical" in out, "%s", out)
            check_clean(self.fvd)
            self.map()
        except Failure as error:
            raise Failure("%s\nthe batch was: %s" % (error, "; ".join(only)))

    def settle(self):
        if not self.discarded:
            return
        img("convert", "-f", "fvd", "-O", "raw", self.fvd, self.raw + ".now")
        with open(self.raw + ".now", "rb") as now, open(self.raw, "r+b") as old:
            for a, b in self.discarded:
                # By sectors of the disk: writes after the discard may have left parts of some.
                for sector in range(a // SECTOR * SECTOR, b, SECTOR):
                    at, length = max(a, sector), min(b, sector + SECTOR) - max(a, sector)
                    now.seek(at)
                    old.seek(at)
                    got, was = now.read(length), old.read(length)
                    check(got in (was, bytes(length)), "the discarded sector at %d is neither old nor zero", at)
                    old.seek(at)
                    old.write(got)
        os.unlink(self.raw + ".now")
        self.discarded = []

    def map(self):
        """Every extent lies where map says; together they are the disk."""
        extents = run_json("qemu-img", "map", "--output=json", "-f", "fvd", self.fvd)
        end = 0
        with open(self.raw, "rb") as raw, open(self.fvd, "rb") as image:
            for extent in extents:
                start, length = extent["start"], extent["length"]
                check(start == end and length > 0, "map: hole or overlap at %d: %s", end, json.dumps(extent))
                end = start + length
                raw.seek(start)
                content = raw.read(length)
                if extent["zero"]:
                    check(content == bytes(length), "map: %d+%d is no zeroes", start, length)
                elif extent["data"] and extent["depth"] == 0 and "offset" in extent:
                    image.seek(extent["offset"])
                    # Past the file's end a sparse file reads as zero.
                    found = image.read(length).ljust(length, b"\0")
                    check(content == found, "map: %d+%d is not at %d of the file", start, length, extent["offset"])
        check(end == self.size, "map ends at %d, the disk at %d", end, self.size)

    def grow(self):
        by = rnd.choice([SECTOR, 4096, 64 * KIB - SECTOR, MIB, 3 * MIB + SECTOR])
        self.size += by
        self.borders.append(self.size)
        if rnd.randrange(2):
            mode = rnd.choice(["off", "off", "metadata", "falloc", "full"])
            img("resize", "-q", "-f", "fvd", "--preallocation=" + mode, self.fvd, "+%d" % by)
        else:
            io(self.fvd, "truncate %d" % self.size, "read -q -P 0 %d %d" % (self.size - by, by))
        os.truncate(self.raw, self.size)
        size = run_json("qemu-img", "info", "--output=json", "-f", "fvd", self.fvd)["virtual-size"]
        check(size == self.size, "after growth the size is %d, not %d", size, self.size)

    def convert(self):
        """To other formats and back, whole and as an overlay of its own content."""
        out = suite.path("converted")
        fmt = rnd.choice(["raw", "qcow2", "fvd"])
        extra = rnd.choice([[], ["-S", "0"], ["-n"], ["-W", "-m", "4"]])
        options = ["-o", "compact_image=on,chunk_size=64k"] if fmt == "fvd" and rnd.randrange(2) else []
        if extra == ["-n"]:
            img("create", "-q", "-f", fmt, *options, out, str(self.size))
        else:
            extra = extra + options
        img("convert", *extra, "-f", "fvd", "-O", fmt, self.fvd, out)
        img("compare", "-q", "-f", fmt, "-F", "raw", out, self.raw)
        if fmt == "fvd":
            check_clean(out)
        os.unlink(out)


def run_case(*args, **more):
    name = args[0]
    if ONLY not in name:
        return
    with suite.test(name):
        if more.get("cache") == "none" and not direct_io(suite.dir):
            raise Skip("the scratch folder's file system has no O_DIRECT")
        case = Case(*args, **more)
        for number in range(BATCHES):
            case.batch()
            if number % 2 == 0:
                case.grow()
                case.batch()
            if number == BATCHES - 1:
                case.convert()
        for path in os.listdir(suite.dir):
            os.unlink(suite.path(path))


BLOCKS = {"4k": 4 * KIB, "64k": 64 * KIB, "2M": 2 * MIB}
MODES = [("writeback", "threads"), ("none", "threads"), ("none", "native"), ("none", "io_uring"),
         ("writeback", "io_uring"), ("unsafe", "threads"), ("directsync", "native"), ("writethrough", "threads")]

turn = 0
for text, block in BLOCKS.items():
    for base in ("shorter", "equal", "longer"):
        for hole in (None, "on"):
            cache, aio = MODES[turn % len(MODES)]
            turn += 1
            size = rnd.choice([4 * MIB, 6 * MIB + SECTOR, 9 * MIB + 8 * KIB])
            if base == "equal":
                length = size
            elif base == "shorter":
                length = size - rnd.choice([SECTOR, 4096, MIB, 3 * MIB + 1024])
            else:
                length = size + rnd.choice([SECTOR, 4096, MIB + 1536])
            run_case("block-%s-base-%s%s-%s-%s" % (text, base, "-holes" if hole else "", cache, aio), size, base=length,
                     options=["block_size=%s" % text, "journal_size=1M"], hole=hole, cache=cache, aio=aio)
for cache, aio in MODES:
    run_case("no-base-%s-%s" % (cache, aio), 5 * MIB + rnd.choice([0, SECTOR, 12 * KIB]), cache=cache, aio=aio)
for mode in ("metadata", "falloc", "full"):
    run_case("no-base-preallocation-%s" % mode, 4 * MIB, options=["preallocation=%s" % mode])
run_case("base-preallocation-full", 4 * MIB, base=5 * MIB, options=["preallocation=full", "block_size=64k"])
run_case("base-qcow2", 4 * MIB, base=4 * MIB, base_format="qcow2", options=["block_size=64k"], hole="128k")
run_case("base-fvd", 4 * MIB, base=3 * MIB, base_format="fvd", hole="on")
run_case("base-odd-holes-default-block", 7 * MIB, base=3 * MIB + 512, hole="1M", cache="none", aio="io_uring")
# Compact: chunks of many sizes, growth steps of one chunk and of many, all kinds of bases.
turn = 0
for chunk in ("64k", "128k", "1M", "2M"):
    for base in (None, "shorter", "longer"):
        cache, aio = MODES[turn % len(MODES)]
        turn += 1
        size = rnd.choice([4 * MIB, 6 * MIB + SECTOR, 9 * MIB + 8 * KIB])
        length = {None: None, "shorter": size - rnd.choice([SECTOR, 4096, MIB, 3 * MIB + 1024]),
                  "longer": size + rnd.choice([SECTOR, 4096, MIB + 1536])}[base]
        unit = rnd.choice([chunk, "2M", "64M"])
        options = ["compact_image=on", "chunk_size=" + chunk, "storage_grow_unit=" + unit, "journal_size=1M"]
        if base:
            options.append("block_size=" + rnd.choice(["4k", "16k", "64k"]))
        run_case("compact-%s-base-%s-%s-%s" % (chunk, base, cache, aio), size, base=length, options=options,
                 hole=rnd.choice([None, "on"]) if base else None, cache=cache, aio=aio)
for mode in ("metadata", "falloc", "full"):
    run_case("compact-preallocation-%s" % mode, 4 * MIB, options=["compact_image=on", "preallocation=%s" % mode])
run_case("compact-base-qcow2", 4 * MIB, base=4 * MIB, base_format="qcow2", hole="128k",
         options=["compact_image=on", "chunk_size=256k", "block_size=64k"])
run_case("compact-defaults-base-fvd", 4 * MIB, base=3 * MIB, base_format="fvd", options=["compact_image=on"])
suite.finish()
