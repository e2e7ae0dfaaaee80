#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Chains of images: commit, rebase, stream, mirror, external snapshots, on fvd and on qcow2.

Each scenario runs on both formats with the same random writes. What a disk reads as is kept
in a model in memory; each image of the chain must read as the model says, byte by byte, and
where the two formats promise the same, the qcow2 run shows that the model is right. fvd
differs where docs/architecture.md says so: what was written while an image had no bitmap is in
the image for good ("What has no bit is in the image").

Environment: see common.py.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import KIB, MIB, NBD, Daemon, Failure, Suite, check, img, io, run_json, stamps

suite = Suite("chains")
rnd = suite.random
FORMATS = tuple((os.environ.get("FORMATS") or "fvd qcow2").split())
UNIT = 512
serial = 0


def fresh(name):
    global serial
    serial += 1
    return suite.path("%s-%d" % (name, serial))


def shown(path, fmt):
    """What an image reads as, with its chain."""
    out = fresh("shown")
    img("convert", "-f", fmt, "-O", "raw", path, out)
    with open(out, "rb") as f:
        data = f.read()
    os.unlink(out)
    return data


def same(path, fmt, model, what):
    """The image reads as `model`, and a check finds nothing."""
    got = shown(path, fmt)
    check(len(got) == len(model), "%s (%s): %d bytes, not %d", what, fmt, len(got), len(model))
    if got != bytes(model):
        wrong = [at for at in range(0, len(got), UNIT) if got[at:at + UNIT] != model[at:at + UNIT]]
        raise Failure("%s (%s): %d sectors differ, the first at %d: %s instead of %s" % (
            what, fmt, len(wrong), wrong[0], got[wrong[0]:][:16].hex(), bytes(model[wrong[0]:][:16]).hex()))
    img("check", "-q", "-f", fmt, path)


def at_end(model, size):
    """A model, cut or continued with zeroes to `size` bytes."""
    return bytearray(model[:size]) + bytearray(max(0, size - len(model)))


class Image:
    """One image and what it reads as. `plan` is a list of writes, the same for both formats."""

    def __init__(self, fmt, size, base=None, options="", tag="i"):
        self.fmt, self.size, self.base = fmt, size, base
        self.path = fresh("%s.%s" % (tag, fmt))
        words = ["-b", base.path, "-F", base.fmt] if base else []
        if options and fmt == "fvd":
            words += ["-o", options]
        img("create", "-q", "-f", fmt, *words, self.path, str(size))
        self.model = at_end(base.model, size) if base else bytearray(size)

    def write(self, plan):
        commands = []
        for kind, offset, length, number in plan:
            if offset >= self.size:
                continue
            length = min(length, self.size - offset)
            if kind == "zero":
                commands.append("write -q -z %d %d" % (offset, length))
                self.model[offset:offset + length] = bytes(length)
            elif kind == "unmap":
                commands.append("write -q -z -u %d %d" % (offset, length))
                self.model[offset:offset + length] = bytes(length)
            else:
                commands.append("write -q -P %d %d %d" % (number, offset, length))
                self.model[offset:offset + length] = bytes([number]) * length
        io(self.path, *commands, fmt=self.fmt)
        return self

    def same(self, what):
        same(self.path, self.fmt, self.model, what)

    def resize(self, size, zeroes=True):
        img("resize", "-q", "-f", self.fmt, self.path, str(size))
        self.model = at_end(self.model, size)
        self.size = size


