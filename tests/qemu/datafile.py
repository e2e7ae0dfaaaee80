#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Images whose guest data lies in a file of its own: the raw image that anybody can read, who opens it and
by which name, what happens without it, and all request paths with and without a base.

Environment: see common.py.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import (KIB, MIB, NBD, SECTOR, Daemon, Failure, Suite, check, check_clean, check_sound, direct_io, img, io, read_stamp, run,
                    run_json, stamps, wait_for)

suite = Suite("datafile")
rnd = suite.random
os.mkdir(suite.path("d"))
FLAT, COMPACT = "journal_size=1M", "journal_size=1M,compact_image=on,chunk_size=64k,storage_grow_unit=1M"


def has(text, *parts):
    for part in parts:
        check(part in text, "'%s' is not in: %s", part, text.strip())


def names(name):
    """Path of an image, name of its data file, path of that: not where we are."""
    return suite.path("d/%s.fvd" % name), name + ".raw", suite.path("d/%s.raw" % name)


def create(name, size, options=FLAT, base=None):
    path, data_name, data = names(name)
    img("create", "-q", "-f", "fvd", *(["-b", base, "-F", "raw"] if base else []), "-o", "data_file=%s,%s" % (data_name, options),
        path, str(size))
    return path, data


def content(path):
    with open(path, "rb") as f:
        return f.read()


