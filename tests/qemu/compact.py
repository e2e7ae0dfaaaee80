#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compact images as people use them: options, figures, small files, devices with old bytes, full devices.

The guest that is stopped by a full device is a disk controller driven through QEMU's qtest
socket, so that no guest system is needed. Tests on devices need root (loop devices).

Environment: see common.py; CYCLES (100) of filling and discarding.
"""

import json
import os
import socket
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import (BIN, KIB, MIB, NBD, QMP, SECTOR, VERBOSE, Daemon, Failure, Loop, NBDError, Skip, Suite, check, check_clean,
                    img, io, program, quote, run, run_json, wait_for)

CYCLES = int(os.environ.get("CYCLES", "100"))
suite = Suite("compact")
rnd = suite.random
STEP = MIB                      # growth steps of most images here
SMALL = "compact_image=on,chunk_size=64k,storage_grow_unit=1M,journal_size=1M"


def has(text, *parts):
    for part in parts:
        check(part in text, "'%s' is not in: %s", part, text.strip())


def create(path, size, options=SMALL, base=None):
    img("create", "-q", "-f", "fvd", *(["-b", base, "-F", "raw"] if base else []), "-o", options, path, str(size))
    return path


def data_of(path):
    return run_json("qemu-img", "info", "-U", "--output=json", "-f", "fvd", path)["format-specific"]["data"]


def stored(path):
    return os.stat(path).st_blocks * 512


def node(name, path, driver="file", **more):
    return dict({"driver": "fvd", "node-name": name, "discard": "unmap",
                 "file": {"driver": driver, "filename": path, "discard": "unmap"}}, **more)


class Machine:
    """A PC whose IDE disk we drive ourselves: no processor runs."""

    def __init__(self, *args):
        ours, theirs = socket.socketpair()
        test, test_theirs = socket.socketpair()
        words = [program("qemu-system-x86_64"), "-M", "pc", "-accel", "qtest", "-display", "none", "-nodefaults",
                 "-chardev", "socket,id=qmp,fd=%d" % theirs.fileno(), "-mon", "chardev=qmp,mode=control",
                 "-chardev", "socket,id=qtest,fd=%d" % test_theirs.fileno(), "-qtest", "chardev:qtest", "-qtest-log", "/dev/null", *args]
        if VERBOSE:
            print("# $ " + quote(words), flush=True)
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno(), test_theirs.fileno()])
        theirs.close()
        test_theirs.close()
        test.settimeout(60)
        self.sock, self.lines = test, test.makefile("r")
        self.qmp = QMP(ours)

    def test(self, text):
        self.sock.sendall((text + "\n").encode())
        while True:
            line = self.lines.readline()
            check(line, "qtest closed")
            if line.startswith("OK"):
                return line.split()[1:]
            check(line.startswith("IRQ"), "qtest: %s: %s", text, line)

    def status(self):
        return int(self.test("inb 0x1f7")[0], 16)

    def command(self, command, sector, count=1):
        wait_for(lambda: not self.status() & 0x80, "the disk's being ready")
        for port, value in ((0x1f6, 0xe0 | sector >> 24), (0x1f2, count), (0x1f3, sector & 255), (0x1f4, sector >> 8 & 255),
                            (0x1f5, sector >> 16 & 255), (0x1f7, command)):
            self.test("outb 0x%x 0x%x" % (port, value))

    def begin_write(self, sector, byte):
        """One sector; not waited for."""
        self.command(0x30, sector)
        wait_for(lambda: self.status() & 0x88 == 0x08, "the disk's asking for data")
        for _ in range(SECTOR // 4):
            self.test("outl 0x1f0 0x%x" % (byte * 0x01010101))

    def write(self, sector, byte):
        self.begin_write(sector, byte)
        wait_for(lambda: not self.status() & 0x80, "the end of the write")
        check(not self.status() & 0x21, "the write failed")

    def read(self, sector):
        self.command(0x20, sector)
        wait_for(lambda: self.status() & 0x88 == 0x08, "the disk's data")
        words = [int(self.test("inl 0x1f0")[0], 16) for _ in range(SECTOR // 4)]
        return b"".join(w.to_bytes(4, "little") for w in words)

    def running(self):
        return self.qmp("query-status")["status"] == "running"

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        if kind is None:
            self.qmp("quit")
            check(self.process.wait(60) == 0, "QEMU ended with %s", self.process.returncode)
        else:
            self.process.kill()
            self.process.wait(30)
        return False


with suite.test("options take effect; info, check and map show it"):
    path = create(suite.path("a.img"), 64 * MIB)
    text = img("info", path)
    has(text, "cluster_size: 65536", "chunk size: 65536", "storage grow unit: 1048576", "zeroed: true")
    check(create(suite.path("b.img"), MIB, "compact_image=on"), "")
    data = data_of(suite.path("b.img"))
    check(data["chunk-size"] == MIB and data["storage-grow-unit"] == 64 * MIB, "defaults: %s", data)
    create(suite.path("b.img"), MIB, "compact_image=on,cluster_size=128k")
    check(data_of(suite.path("b.img"))["chunk-size"] == 128 * KIB, "cluster_size is not chunk_size")
    io(path, "write -q -P 1 1M 100k", "write -q -P 2 960k 64k", "write -q -P 3 40M 1000")
    info = run_json("qemu-img", "check", "--output=json", path)
    check((info["total-clusters"], info["allocated-clusters"], info["fragmented-clusters"]) == (1024, 4, 1), "%s", info)
    offset = data_of(path)["data-offset"]
    check(info["image-end-offset"] == os.path.getsize(path) == offset + STEP, "%s; %d", info, os.path.getsize(path))
    extents = [e for e in run_json("qemu-img", "map", "--output=json", path) if not e["zero"]]
    check([(e["start"], e["data"]) for e in extents] == [(960 * KIB, True), (MIB, True), (40 * MIB, True)], "%s", extents)
    check(extents[0]["offset"] == offset + 128 * KIB, "%s", extents)

REFUSED = [
    ("chunk_size=64k", ["compact_image"]),
    ("storage_grow_unit=64M", ["compact_image"]),
    ("compact_image=off,chunk_size=64k", ["compact_image"]),
    ("compact_image=maybe", ["compact_image"]),
    ("compact_image=on,chunk_size=32k", ["chunk_size", "32768"]),
    ("compact_image=on,chunk_size=100k", ["chunk_size", "102400"]),
    ("compact_image=on,chunk_size=128M", ["chunk_size", "134217728"]),
    ("compact_image=on,chunk_size=8G", ["chunk", "8589934592"]),
    ("compact_image=on,storage_grow_unit=100k", ["storage_grow_unit", "102400"]),
    ("compact_image=on,cluster_size=64k,chunk_size=128k", ["cluster_size", "64k", "chunk_size", "128k"]),
    ("compact_image=on,chunk_size=64k,block_size=128k", ["block_size", "131072"]),
]
with suite.test("wrong options are refused by name and value, and leave no file"):
    for options, parts in REFUSED:
        has(img("create", "-q", "-f", "fvd", "-o", options, suite.path("no.img"), "1M", status=1), *parts)
        check(not os.path.exists(suite.path("no.img")), "a file is left by %s", options)

with suite.test("QMP: blockdev-create, query-named-block-nodes, resize with preallocation"):
    path = suite.path("q.img")
    open(path, "wb").close()
    with Daemon("--nbd-server", "addr.type=unix,addr.path=%s" % suite.path("q.nbd")) as daemon:
        qmp = daemon.qmp
        qmp("blockdev-add", driver="file", node_name="f", filename=path, discard="unmap")
        qmp.create(driver="fvd", file="f", size=4 * MIB,
                   **{"compact-image": True, "chunk-size": 64 * KIB, "storage-grow-unit": 256 * KIB, "journal-size": MIB})
        qmp("blockdev-add", driver="fvd", node_name="n", file="f", discard="unmap")
        data = qmp.node("n")["image"]["format-specific"]["data"]
        check((data["chunk-size"], data["storage-grow-unit"], data["zeroed"]) == (65536, 262144, True), "%s", data)
        qmp("block-export-add", id="e", type="nbd", node_name="n", name="e", writable=True)
        link = NBD(suite.path("q.nbd"), "e")
        link.write(MIB, b"\x31" * 70000)
        check(link.read(MIB, 70000) == b"\x31" * 70000 and link.read(0, MIB) == bytes(MIB), "read")
        link.close()
        qmp("block-export-del", id="e", mode="hard")
        wait_for(lambda: not qmp("query-block-exports"), "the end of the export")
        qmp("blockdev-del", node_name="n")
        qmp("blockdev-del", node_name="f")
    for mode in ("metadata", "falloc", "full"):
        img("resize", "-q", "-f", "fvd", "--preallocation=" + mode, path, "+1M")
    report = run_json("qemu-img", "check", "--output=json", path)
    check(report["allocated-clusters"] == 2 + 3 * 16, "%s", report)
    io(path, "read -q -P 0 4M 3M", "read -q -P 0x31 1M 70000")
    check_clean(path)

with suite.test("qemu-img amend: growth step and size; nothing changes if one option cannot"):
    path = create(suite.path("am.img"), 8 * MIB)
    img("amend", "-q", "-f", "fvd", "-o", "storage_grow_unit=2M", path)
    check(data_of(path)["storage-grow-unit"] == 2 * MIB, "%s", data_of(path))
    io(path, "write -q -P 7 0 64k")
    check(os.path.getsize(path) == data_of(path)["data-offset"] + 2 * MIB, "the next step is of %d bytes", os.path.getsize(path))
    before = data_of(path)
    same = "storage_grow_unit=2M,chunk_size=64k,compact_image=on,journal_size=1M,block_size=0,size=8M"
    img("amend", "-q", "-f", "fvd", "-o", same, path)
    after = data_of(path)
    check(dict(after, generation=0) == dict(before, generation=0), "%s, before %s", after, before)
    for option, parts in (("chunk_size=128k", ["chunk_size", "131072", "cannot change"]), ("journal_size=2M", ["journal_size", "2097152", "cannot change"]),
                          ("block_size=4k", ["block_size", "cannot change"]), ("compact_image=off", ["compact_image", "cannot change"]),
                          ("preallocation=full", ["preallocation"]), ("data_file=x", ["data_file"]), ("storage_grow_unit=100k", ["storage_grow_unit", "102400"]),
                          ("backing_file=x", ["backing", "rebase"])):
        has(img("amend", "-f", "fvd", "-o", "size=16M," + option, path, status=1), *parts)
        check(data_of(path)["storage-grow-unit"] == 2 * MIB and run_json("qemu-img", "info", "--output=json", path)["virtual-size"] == 8 * MIB, "%s changes something", option)
    img("amend", "-q", "-f", "fvd", "-o", "size=12M,storage_grow_unit=1M", path)
    check(run_json("qemu-img", "info", "--output=json", path)["virtual-size"] == 12 * MIB, "the size stays")
    io(path, "read -q -P 7 0 64k", "read -q -P 0 64k 12224k")
    check_clean(path)
    base = suite.path("am.raw")
    with open(base, "wb") as f:
        f.truncate(4 * MIB)
    over = create(suite.path("am2.img"), 4 * MIB, "journal_size=1M", base)
    img("amend", "-q", "-f", "fvd", "-o", "backing_file=%s,backing_fmt=raw,size=6M" % base, over)
    has(img("amend", "-f", "fvd", "-o", "backing_fmt=qcow2", over, status=1), "backing", "rebase")
    has(img("amend", "-f", "fvd", "-o", "storage_grow_unit=1M", over, status=1), "storage_grow_unit", "not compact")
    has(img("amend", "-f", "fvd", "-o", "help"), "size", "storage_grow_unit", "cannot change")
    check(run_json("qemu-img", "info", "--output=json", over)["backing-filename"] == base, "the base")
    check_clean(over)

with suite.test("blockdev-amend: while the disk is written to, and what it refuses"):
    path = create(suite.path("ba.img"), 64 * MIB)
    flat = suite.path("ba2.img")
    img("create", "-q", "-f", "fvd", flat, "1M")
    with Daemon("--nbd-server", "addr.type=unix,addr.path=%s" % suite.path("ba.nbd")) as daemon:
        qmp = daemon.qmp
        qmp("blockdev-add", **node("n", path))
        qmp("blockdev-add", **node("flat", flat))
        qmp("block-export-add", id="e", type="nbd", node_name="n", name="e", writable=True)
        link = NBD(suite.path("ba.nbd"), "e")

        def amend(name, **options):
            # The error of the job, or None.
            try:
                qmp.job("x-blockdev-amend", job_id="amend", node_name=name, options=dict(options, driver="fvd"))
            except Failure as failure:
                return str(failure)
            return None

        for turn, unit in enumerate((2 * MIB, 64 * KIB, 4 * MIB, 4 * MIB)):
            link.write(turn * 3 * MIB, bytes([turn + 1]) * (2 * MIB))
            check(amend("n", **{"storage-grow-unit": unit}) is None, "amend to %d", unit)
            check(qmp.node("n")["image"]["format-specific"]["data"]["storage-grow-unit"] == unit, "%d", unit)
        has(amend("n", **{"storage-grow-unit": 100000}), "storage_grow_unit", "100000")
        has(amend("flat", **{"storage-grow-unit": MIB}), "storage_grow_unit", "not compact")
        check(amend("flat") is None, "nothing to amend")
        has(qmp.error("x-blockdev-amend", job_id="x", node_name="n", options={"driver": "fvd", "chunk-size": MIB}), "chunk-size")
        for turn in range(4):
            check(link.read(turn * 3 * MIB, 2 * MIB) == bytes([turn + 1]) * (2 * MIB), "written before amend %d", turn)
        link.close()
        qmp("block-export-del", id="e", mode="hard")
        wait_for(lambda: not qmp("query-block-exports"), "the end of the export")
    check(data_of(path)["storage-grow-unit"] == 4 * MIB, "%s", data_of(path))
    check_clean(path)

with suite.test("fvd convert and qemu-img convert make the same of a disk"):
    base, over = suite.path("cv.raw"), suite.path("cv.img")
    with open(base, "wb") as f:
        f.truncate(24 * MIB)
        for at in (0, 3 * MIB + 512, 17 * MIB):
            f.seek(at)
            f.write(rnd.randbytes(200 * KIB))
    create(over, 32 * MIB, SMALL + ",block_size=16k", base)
    io(over, "write -q -P 0x11 5M 300k", "write -q -z -u 17M 100k", "write -q -P 0x12 30M 1000", "discard -q 0 64k")
    ours, theirs = suite.path("cv1"), suite.path("cv2")
    img("convert", "-f", "fvd", "-O", "raw", over, theirs)
    run("fvd", "convert", "-q", "-O", "raw", over, ours)
    check(stored(ours) <= stored(theirs) + 64 * KIB, "%d bytes are stored, by qemu-img %d", stored(ours), stored(theirs))
    img("compare", "-f", "raw", "-F", "raw", ours, theirs)
    for options in ([], ["--compact", "--chunk-size", "64K"], ["-b", base, "-F", "raw"], ["-b", base, "-F", "raw", "--compact", "-S", "64K"]):
        run("fvd", "convert", "-q", "-O", "fvd", *options, over, ours)
        img("compare", "-f", "fvd", "-F", "raw", ours, theirs)
        check_clean(ours)
        run("fvd", "convert", "-q", "-f", "raw", "-O", "fvd", *options, theirs, ours)
        img("compare", "-f", "fvd", "-F", "raw", ours, theirs)
        check_clean(ours)
    # And what qemu-img made is read by ours.
    img("convert", "-f", "raw", "-O", "fvd", "-o", SMALL, theirs, over)
    run("fvd", "convert", "-q", "-O", "raw", over, ours)
    img("compare", "-f", "raw", "-F", "raw", ours, theirs)

with suite.test("preallocation: every chunk has its place, and falloc and full its storage"):
    for mode, least in (("metadata", 0), ("falloc", 8 * MIB), ("full", 8 * MIB)):
        path = create(suite.path("p.img"), 8 * MIB, SMALL + ",preallocation=" + mode)
        report = run_json("qemu-img", "check", "--output=json", path)
        check(report["allocated-clusters"] == 128 and report.get("fragmented-clusters", 0) == 0, "%s: %s", mode, report)
        check(stored(path) >= least, "%s: %d bytes", mode, stored(path))
        before = os.path.getsize(path)
        io(path, "read -q -P 0 0 8M", "write -q -P 5 0 8M", "read -q -P 5 0 8M")
        check(os.path.getsize(path) == before, "the file grew from %d to %d", before, os.path.getsize(path))

with suite.test("measure is exact: empty, part and whole, with the growth step, with a base"):
    steps = {SMALL: MIB, "compact_image=on": 64 * MIB, "compact_image=on,cluster_size=2M,storage_grow_unit=6M": 6 * MIB}
    source = suite.path("m.raw")
    with open(source, "wb") as f:
        f.truncate(32 * MIB)
        for at in (100 * KIB, 5 * MIB + 3, 20 * MIB, 31 * MIB):
            f.seek(at)
            f.write(b"\x44" * (300 * KIB))
    for options in (SMALL, "compact_image=on", "compact_image=on,cluster_size=2M,storage_grow_unit=6M"):
        measured = run_json("qemu-img", "measure", "--output=json", "-f", "raw", "-O", "fvd", "-o", options, source)
        empty = run_json("qemu-img", "measure", "--output=json", "-O", "fvd", "-o", options, "--size", "32M")
        path = suite.path("m.img")
        img("convert", "-f", "raw", "-O", "fvd", "-o", options, source, path)
        # A hole of one more step may be there already: steps are opened ahead of need.
        check(os.path.getsize(path) - measured["required"] in (0, steps[options]), "%s: %d bytes, measured %s", options, os.path.getsize(path), measured)
        img("compare", "-q", "-f", "fvd", "-F", "raw", path, source)
        io(path, "write -q -P 1 0 32M")
        check(os.path.getsize(path) == measured["fully-allocated"] == empty["fully-allocated"], "%s: %d bytes, measured %s, %s",
              options, os.path.getsize(path), measured, empty)
        create(path, 32 * MIB, options)
        check(os.path.getsize(path) == empty["required"], "%s: %d bytes, measured %s", options, os.path.getsize(path), empty)
    full = run_json("qemu-img", "measure", "--output=json", "-O", "fvd", "-o", SMALL + ",preallocation=metadata", "--size", "32M")
    create(path, 32 * MIB, SMALL + ",preallocation=metadata")
    check(os.path.getsize(path) == full["required"] == full["fully-allocated"], "%s", full)

with suite.test("convert gives a small file, and so does a guest's discard"):
    source = suite.path("c.raw")
    with open(source, "wb") as f:
        f.truncate(256 * MIB)
        f.seek(100 * MIB)
        f.write(b"\x09" * (3 * MIB))
    path = suite.path("c.img")
    img("convert", "-f", "raw", "-O", "fvd", "-o", "compact_image=on", source, path)
    check(os.path.getsize(path) < 100 * MIB and stored(path) < 24 * MIB, "%d bytes, %d stored", os.path.getsize(path), stored(path))
    small = stored(path)
    io(path, "write -q -P 7 0 64M", args=["-d", "unmap"])
    check(stored(path) >= small + 60 * MIB, "%d after writing", stored(path))
    io(path, "discard -q 0 64M", "flush", "read -q -P 0 0 64M", "read -q -P 9 100M 3M", args=["-d", "unmap"])
    check(stored(path) <= small + MIB, "%d stored after the discard, %d before", stored(path), small)
    io(path, "write -q -P 7 0 8M", "write -q -z -u 0 8M", "flush", args=["-d", "unmap"])
    check(stored(path) <= small + MIB, "%d stored after zeroing", stored(path))
    check_clean(path)

with suite.test("%d times filled and discarded: the file does not grow" % CYCLES):
    size = 8 * MIB
    path = create(suite.path("d.img"), size)
    most = data_of(path)["data-offset"] + size + 64 * KIB + STEP
    sock = suite.path("d.nbd")
    with Daemon("--blockdev", json.dumps(node("n", path)), "--nbd-server", "addr.type=unix,addr.path=%s" % sock,
                "--export", "nbd,id=e,node-name=n,writable=on") as daemon:
        link = NBD(sock, "n")
        for turn in range(CYCLES):
            order = list(range(0, size, 512 * KIB))
            rnd.shuffle(order)
            for at in order:
                link.write(at, bytes([turn % 255 + 1]) * (512 * KIB))
            if turn % 3:
                link.flush()
            check(link.read(order[0], 4096) == bytes([turn % 255 + 1]) * 4096, "cycle %d", turn)
            if turn % 2:
                link.request(NBD.TRIM, 0, size).wait()
            else:
                rnd.shuffle(order)
                for at in order:
                    link.request(NBD.TRIM if turn % 4 else NBD.WRITE_ZEROES, at, 512 * KIB).wait()
            check(os.path.getsize(path) <= most, "cycle %d: %d bytes, at most %d expected", turn, os.path.getsize(path), most)
        link.flush()
        check(link.read(0, size) == bytes(size), "not zero in the end")
        link.close()
        daemon.qmp("block-export-del", id="e", mode="hard")
    check_clean(path)
    check(stored(path) < 4 * MIB, "%d bytes are left", stored(path))

with suite.test("a device full of old bytes never shows them (512 and 4096 bytes a sector)"):
    for sector in ("512", "4096"):
        for options, base in ((SMALL, None), (SMALL + ",block_size=4k", 3 * MIB + 512), ("compact_image=on,journal_size=1M", None)):
            with Loop(suite.path("dev.bin"), 24 * MIB, "--sector-size", sector) as loop:
                base_path = None
                if base:
                    base_path = suite.path("dev.base")
                    with open(base_path, "wb") as f:
                        f.write(b"\x66" * base)
                # Larger than the device: what counts is what is written.
                path = create(loop.device, 64 * MIB, options, base_path)
                end = base or 0
                reads = ["read -q -P 0 %d %d" % (end, 64 * MIB - end)] + (["read -q -P 0x66 0 %d" % end] if base else [])
                for args in (["-t", "none", "-i", "native"], ["-t", "writeback"]):
                    io(path, *reads, args=args)
                args = ["-t", "none", "-i", "io_uring", "-d", "unmap"]
                io(path, "write -q -P 1 10M 1000", "write -q -P 2 11000001 5", "write -q -P 3 12M 300k", "write -q -z 12300k 5k",
                   "write -q -P 4 20M 2M", "discard -q 21M 64k", "write -q -P 5 50M 512", "discard -q 12M 100k",
                   "write -q -P 6 40M 4k", args=args)
                checks = ["read -q -P 1 10M 1000", "read -q -P 0 10486760 513241", "read -q -P 2 11000001 5",
                          "read -q -P 0 11000006 1048576", "read -q -P 4 20M 1M", "read -q -P 0 21M 64k", "read -q -P 5 50M 512",
                          "read -q -P 0 52429312 1000000", "read -q -P 6 40M 4k", "read -q -P 0 41947136 1048576",
                          "read -q -P 0 12300k 5k"]
                io(path, *checks, args=args)
                img("convert", "-f", "fvd", "-O", "raw", path, suite.path("dev.raw"))
                with open(suite.path("dev.raw"), "rb") as f:
                    check(b"\xd7" not in f.read(), "old bytes show (%s, %s)", sector, options)
                check_clean(path)
                has(img("info", path), "zeroed: true")

with suite.test("discard-no-unref keeps chunks in their place, and the file small all the same"):
    path = create(suite.path("inplace.img"), 64 * MIB)
    opts = "driver=fvd,discard=unmap,discard-no-unref=%s,file.driver=file,file.filename=" + path
    io(path, "write -q -P 1 0 16M", opts=opts % "on")
    full = stored(path)
    io(path, "discard -q 4M 8M", "flush", "read -q -P 0 4M 8M", opts=opts % "on")
    report = run_json("qemu-img", "check", "--output=json", path)
    check(report["allocated-clusters"] == 256 and stored(path) <= full - 8 * MIB + MIB, "%s, %d bytes of %d", report, stored(path), full)
    io(path, "write -q -P 2 6M 1M", "write -q -P 3 4M 2M", "write -q -P 4 7M 5M", opts=opts % "on")
    report = run_json("qemu-img", "check", "--output=json", path)
    check(report["allocated-clusters"] == 256 and report.get("fragmented-clusters", 0) == 0, "%s", report)
    io(path, "discard -q 4M 8M", "flush", opts=opts % "off")
    report = run_json("qemu-img", "check", "--output=json", path)
    check(report["allocated-clusters"] == 128, "%s", report)
    has(io(path, "read 0 512", opts=opts % "maybe", status=1), "discard-no-unref")


def repair(path, what, status=0):
    """qemu-img check -r: its answer."""
    return run_json("qemu-img", "check", "-r", what, "--output=json", path, status=status)


def region_of(path, kind):
    line = next(line for line in run("fvd", "dump", "--header", path).splitlines() if "region %s" % kind in line)
    return int(line.split("offset ")[1].split(",")[0])


def rot(path, at):
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


with suite.test("check -r leaks gives back what lies behind the end, check -r all repairs damage"):
    path = create(suite.path("repair.img"), 60 * MIB)
    io(path, "write -q -P 1 0 4M", "write -q -P 2 32M 64k")
    length = os.path.getsize(path)
    os.truncate(path, length + 3 * MIB)
    has(img("check", path, status=3), "48 leaked clusters")
    report = repair(path, "leaks")
    check((report.get("leaks-fixed"), os.path.getsize(path)) == (48, length), "%s, %d bytes", report, os.path.getsize(path))
    io(path, "read -q -P 1 0 4M", "read -q -P 2 32M 64k")
    # Rot in the only page of the lookup table: no byte of the disk can be told.
    rot(path, region_of(path, "Table") + 100)
    has(img("check", path, status=2), "lookup table page 0 is damaged", "62914560")
    report = repair(path, "leaks", status=2)
    check((report.get("corruptions"), report.get("corruptions-fixed", 0)) == (1, 0), "%s", report)
    report = repair(path, "all")
    check((report.get("corruptions", 0), report.get("corruptions-fixed")) == (0, 1), "%s", report)
    check_clean(path)
    io(path, "read -q -P 0 0 60M", "write -q -P 3 1M 1M", "read -q -P 3 1M 1M", "read -q -P 0 2M 58M")
    check_clean(path)


with suite.test("the fvd tool makes, describes and checks one on a device"):
    with Loop(suite.path("tool.bin"), 8 * MIB) as loop:
        has(run("fvd", "create", "--compact", "--chunk-size", "64K", "--journal-size", "1M", loop.device, "64M"), "chunks of 64 KiB")
        io(loop.device, "read -q -P 0 0 64M", "write -q -P 1 30M 70000", args=["-t", "none"])
        has(run("fvd", "check", loop.device), "No errors", "2/1024 chunks = 0.20% allocated, 0.00% fragmented")
        has(run("fvd", "info", loop.device), "chunk size: 64 KiB", "compact")
        places = [(r["start"], r["length"], r["place"]) for r in run_json("fvd", "map", "--output=json", loop.device)]
        check(places == [(0, 30 * MIB, "zero"), (30 * MIB, 128 * KIB, "data"), (30 * MIB + 128 * KIB, 34 * MIB - 128 * KIB, "zero")],
              "%s", places)
        has(run("fvd", "create", "--compact", "--preallocation", "metadata", loop.device, "64M", status=1), loop.device, "8388608")

with suite.test("convert to a device: only data is written, all reads right"):
    with Loop(suite.path("cv.bin"), 24 * MIB) as loop:
        img("convert", "-f", "raw", "-O", "fvd", "-o", "compact_image=on,journal_size=1M", suite.path("c.raw"), loop.device)
        img("compare", "-q", "-f", "fvd", "-F", "raw", loop.device, suite.path("c.raw"))
        check_clean(loop.device)

with suite.test("a full device: ENOSPC, nothing is lost, retries work once it has grown"):
    with Loop(suite.path("full.bin"), 12 * MIB) as loop:
        path = create(loop.device, 64 * MIB)
        sock = suite.path("full.nbd")
        with Daemon("--blockdev", json.dumps(node("n", path, driver="host_device")),
                    "--nbd-server", "addr.type=unix,addr.path=%s" % sock, "--export", "nbd,id=e,node-name=n,writable=on") as daemon:
            link = NBD(sock, "n")
            grown = 0
            for at in range(0, 32 * MIB, 256 * KIB):
                data = bytes([at >> 18 & 127 | 1]) * (256 * KIB)
                for attempt in range(3):
                    try:
                        link.write(at, data)
                        break
                    except NBDError as error:
                        check(error.code == 28, "%s instead of ENOSPC", error)
                        if attempt == 1:
                            loop.grow(3 * MIB + 4096)
                            grown += 1
                else:
                    raise Failure("no retry works at %d" % at)
            check(grown > 4, "grown %d times", grown)
            link.flush()
            for at in range(0, 32 * MIB, 256 * KIB):
                check(link.read(at, 256 * KIB) == bytes([at >> 18 & 127 | 1]) * (256 * KIB), "at %d", at)
            link.close()
            daemon.qmp("block-export-del", id="e", mode="hard")
        check_clean(path)
        io(path, "read -q -P 1 0 512k", "read -q -P 0 32M 32M")

with suite.test("a full device stops a guest (werror=stop), and cont goes on once it has grown"):
    with Loop(suite.path("stop.bin"), 6 * MIB) as loop:
        path = create(loop.device, 64 * MIB)
        with Machine("-blockdev", json.dumps(node("n", path, driver="host_device")),
                     "-device", "ide-hd,drive=n,bus=ide.0,unit=0,werror=stop,rerror=stop,write-cache=on") as vm:
            stops = 0
            for number in range(80):
                sector = number * (64 * KIB // SECTOR) + 5
                vm.begin_write(sector, number + 1)
                vm.qmp("query-status")
                wait_for(lambda: not vm.running() or not vm.status() & 0x80, "an answer to the write")
                if not vm.running():
                    state = vm.qmp("query-status")["status"]
                    check(state == "io-error", "stopped by %s", state)
                    # QEMU reports such errors once a second at most.
                    event = [e for e in vm.qmp.events if e["event"] == "BLOCK_IO_ERROR"][-1]["data"]
                    check(event["nospace"] and event["operation"] == "write" and event["action"] == "stop", "%s", event)
                    stops += 1
                    # Without more room it is stopped again.
                    if stops == 1:
                        vm.qmp("cont")
                        wait_for(lambda: vm.qmp("query-status")["status"] == "io-error" and
                                 [e["event"] for e in vm.qmp.events].count("STOP") == 2, "the second stop")
                    loop.grow(512 * KIB)
                    vm.qmp("cont")
                    wait_for(lambda: vm.running() and not vm.status() & 0x80, "the end of the write after cont")
                    check(not vm.status() & 0x21, "the write failed after all")
                    check(vm.read(sector) == bytes([number + 1]) * SECTOR, "sector %d after cont", sector)
            check(stops >= 2, "stopped %d times", stops)
            vm.command(0xe7, 0)
            wait_for(lambda: not vm.status() & 0x80, "the flush")
        check_clean(path)
        io(path, *["read -q -P %d %d 512" % (n + 1, n * 64 * KIB + 5 * SECTOR) for n in range(80)],
           *["read -q -P 0 %d 2048" % (n * 64 * KIB) for n in range(80)])

with suite.test("a full device pauses a job (on-target-error=enospc), and it goes on once the device has grown"):
    with Loop(suite.path("job.bin"), 8 * MIB) as loop:
        source = suite.path("job.raw")
        with open(source, "wb") as f:
            f.write(b"\x2b" * (16 * MIB))
        create(loop.device, 16 * MIB)
        with Daemon("--blockdev", "driver=raw,node-name=s,file.driver=file,file.filename=" + source,
                    "--blockdev", json.dumps(node("t", loop.device, driver="host_device"))) as daemon:
            qmp = daemon.qmp
            qmp("blockdev-backup", job_id="j", device="s", target="t", sync="full", on_target_error="enospc", auto_dismiss=False)
            for _ in range(40):
                wait_for(lambda: qmp("query-jobs")[0]["status"] in ("paused", "concluded"), "an end or a pause of the job")
                if qmp("query-jobs")[0]["status"] == "concluded":
                    break
                loop.grow(MIB)
                qmp("block-job-resume", device="j")
            check("error" not in qmp("query-jobs")[0], "%s", qmp("query-jobs"))
            check(any(e["event"] == "BLOCK_JOB_ERROR" for e in qmp.events), "the job was never stopped")
            qmp("job-dismiss", id="j")
        img("compare", "-q", "-f", "fvd", "-F", "raw", loop.device, source)

with suite.test("external snapshot, commit and pull with compact images"):
    base = suite.path("xb.raw")
    with open(base, "wb") as f:
        f.write(b"\x11" * (3 * MIB))
    mid = create(suite.path("xm.img"), 8 * MIB, SMALL, base)
    top = suite.path("xt.img")
    img("create", "-q", "-f", "fvd", "-b", mid, "-F", "fvd", "-o", SMALL, top)
    io(mid, "write -q -P 0x12 1M 1M")
    io(top, "write -q -P 0x13 1536k 1M", "write -q -z -u 0 128k", "discard -q 2M 64k", "write -q -P 0x14 7M 64k", args=["-d", "unmap"])
    reads = ["read -q -P 0 0 128k", "read -q -P 0x11 128k 896k", "read -q -P 0x12 1M 512k", "read -q -P 0 2M 64k",
             "read -q -P 0x13 2112k 448k", "read -q -P 0x14 7M 64k", "read -q -P 0 4M 3M"]
    io(top, *reads)
    img("commit", "-q", "-f", "fvd", top)
    io(top, *reads)
    io(mid, *reads)
    img("rebase", "-q", "-f", "fvd", "-b", base, "-F", "raw", top)
    io(top, *reads)
    img("rebase", "-q", "-f", "fvd", "-b", "", top)
    io(top, *reads)
    for path in (mid, top):
        check_clean(path)
suite.finish()