def raw(size, number=None):
    """A raw base: every sector says where it is."""
    image = Image.__new__(Image)
    image.fmt, image.size, image.base, image.path = "raw", size, None, fresh("base.raw")
    image.model = bytearray(stamps(0, size // 512, number or rnd.randrange(1, 1 << 30)))
    with open(image.path, "wb") as f:
        f.write(image.model)
    return image


def plan(size, count=14, zeroes=True):
    out = []
    for _ in range(count):
        length = rnd.choice([512, 512, 3000, 4096, 10000, 65536, 150000])
        kind = rnd.choice(["data"] * 5 + (["zero", "unmap"] if zeroes else []))
        out.append((kind, rnd.randrange(size - 1), length, rnd.randrange(1, 256)))
    # The last byte, too.
    return out + [("data", size - 512, 512, rnd.randrange(1, 256))]


def backing(path, fmt="fvd"):
    return run_json("qemu-img", "info", "--output=json", "-f", fmt, path).get("backing-filename")


def blocks_present(path):
    """Bytes the image itself holds below what its base covers, by qemu-img map."""
    return sum(e["length"] for e in run_json("qemu-img", "map", "--output=json", "-f", "fvd", path) if e["depth"] == 0 and e["present"])


def on_both(name):
    """Runs a scenario once for each format with the same random numbers."""
    def wrap(function):
        with suite.test(name):
            state = rnd.getstate()
            for fmt in FORMATS:
                rnd.setstate(state)
                function(fmt)
        return function
    return wrap


OPTIONS = ["block_size=4k,journal_size=1M", "block_size=64k,journal_size=1M", "block_size=2M,journal_size=1M",
           "compact_image=on,chunk_size=128k,block_size=16k,journal_size=1M"]

# --- qemu-img commit ------------------------------------------------------------

for options in OPTIONS:
    for flag in ((), ("-d",)):
        for base_size, size in ((4 * MIB, 4 * MIB), (3 * MIB + 512, 6 * MIB), (6 * MIB, 4 * MIB)):
            @on_both("commit %s: %s, base of %d over %d bytes" % (" ".join(flag) or "and empty", options, base_size, size))
            def _(fmt, options=options, flag=flag, base_size=base_size, size=size):
                base = raw(base_size)
                mid = Image(fmt, base_size, base, options).write(plan(base_size))
                top = Image(fmt, size, mid, options).write(plan(size))
                top.same("before")
                img("commit", "-q", "-f", fmt, *flag, top.path)
                # A base shorter than its overlay grows; a longer one keeps its end.
                kept = mid.model[size:]
                mid.model = bytearray(top.model) + kept
                mid.same("the base after")
                top.same("the overlay after")
                if not flag and fmt == "fvd":
                    # Emptied: it holds nothing below the base's end any more, so the base shows through.
                    check(blocks_present(top.path) == 0, "%d bytes are still in the overlay", blocks_present(top.path))
                if not flag:
                    mid.write([("data", 70000, 5000, 77)])
                    top.model[70000:75000] = bytes([77]) * 5000
                    top.same("the overlay after a write to its base")
                if flag:
                    top.write(plan(size, 5))
                    top.same("the overlay, not emptied, written again")
                else:
                    top.write(plan(size, 10))
                    top.same("the emptied overlay written again")
                    img("commit", "-q", "-f", fmt, top.path)
                    mid.model = bytearray(top.model) + kept
                    mid.same("the base after a second commit")
                    top.same("the overlay after a second commit")


@on_both("a chain of three: commit the top, then across the middle (-b), then into raw")
def _(fmt):
    base = raw(2 * MIB)
    one = Image(fmt, 3 * MIB, base, OPTIONS[1]).write(plan(3 * MIB))
    two = Image(fmt, 4 * MIB, one, OPTIONS[0]).write(plan(4 * MIB))
    three = Image(fmt, 5 * MIB, two, OPTIONS[1]).write(plan(5 * MIB))
    img("commit", "-q", "-f", fmt, three.path)
    two.model = bytearray(three.model)
    for image in (one, two, three):
        image.same("after the first commit")
    three.write(plan(5 * MIB, 6))
    img("commit", "-q", "-f", fmt, "-b", one.path, three.path)
    one.model = bytearray(three.model)
    one.same("after the commit across the middle")
    one.write([("data", 5 * MIB - 600, 600, 9)])
    img("commit", "-q", "-f", fmt, one.path)
    one.same("after the commit into raw")
    check(os.path.getsize(base.path) == 5 * MIB, "raw has %d bytes", os.path.getsize(base.path))
    with open(base.path, "rb") as f:
        check(f.read() == bytes(one.model), "raw reads otherwise")


# --- qemu-img rebase ------------------------------------------------------------

for options in OPTIONS[:2]:
    @on_both("rebase, safe: longer, shorter, other format, none; then a base again: %s" % options)
    def _(fmt, options=options):
        first = raw(2 * MIB + 1536)
        top = Image(fmt, 5 * MIB, first, options).write(plan(4 * MIB))
        longer, shorter, other = raw(5 * MIB), raw(MIB - 512), Image("qcow2", 6 * MIB, None).write(plan(6 * MIB))
        for base in (longer, shorter, other, first, longer):
            img("rebase", "-f", fmt, "-b", base.path, "-F", base.fmt, top.path)
            check(backing(top.path, fmt) == base.path, "another base is named")
            top.same("rebased to %s of %d bytes" % (base.fmt, base.size))
            top.write(plan(5 * MIB, 2))
            top.same("written after the rebase")
        img("rebase", "-f", fmt, "-b", "", top.path)
        check(backing(top.path, fmt) is None, "a base is still named")
        top.same("rebased to none")
        for base in (longer, shorter, first):
            os.unlink(base.path)            # nothing of them may be needed
        top.same("with the bases gone")


@on_both("rebase -u: what the image does not hold shows the new base, by name only")
def _(fmt):
    first = raw(2 * MIB)
    top = Image(fmt, 4 * MIB, first, OPTIONS[0]).write([("data", 0, 8192, 5), ("data", MIB, 4096, 6), ("zero", MIB + 65536, 65536, 0)])
    twin = raw(2 * MIB)
    img("rebase", "-u", "-f", fmt, "-b", twin.path, "-F", "raw", top.path)
    held = [(0, 8192), (MIB, 4096), (MIB + 65536, 65536)]
    expect = at_end(twin.model, 4 * MIB)
    for at, length in held:
        if fmt == "qcow2":          # its unit is 64 KiB: the rest of it is a copy
            at, length = at // 65536 * 65536, -(-length // 65536) * 65536
        expect[at:at + length] = top.model[at:at + length]
    top.model = expect
    top.same("unsafely to a base of the same length")
    short = raw(MIB)
    img("rebase", "-u", "-f", fmt, "-b", short.path, "-F", "raw", top.path)
    expect = at_end(short.model, 4 * MIB)
    for at, length in held:
        if fmt == "qcow2":
            at, length = at // 65536 * 65536, -(-length // 65536) * 65536
        expect[at:at + length] = top.model[at:at + length]
    top.model = expect
    top.same("unsafely to a shorter base")
    # A longer one: beyond the first bitmap qcow2 shows it, fvd has the zeroes for good.
    long = raw(4 * MIB)
    img("rebase", "-u", "-f", fmt, "-b", long.path, "-F", "raw", top.path)
    expect = bytearray(long.model)
    for at, length in held:
        if fmt == "qcow2":
            at, length = at // 65536 * 65536, -(-length // 65536) * 65536
        expect[at:at + length] = top.model[at:at + length]
    if fmt == "fvd":
        expect[2 * MIB:] = bytes(2 * MIB)
    top.model = expect
    top.same("unsafely to a longer base")
    other = Image("qcow2", 4 * MIB, None).write(plan(4 * MIB))
    img("rebase", "-u", "-f", fmt, "-b", other.path, "-F", "qcow2", top.path)
    check(backing(top.path, fmt) == other.path, "another base is named")
    img("rebase", "-u", "-f", fmt, "-b", "", top.path)
    check(backing(top.path, fmt) is None, "a base is still named")
    expect = bytearray(4 * MIB)
    for at, length in held:
        if fmt == "qcow2":
            at, length = at // 65536 * 65536, -(-length // 65536) * 65536
        expect[at:at + length] = top.model[at:at + length]
    top.model = expect
    top.same("unsafely to none")


@on_both("a first base for a disk written without one, and back to it by commit")
def _(fmt):
    top = Image(fmt, 3 * MIB, None, "journal_size=1M").write(plan(3 * MIB))
    base = Image(fmt, 2 * MIB, None).write([("data", 0, 2 * MIB, 9)])
    img("rebase", "-f", fmt, "-b", base.path, "-F", fmt, top.path)
    top.same("with its first base")
    top.write(plan(3 * MIB, 4))
    top.same("written")
    img("commit", "-q", "-f", fmt, top.path)
    top.same("committed")
    base.model = bytearray(top.model)
    base.same("the base")


@on_both("resize after an enlarged bitmap: metadata that lay behind the disk moves")
def _(fmt):
    base = raw(MIB)
    top = Image(fmt, 6 * MIB, base, OPTIONS[0]).write(plan(6 * MIB))
    img("rebase", "-f", fmt, "-b", raw(6 * MIB).path, "-F", "raw", top.path)
    for size in (7 * MIB, 7 * MIB + 512, 40 * MIB, 41 * MIB):
        top.resize(size)
        top.same("grown to %d" % size)
        top.write(plan(size, 5))
        top.same("written after the growth to %d" % size)
    longer = raw(41 * MIB)
    img("rebase", "-f", fmt, "-b", longer.path, "-F", "raw", top.path)
    top.same("with a base as long as that")
    top.resize(64 * MIB)
    top.write([("data", 41 * MIB - 5000, 10000, 3)])
    top.same("grown once more")


# --- jobs over QMP --------------------------------------------------------------


class Nodes:
    """A storage daemon with a writable export of one node."""

    def __init__(self):
        self.daemon = Daemon("--object", "iothread,id=io0", "--nbd-server",
                             "addr.type=unix,addr.path=%s" % suite.path("nbd-%d" % serial))
        self.sock = suite.path("nbd-%d" % serial)
        self.qmp = self.daemon.qmp

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return self.daemon.__exit__(*exc)

    def add(self, name, image, **more):
        self.qmp("blockdev-add", driver=image.fmt, node_name=name, discard="unmap",
                 file={"driver": "file", "filename": image.path, "discard": "unmap"}, **more)

    def chain(self, images):
        """Nodes n0 (the base) to nN; the raw base is read-only at first."""
        for at, image in enumerate(images):
            more = {"backing": "n%d" % (at - 1)} if at else {}
            if at < len(images) - 1:
                more["read_only"] = True
            self.add("n%d" % at, image, **more)

    def export(self, node, iothread=True):
        self.qmp("block-export-add", id="e", type="nbd", node_name=node, name="e", writable=True,
                 **({"iothread": "io0"} if iothread else {}))
        return NBD(self.sock, "e")

    def done(self, link):
        link.flush()
        link.close()
        self.qmp("block-export-del", id="e", mode="hard")


def nbd_write(link, image, offset, data):
    link.write(offset, data)
    image.model[offset:offset + len(data)] = data


def three(fmt):
    base = Image(fmt, 2 * MIB, None).write(plan(2 * MIB))
    mid = Image(fmt, 3 * MIB, base, OPTIONS[0]).write(plan(3 * MIB))
    top = Image(fmt, 4 * MIB, mid, OPTIONS[1]).write(plan(4 * MIB))
    return base, mid, top


@on_both("block-stream: everything, and down to a base, while the disk is written to")
def _(fmt):
    for to in (None, "n0"):
        base, mid, top = three(fmt)
        with Nodes() as nodes:
            nodes.chain((base, mid, top))
            # In an iothread QEMU 10.0 fails an assertion of bdrv_insert_node(), with qcow2 as with fvd.
            link = nodes.export("n2", iothread=False)
            nbd_write(link, top, 5000, b"\x42" * 3000)
            nodes.qmp("block-stream", job_id="s", device="n2", auto_dismiss=False, **({"base_node": to} if to else {}))
            nbd_write(link, top, 100000, b"\x43" * 70000)
            nodes.qmp.wait_job("s")
            nbd_write(link, top, 3 * MIB + 100, b"\x44" * 1000)
            check(link.read(0, 4 * MIB) == bytes(top.model), "after the stream the disk reads otherwise (%s)", fmt)
            nodes.done(link)
        check(backing(top.path, fmt) == (base.path if to else None), "the base is now '%s'", backing(top.path, fmt))
        top.same("after the stream")
        mid.same("the middle")
        base.same("the base")


@on_both("block-commit: active with pivot, and the middle one into its base")
def _(fmt):
    base, mid, top = three(fmt)
    with Nodes() as nodes:
        nodes.chain((base, mid, top))
        link = nodes.export("n2")
        nbd_write(link, top, 5000, b"\x42" * 3000)
        nodes.qmp("block-commit", job_id="c", device="n2", top_node="n1", base_node="n0", auto_dismiss=False)
        nbd_write(link, top, 100000, b"\x43" * 70000)
        nodes.qmp.wait_job("c")
        base.model = bytearray(mid.model)
        check(link.read(0, 4 * MIB) == bytes(top.model), "after the first commit the disk reads otherwise (%s)", fmt)
        nbd_write(link, top, 2 * MIB - 100, b"\x44" * 1000)
        nodes.qmp("block-commit", job_id="a", device="n2", auto_dismiss=False)
        nbd_write(link, top, 3 * MIB - 1000, b"\x45" * 70000)
        nodes.qmp.wait_job("a")
        base.model = bytearray(top.model)
        base.size = 4 * MIB
        # Pivoted: what is written now goes to the base.
        nbd_write(link, base, 2 * MIB, b"\x46" * 5000)
        check(link.read(0, 4 * MIB) == bytes(base.model), "after the pivot the disk reads otherwise (%s)", fmt)
        nodes.done(link)
    check(backing(base.path, fmt) is None, "the base has a base")
    base.same("after both commits")


@on_both("blockdev-mirror sync=top into an overlay that gets its base at the pivot")
def _(fmt):
    base, mid, top = three(fmt)
    copy = Image(fmt, 4 * MIB, mid, OPTIONS[0])
    with Nodes() as nodes:
        nodes.chain((base, mid, top))
        nodes.add("copy", copy, backing="n1")
        link = nodes.export("n2")
        nbd_write(link, top, 5000, b"\x42" * 3000)
        nodes.qmp("blockdev-mirror", job_id="m", device="n2", target="copy", sync="top", auto_dismiss=False)
        nbd_write(link, top, 100000, b"\x43" * 70000)
        nodes.qmp.wait_job("m")
        copy.model = bytearray(top.model)
        nbd_write(link, copy, 3 * MIB + 1000, b"\x44" * 1000)
        check(link.read(0, 4 * MIB) == bytes(copy.model), "after the pivot the disk reads otherwise (%s)", fmt)
        nodes.done(link)
    check(backing(copy.path, fmt) == mid.path, "the copy's base is '%s'", backing(copy.path, fmt))
    copy.same("the copy")
    top.same("the source")


def snapshots(fmt, named, late):
    """libvirt's way: the overlay is created by names, opened with backing:null, then put on top."""
    disk = Image(fmt, 2 * MIB, None).write(plan(2 * MIB))
    with Nodes() as nodes:
        nodes.add("d0", disk)
        link = nodes.export("d0")
        nbd_write(link, disk, 5000, b"\x42" * 3000)
        below, at = disk, 0
        for at in range(1, 4):
            path = fresh("over.%s" % fmt)
            open(path, "wb").close()
            nodes.qmp("blockdev-add", driver="file", node_name="s%d" % at, filename=path)
            names = {"backing-file": below.path, "backing-fmt": fmt} if named else {}
            nodes.qmp.create(driver=fmt, file="s%d" % at, size=2 * MIB, **names)
            nodes.qmp("blockdev-add", driver=fmt, node_name="d%d" % at, file="s%d" % at, backing=None, discard="unmap")
            nodes.qmp("blockdev-snapshot", node="d%d" % (at - 1), overlay="d%d" % at)
            over = Image.__new__(Image)
            over.fmt, over.size, over.base, over.path, over.model = fmt, 2 * MIB, below, path, bytearray(below.model)
            check(link.read(0, 2 * MIB) == bytes(over.model), "the new overlay reads otherwise (%s)", fmt)
            for offset in (at * 70000, at * 131072 + 100, 2 * MIB - 512):
                nbd_write(link, over, offset, bytes([0x50 + at]) * min(3000, 2 * MIB - offset))
            check(link.read(0, 2 * MIB) == bytes(over.model), "the overlay reads otherwise once written (%s)", fmt)
            below = over
        chain = [disk]
        node = below
        while node is not disk:
            chain.insert(1, node)
            node = node.base
        if late:
            nodes.qmp("block-commit", job_id="a", device="d3", base_node="d0", auto_dismiss=False)
            nodes.qmp.wait_job("a")
            disk.model = bytearray(below.model)
            nbd_write(link, disk, 12345, b"\x61" * 100)
            check(link.read(0, 2 * MIB) == bytes(disk.model), "after the pivot the disk reads otherwise (%s)", fmt)
        nodes.done(link)
    if late:
        disk.same("committed")
    else:
        for image in chain:
            if named:
                image.same("offline")


for named in (True, False):
    for late in (False, True):
        @on_both("three external snapshots on overlays opened with backing:null, %s%s" % (
            "base named at creation" if named else "created without a base", ", then an active commit of all" if late else ""))
        def _(fmt, named=named, late=late):
            snapshots(fmt, named, late)

suite.finish()