def make_base(name, size):
    path = suite.path("d/" + name)
    with open(path, "wb") as f:
        f.write(b"".join(stamps(i, 1, 1 + i % 3) if i // 32 % 4 != 3 else bytes(SECTOR) for i in range(size // SECTOR)))
    return path


def specific(path, *more):
    return run_json("qemu-img", "info", *more, "--output=json", "-f", "fvd", path)["format-specific"]["data"]


with suite.test("the data file is the disk, byte for byte, for whoever reads it as raw"):
    for size in (8 * MIB, 8 * MIB + 1536):
        path, data = create("raw", size)
        check(os.path.getsize(data) == size and os.path.getsize(path) < 4 * MIB, "%d, %d", os.path.getsize(data), os.path.getsize(path))
        for args in [[]] + ([["-t", "none", "-i", "io_uring"]] if direct_io(suite.dir) else []):
            io(path, "write -q -P 1 0 64k", "write -q -P 2 1000000 12345", "write -q -z 4M 1M", "write -q -P 3 %d 512" % (size - 512),
               "discard -q 32k 16k", "flush", args=args)
            check(os.path.getsize(data) - size in range(0, 4096), "%d bytes of %d", os.path.getsize(data), size)
        img("compare", "-q", "-f", "fvd", "-F", "raw", path, data)
        io(data, "read -q -P 1 0 32k", "read -q -P 2 1000000 12345", "read -q -P 0 4M 1M", "read -q -P 3 %d 512" % (size - 512), fmt="raw")
        check_clean(path)

with suite.test("info names it, map and block status point into it"):
    path, data = create("info", 4 * MIB)
    has(img("info", path), "data file: info.raw")
    check(specific(path)["data-file"] == "info.raw" and specific(path)["data-offset"] == 0, "%s", specific(path))
    io(path, "write -q -P 1 1M 64k")
    extents = run_json("qemu-img", "map", "--output=json", path)
    check(all(e["offset"] == e["start"] for e in extents if "offset" in e), "%s", extents)
    check(MIB in [e["start"] for e in extents if not e["zero"]] and extents[-1]["zero"], "%s", extents)
    has(img("map", path), data)
    check(run_json("fvd", "map", "--output", "json", path)[0]["file"] == "data", "fvd map")
    has(run("fvd", "info", path), "data file: info.raw", "data file format: raw")

with suite.test("without the data file, or with a short one: info works, check tells, nothing else opens, nothing is lost"):
    for options in (FLAT, COMPACT):
        path, data = create("gone", 4 * MIB, options, make_base("gone.base", 2 * MIB))
        io(path, "write -q -P 7 0 128k", "write -q -P 8 3M 64k")
        before, whole = content(path), content(data)
        for short in (False, True):
            if short:
                os.truncate(data, 64 * KIB)
            else:
                os.unlink(data)
            word = "too short" if short else "gone.raw"
            check(specific(path)["data-file"] == "gone.raw", "info")
            for out in (io(path, "read 0 512", status=1), io(path, "read 0 512", args=["-r"], status=1), img("map", path, status=1),
                        img("convert", "-O", "raw", path, suite.path("no.raw"), status=1)):
                has(out, word)
            has(img("check", path, status=2), "data file", word)
            has(img("check", "-r", "all", path, status=1), word)
            has(run("fvd", "check", path, status=2), "data file", word)
            has(run("fvd", "check", "--repair", "all", path, status=(1, 2)), word)
            run("fvd", "map", path)
            check(content(path) == before, "the image file changed")
            with open(data, "wb") as f:
                f.write(whole)
        io(path, "read -q -P 7 0 128k", "read -q -P 8 3M 64k")
        check_clean(path)

with suite.test("names: relative to the image, absolute, given at open; never more than a plain file"):
    path, data = create("name", MIB)
    io(path, "write -q -P 5 0 4k")
    img("info", "name.fvd", cwd=suite.path("d"))
    io("name.fvd", "read -q -P 5 0 4k", cwd=suite.path("d"))
    io("d/name.fvd", "read -q -P 5 0 4k", cwd=suite.dir)
    other = suite.path("moved.raw")
    os.rename(data, other)
    has(io(path, "read 0 512", status=1), "name.raw")
    opts = "driver=fvd,file.driver=file,file.filename=%s,data-file.driver=%s,data-file.filename=%s"
    io(path, "read -q -P 5 0 4k", "write -q -P 6 4k 4k", opts=opts % (path, "file", other))
    io(other, "read -q -P 6 4k 4k", fmt="raw")
    absolute = suite.path("absolute.raw")
    img("create", "-q", "-f", "fvd", "-o", "data_file=" + absolute, path, "1M")
    io(path, "write -q -P 4 0 512")
    check(content(absolute)[:512] == b"\4" * 512, "absolute")
    # What is in the data file is never taken for a format.
    img("create", "-q", "-f", "qcow2", suite.path("inner.qcow2"), "1M")
    os.replace(suite.path("inner.qcow2"), absolute)
    os.truncate(absolute, MIB)
    io(path, "read -q -P 0x51 0 1", "read -q -P 0xfb 3 1")
    # A name from the image is a file, whatever it looks like; the fvd tool makes none of the kind.
    odd = suite.path("odd.fvd")
    img("create", "-q", "-f", "fvd", "-o", "data_file=nbd:x.raw", odd, "1M")
    check(os.path.getsize(suite.path("nbd:x.raw")) == MIB, "no file of that name")
    io(odd, "write -q -P 3 0 512")
    check(content(suite.path("nbd:x.raw"))[:512] == b"\3" * 512, "content")
    has(run("fvd", "create", "-q", "--data-file", "nbd:x.raw", odd, "1M", status=1), "nbd:x.raw")

with suite.test("wrong use is refused by name"):
    path = suite.path("d/plain.fvd")
    img("create", "-q", "-f", "fvd", path, "1M")
    has(io(path, "read 0 512", opts="driver=fvd,file.driver=file,file.filename=%s,data-file.driver=null-co" % path, status=1), "data-file")
    has(img("create", "-q", "-f", "fvd", "-o", "data_file=same.fvd", suite.path("d/same.fvd"), "1M", status=1), "data_file 'same.fvd'")
    check(not os.path.exists(suite.path("d/same.fvd")), "a file is left")
    has(img("create", "-q", "-f", "fvd", "-o", "data_file=none/x.raw", suite.path("d/bad.fvd"), "1M", status=1), "none/x.raw")
    check(not os.path.exists(suite.path("d/bad.fvd")), "a file is left")
    # One file cannot be two images' at the same time.
    create("busy", MIB)
    path, _, data = names("busy")
    with Daemon("--blockdev", json.dumps({"driver": "fvd", "node-name": "n", "file": {"driver": "file", "filename": path}}),
                "--nbd-server", "addr.type=unix,addr.path=%s" % suite.path("b.nbd"), "--export", "nbd,id=e,node-name=n,writable=on"):
        has(io(data, "write 0 512", fmt="raw", status=1), "lock")

with suite.test("every request path against a plain raw file, with and without base, flat and compact"):
    for options, with_base in ((FLAT, False), (FLAT, True), (COMPACT, False), (COMPACT, True)):
        size, base = 4 * MIB, None
        model = bytearray(size)
        if with_base:
            base = make_base("paths.base", 3 * MIB + 512)
            model[:3 * MIB + 512] = content(base)
        path, data = create("paths", size, options, base)
        for turn in range(6):
            commands = []
            for _ in range(30):
                at = rnd.randrange(size)
                length = min(rnd.choice((1, 512, 4096, 5000, 70000)), size - at)
                byte = rnd.randrange(1, 255)
                kind = rnd.choice(("write", "write", "write", "zero", "unmap", "flush", "fua"))
                if kind in ("write", "fua"):
                    commands.append("write -q %s -P %d %d %d" % ("-f" if kind == "fua" else "", byte, at, length))
                    model[at:at + length] = bytes([byte]) * length
                elif kind in ("zero", "unmap"):
                    commands.append("write -q -z %s %d %d" % ("-u" if kind == "unmap" else "", at, length))
                    model[at:at + length] = bytes(length)
                else:
                    commands.append("flush")
            io(path, *commands, args=["-d", "unmap"])
            img("convert", "-f", "fvd", "-O", "raw", path, suite.path("paths.out"))
            check(content(suite.path("paths.out")) == bytes(model), "%s, base %s, turn %d: the disk reads wrong", options, with_base, turn)
            if options == FLAT and not with_base:
                check(content(data) == bytes(model), "the data file is not the disk")
            check_clean(path)

with suite.test("resize moves the data file's end, with preallocation, and shows no old bytes"):
    path, data = create("size", 2 * MIB)
    io(path, "write -q -P 1 0 2M")
    img("resize", "-q", "--shrink", path, "1000k")
    check(os.path.getsize(data) == 1000 * KIB, "%d", os.path.getsize(data))
    with open(data, "ab") as f:
        f.write(b"\xee" * 100000)
    img("resize", "-q", "-f", "fvd", path, "3M")
    io(path, "read -q -P 1 0 1000k", "read -q -P 0 1000k 2072k")
    check(os.path.getsize(data) == 3 * MIB, "%d", os.path.getsize(data))
    img("resize", "-q", "-f", "fvd", "--preallocation=full", path, "6M")
    check(os.stat(data).st_blocks * 512 >= 3 * MIB, "%d blocks", os.stat(data).st_blocks)
    check_clean(path)
    for mode, least in (("off", 0), ("falloc", 4 * MIB), ("full", 4 * MIB)):
        path, data = create("pre", 4 * MIB, FLAT + ",preallocation=" + mode)
        check(os.stat(data).st_blocks * 512 >= least, "%s: %d blocks", mode, os.stat(data).st_blocks)

with suite.test("measure says what both files take; convert into and out of one"):
    source = make_base("cv.raw", 4 * MIB)
    for options in (FLAT, COMPACT):
        measured = run_json("qemu-img", "measure", "--output=json", "-O", "fvd", "-o", "data_file=x," + options, "--size", "4M")
        path, data = create("cv", 4 * MIB, options)
        check(os.path.getsize(path) + os.path.getsize(data) == measured["required"], "%d + %d, measured %s", os.path.getsize(path),
              os.path.getsize(data), measured)
        img("convert", "-f", "raw", "-O", "fvd", "-o", "data_file=cv.raw2," + options, source, path)
        img("compare", "-q", "-f", "fvd", "-F", "raw", path, source)
        img("convert", "-f", "fvd", "-O", "qcow2", path, suite.path("cv.qcow2"))
        img("compare", "-q", suite.path("cv.qcow2"), source)
        img("convert", "-n", "-f", "raw", "-O", "fvd", source, path)
        img("compare", "-q", "-f", "fvd", "-F", "raw", path, source)
        check_clean(path)

with suite.test("QMP: blockdev-create with a data file, a node of ours as data-file, NBD export, a base that comes later"):
    path, data, sock = suite.path("q.fvd"), suite.path("q.raw"), suite.path("q.nbd")
    base = make_base("q.base", MIB)
    for name in (path, data):
        open(name, "wb").close()
    with Daemon("--nbd-server", "addr.type=unix,addr.path=%s" % sock) as daemon:
        qmp = daemon.qmp
        qmp("blockdev-add", driver="file", node_name="f", filename=path)
        qmp("blockdev-add", driver="file", node_name="d", filename=data, discard="unmap")
        qmp.create(driver="fvd", file="f", size=2 * MIB, **{"data-file": "d", "journal-size": MIB, "data-file-name": "q.raw"})
        qmp("blockdev-add", driver="fvd", node_name="n", file="f", data_file="d", discard="unmap", backing=None)
        check(qmp.node("n")["image"]["format-specific"]["data"]["data-file"] == "q.raw", "%s", qmp.node("n"))
        qmp("block-export-add", id="e", type="nbd", node_name="n", name="e", writable=True)
        link = NBD(sock, "e")
        link.write(512, b"\x31" * 70000)
        link.flush()
        check(link.read(0, 2 * MIB) == bytes(512) + b"\x31" * 70000 + bytes(2 * MIB - 70512), "read")
        check(content(data) == link.read(0, 2 * MIB), "the data file while it is in use")
        link.close()
        qmp("block-export-del", id="e", mode="hard")
        wait_for(lambda: not qmp("query-block-exports"), "the end of the export")
        qmp("blockdev-reopen", options=[{"driver": "fvd", "node-name": "n", "file": "f", "data-file": "d", "read-only": True, "backing": None}])
        qmp("blockdev-reopen", options=[{"driver": "fvd", "node-name": "n", "file": "f", "data-file": "d", "read-only": False, "backing": None}])
        qmp("blockdev-del", node_name="n")
        for more, text in (({"data-file-name": "y"}, "data-file-name"), ({"data-file": "f"}, "same node")):
            try:
                qmp.create(driver="fvd", file="f", size=MIB, **more)
                raise AssertionError("blockdev-create took %s" % more)
            except Failure as error:
                check(text in str(error), "%s", error)
            qmp("job-dismiss", id="create") if any(j["id"] == "create" for j in qmp("query-jobs")) else None
        for name in ("f", "d"):
            qmp("blockdev-del", node_name=name)
    path, data = create("later", 2 * MIB)
    with Daemon("--nbd-server", "addr.type=unix,addr.path=%s" % sock) as daemon:
        qmp = daemon.qmp
        qmp("blockdev-add", driver="raw", node_name="b", file={"driver": "file", "filename": base}, read_only=True)
        qmp("blockdev-add", driver="fvd", node_name="n", file={"driver": "file", "filename": path}, backing="b")
        qmp("block-export-add", id="e", type="nbd", node_name="n", name="e", writable=True)
        link = NBD(sock, "e")
        link.write(1024, b"\x41" * 512)
        raw = content(base)
        check(link.read(0, MIB) == raw[:1024] + b"\x41" * 512 + raw[1536:], "over the base")
        link.close()
        qmp("block-export-del", id="e", mode="hard")
    check_clean(path)

with suite.test("kill -9: what was flushed is there, in both files together"):
    sock = suite.path("k.nbd")
    for options, with_base in ((FLAT, True), (COMPACT, False), (COMPACT, True)):
        size = 4 * MIB
        base = make_base("k.base", 2 * MIB) if with_base else None
        path, data = create("k", size, options, base)
        flushed = {}
        for session in range(4):
            daemon = Daemon("--blockdev", json.dumps({"driver": "fvd", "node-name": "n", "discard": "unmap",
                                                      "file": {"driver": "file", "filename": path}}),
                            "--nbd-server", "addr.type=unix,addr.path=%s" % sock, "--export", "nbd,id=e,node-name=n,writable=on")
            link, later = NBD(sock, "n"), {}
            for number in range(100, 160):
                first = rnd.randrange(size // SECTOR - 40)
                count = rnd.choice((1, 3, 8, 40))
                link.write(first * SECTOR, stamps(first, count, session * 1000 + number))
                later.update((first + i, session * 1000 + number) for i in range(count))
                if number % 7 == 0:
                    link.flush()
                    flushed.update(later)
                    later = {}
            daemon.kill()
            link.close()
            out = suite.path("k.out")
            img("convert", "-U", "-f", "fvd", "-O", "raw", path, out)
            disk = content(out)
            for sector, number in flushed.items():
                found = read_stamp(disk[sector * SECTOR:][:SECTOR], sector)
                check(found == number or later.get(sector) is not None and found >= number, "sector %d is %d, flushed was %d", sector, found, number)
            flushed.update((s, read_stamp(disk[s * SECTOR:][:SECTOR], s)) for s in later)
            io(path, "read -q 0 512")
            check_sound(path)

with suite.test("the fvd tool makes one that QEMU reads, and reads one of QEMU's"):
    path, data_name, data = names("tool")
    has(run("fvd", "create", "--data-file", data_name, path, "2M"), "data in 'tool.raw'")
    io(path, "write -q -P 9 1M 64k")
    check(content(data)[MIB:MIB + 65536] == b"\x09" * 65536, "content")
    has(run("fvd", "check", path), "No errors")
    check(run_json("fvd", "info", "--output", "json", path)["format-specific"]["data"]["data-file"] == "tool.raw", "info")
    has(run("fvd", "create", "--data-file", "no/x.raw", suite.path("d/fail.fvd"), "1M", status=1), "no/x.raw")
    check(not os.path.exists(suite.path("d/fail.fvd")), "a file is left")

suite.finish()
