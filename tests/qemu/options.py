#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The driver as people and management programs meet it: options, errors, QMP, locks, devices.

Tests that need root (loop devices, a small tmpfs) are skipped without it. What is refused
because a later issue brings it (snapshots, compression, bitmaps, v1 images) must be
refused clearly: the tests named "not yet" hold the text and fail when the feature arrives.

Environment: see common.py.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import (KIB, MIB, NBD, TOP, Daemon, Failure, NBDError, Skip, Suite, check, check_clean, direct_io, img, io,
                    program, run, run_json, wait_for)

suite = Suite("options")
rnd = suite.random
ROOT = os.geteuid() == 0
CWD = suite.dir


def local(*words, **more):
    return run(*words, cwd=CWD, **more)


def has(text, *parts):
    for part in parts:
        check(part in text, "'%s' is not in: %s", part, text.strip())


def write(name, data, size=None):
    with open(suite.path(name), "wb") as f:
        f.write(data)
        if size:
            f.truncate(size)
    return suite.path(name)


def node(name, path, **more):
    return dict({"driver": "fvd", "node-name": name, "file": {"driver": "file", "filename": path}}, **more)


write("base.raw", b"\x11" * MIB)

# --- create and info ----------------------------------------------------------

REFUSED = [
    (["-o", "block_size=3k", "a.img", "1M"], ["block_size", "3072"]),
    (["-o", "block_size=1k", "a.img", "1M"], ["block_size", "1024"]),
    (["-o", "block_size=4M", "a.img", "1M"], ["block_size", "4194304"]),
    (["-o", "block_size=8G", "a.img", "1M"], ["block", "8589934592"]),
    (["-o", "block_size=-1", "a.img", "1M"], ["block_size"]),
    (["-o", "block_size=big", "a.img", "1M"], ["block_size"]),
    (["-o", "cluster_size=3k", "a.img", "1M"], ["3072"]),
    (["-o", "cluster_size=64k,block_size=4k", "a.img", "1M"], ["cluster_size", "64k", "block_size", "4k"]),
    (["-o", "journal_size=512k", "-b", "base.raw", "-F", "raw", "a.img"], ["journal_size", "524288"]),
    (["-o", "journal_size=1G", "-b", "base.raw", "-F", "raw", "a.img"], ["journal_size", "1073741824"]),
    (["-o", "journal_size=1000001", "-b", "base.raw", "-F", "raw", "a.img"], ["journal_size", "1000001"]),
    (["-o", "detect_sparse_hole=maybe", "-b", "base.raw", "-F", "raw", "a.img"], ["detect_sparse_hole", "maybe"]),
    (["-o", "detect_sparse_hole=on", "a.img", "1M"], ["detect-sparse-hole", "backing-file"]),
    (["-o", "detect_sparse_hole=on", "-u", "-b", "gone.raw", "-F", "raw", "a.img", "1M"], ["detect-sparse-hole", "gone.raw"]),
    (["-o", "preallocation=banana", "a.img", "1M"], ["preallocation", "banana"]),
    (["-o", "colour=red", "a.img", "1M"], ["colour"]),
    (["-o", "size=8E", "a.img"], ["size", "9223372036854775808"]),
    (["-b", "base.raw", "a.img"], ["backing", "format"]),
    (["-u", "-b", "base.raw", "a.img", "1M"], ["backing", "format"]),
    (["-F", "raw", "a.img", "1M"], ["backing-fmt", "raw", "backing-file"]),
    (["-b", "base.raw", "-F", "nonsense", "a.img"], ["nonsense"]),
    (["-b", "gone.raw", "-F", "raw", "a.img"], ["gone.raw"]),
    (["-u", "-b", "x" * 1024, "-F", "raw", "a.img", "1M"], ["1024", "1023"]),
    (["a.img"], ["size"]),
]
with suite.test("wrong options are refused by name and value, and leave no file"):
    for words, parts in REFUSED:
        has(local("qemu-img", "create", "-q", "-f", "fvd", *words, status=1), *parts)
        check(not os.path.exists(suite.path("a.img")), "a file is left by: %s", " ".join(words)[:200])

with suite.test("a path of 1023 bytes and a name with every odd character are kept"):
    name = ("d" * 200 + "/") * 5 + "e" * 18
    check(len(name) == 1023, "%d", len(name))
    local("qemu-img", "create", "-q", "-f", "fvd", "-u", "-b", name, "-F", "raw", "long.img", "1M")
    check(run_json("qemu-img", "info", "--output=json", suite.path("long.img"))["backing-filename"] == name, "other name")
    odd = "b\u00e4se, =\"'$x\n.raw"
    write(odd, b"\x55" * MIB)
    local("qemu-img", "create", "-q", "-f", "fvd", "-b", odd, "-F", "raw", "odd.img")
    check(run_json("qemu-img", "info", "--output=json", suite.path("odd.img"))["backing-filename"] == odd, "other name")
    io(suite.path("odd.img"), "read -q -P 0x55 0 1M")

with suite.test("options take effect and info shows them (text and JSON)"):
    local("qemu-img", "create", "-q", "-f", "fvd", "-b", "base.raw", "-F", "raw", "-o", "block_size=64k,journal_size=2M",
          "i.img", "3M")
    local("qemu-img", "create", "-q", "-f", "fvd", "-b", "base.raw", "-F", "raw", "-o", "cluster_size=8k", "c.img")
    text = local("qemu-img", "info", "i.img")
    has(text, "file format: fvd", "virtual size: 3 MiB", "cluster_size: 65536", "backing file: base.raw",
        "backing file format: raw", "version: 2", "clean: true", "block size: 65536", "journal size: 2097152",
        "base length: 1048576", "uuid: ")
    info = run_json("qemu-img", "info", "--output=json", suite.path("i.img"))
    data = info["format-specific"]["data"]
    for key, value in (("version", 2), ("clean", True), ("block-size", 65536), ("journal-size", 2 * MIB),
                       ("base-length", MIB), ("covered-length", MIB), ("blocks-total", 16)):
        check(data.get(key) == value, "%s is %s, not %s", key, data.get(key), value)
    check(info["format-specific"]["type"] == "fvd" and info["virtual-size"] == 3 * MIB, "%s", info)
    check(data["data-offset"] % (64 * KIB) == 0 and data["generation"] >= 1 and data["epoch"] >= 1, "%s", data)
    small = run_json("qemu-img", "info", "--output=json", suite.path("c.img"))
    check(small["cluster-size"] == 8192 and small["virtual-size"] == MIB, "cluster_size: %s", small)
    other = run_json("qemu-img", "info", "--output=json", suite.path("c.img"))["format-specific"]["data"]["uuid"]
    check(other != data["uuid"], "two images have one UUID")
    tool = run_json("fvd", "info", "--output=json", suite.path("i.img"))
    check(json.dumps(tool).find(data["uuid"]) > 0, "the fvd tool shows another UUID: %s", tool)

with suite.test("sizes are rounded up to 512, and 0 is a size"):
    for given, want in (("513", 1024), ("0", 0), ("1", 512)):
        local("qemu-img", "create", "-q", "-f", "fvd", "s.img", given)
        got = run_json("qemu-img", "info", "--output=json", suite.path("s.img"))["virtual-size"]
        check(got == want, "%s became %d", given, got)
        check_clean(suite.path("s.img"))

with suite.test("runtime options: wrong values are refused by name, right ones taken"):
    path = suite.path("i.img")
    for option in ("commit-interval=0", "commit-interval=x", "metadata-memory=abc", "no-such=1"):
        out = io(path, "read 0 512", opts="driver=fvd,file.filename=%s,%s" % (path, option), status=1)
        has(out, option.split("=")[0])
    out = io(path, "read -P 0x11 0 512", opts="driver=fvd,file.filename=%s,metadata-memory=1,commit-interval=1" % path,
             status=(0, 1))
    check("metadata" in out or "read 512" in out, "%s", out)
    io(path, "read -q -P 0x11 0 512", opts="driver=fvd,file.filename=%s,metadata-memory=1G,commit-interval=9" % path)

with suite.test("the format is probed"):
    check(run_json("qemu-img", "info", "--output=json", suite.path("i.img"))["format"] == "fvd", "not probed")

# --- bases --------------------------------------------------------------------

with suite.test("a relative base counts from the image's folder; a chain of three"):
    for folder in ("one", "two"):
        os.mkdir(suite.path(folder))
    write("one/base.raw", b"\x21" * MIB)
    local("qemu-img", "create", "-q", "-f", "fvd", "-b", "../one/base.raw", "-F", "raw", "two/mid.img")
    local("qemu-img", "create", "-q", "-f", "fvd", "-b", "mid.img", "-F", "fvd", "two/top.img", "2M")
    io(suite.path("two/mid.img"), "write -q -P 0x22 64k 64k")
    io(suite.path("two/top.img"), "write -q -P 0x23 128k 64k")
    top = suite.path("two/top.img")
    io(top, "read -q -P 0x21 0 64k", "read -q -P 0x22 64k 64k", "read -q -P 0x23 128k 64k", "read -q -P 0 1M 1M")
    chain = run_json("qemu-img", "info", "--backing-chain", "--output=json", top)
    check([i["format"] for i in chain] == ["fvd", "fvd", "raw"], "%s", [i["format"] for i in chain])
    extents = run_json("qemu-img", "map", "--output=json", top)
    check({e["depth"] for e in extents} >= {0, 1, 2}, "map: depths %s", extents)
    # Moved together they still find each other.
    os.rename(suite.path("one"), suite.path("uno"))
    os.mkdir(suite.path("one"))
    os.rename(suite.path("uno/base.raw"), suite.path("one/base.raw"))
    io(top, "read -q -P 0x21 0 64k")

with suite.test("rebase: safe to a longer and a shorter base and to none, unsafe by name"):
    write("r1.raw", b"\x31" * MIB)
    write("r2.raw", b"\x32" * (2 * MIB))
    write("r3.raw", b"\x33" * (256 * KIB))
    path = suite.path("r.img")
    img("create", "-q", "-f", "fvd", "-b", suite.path("r1.raw"), "-F", "raw", "-o", "block_size=64k", path, "2M")
    io(path, "write -q -P 0x41 100k 10k")
    for base in ("r2.raw", "r3.raw", "r1.raw"):
        img("rebase", "-f", "fvd", "-b", suite.path(base), "-F", "raw", path)
        io(path, "read -q -P 0x31 0 100k", "read -q -P 0x41 100k 10k", "read -q -P 0x31 110k 914k", "read -q -P 0 1M 1M")
        check_clean(path)
    img("rebase", "-f", "fvd", "-b", "", path)
    info = run_json("qemu-img", "info", "--output=json", path)
    check("backing-filename" not in info, "the base is still named")
    io(path, "read -q -P 0x31 0 100k", "read -q -P 0x41 100k 10k", "read -q -P 0 1M 1M")
    path = suite.path("ru.img")
    img("create", "-q", "-f", "fvd", "-b", suite.path("r1.raw"), "-F", "raw", path, "1M")
    img("rebase", "-u", "-f", "fvd", "-b", suite.path("r2.raw"), "-F", "raw", path)
    io(path, "read -q -P 0x32 0 1M")
    check_clean(path)

with suite.test("a base that is not there: the image opens without it, info works, reading fails clearly"):
    path = suite.path("late.img")
    img("create", "-q", "-f", "fvd", "-u", "-b", "late.raw", "-F", "raw", path, "1M")
    check(run_json("qemu-img", "info", "--output=json", path)["virtual-size"] == MIB, "size")
    has(io(path, "read 0 512", status=1), "late.raw")
    opts = "driver=fvd,file.filename=%s,backing=" % path
    write("late.raw", b"\x61" * (512 * KIB))
    io(path, "read -q -P 0x61 0 512k", "read -q -P 0 512k 512k", "write -q -P 0x62 510k 4k")
    io(path, "read -q -P 0x61 0 510k", "read -q -P 0x62 510k 4k", "read -q -P 0 514k 510k")
    os.truncate(suite.path("late.raw"), 256 * KIB)
    io(path, "read -q -P 0x61 0 256k", "read -q -P 0 256k 252k", "read -q -P 0x61 508k 2k", "read -q -P 0x62 510k 4k", status=0)

with suite.test("a cycle of bases is refused"):
    for name, base in (("cy1.img", "cy2.img"), ("cy2.img", "cy1.img")):
        local("qemu-img", "create", "-q", "-f", "fvd", "-u", "-b", base, "-F", "fvd", name, "1M")
    out = io(suite.path("cy1.img"), "read 0 512", status=1, timeout=60)
    check(len(out) < 20000, "the error has %d bytes", len(out))

with suite.test("commit writes the overlay into its base"):
    write("cb.raw", b"\x51" * MIB)
    img("create", "-q", "-f", "fvd", "-b", suite.path("cb.raw"), "-F", "raw", suite.path("cm.img"))
    img("create", "-q", "-f", "fvd", "-b", suite.path("cm.img"), "-F", "fvd", suite.path("ct.img"), "2M")
    io(suite.path("ct.img"), "write -q -P 0x52 5k 70k", "write -q -z 512k 64k", "write -q -P 0x53 1M 64k")
    img("commit", "-q", "-f", "fvd", suite.path("ct.img"))
    for name in ("cm.img", "ct.img"):
        io(suite.path(name), "read -q -P 0x51 0 5k", "read -q -P 0x52 5k 70k", "read -q -P 0 512k 64k",
           "read -q -P 0x53 1M 64k", "read -q -P 0 1088k 960k")
        check_clean(suite.path(name))

with suite.test("measure says at most 64 KiB more than an image gets, and refuses wrong options"):
    for options, words in (([], []), (["-o", "block_size=4k,backing_file=base.raw,backing_fmt=raw"],
                                      ["-b", "base.raw", "-F", "raw", "-o", "block_size=4k"])):
        measured = run_json("qemu-img", "measure", "--output=json", "-O", "fvd", *options, "--size", "64M")
        local("qemu-img", "create", "-q", "-f", "fvd", *words, "m.img", "64M")
        io(suite.path("m.img"), "write -q 0 64M")
        size = os.path.getsize(suite.path("m.img"))
        check(size <= measured["required"] <= measured["fully-allocated"] <= size + 64 * KIB, "%s for a file of %d", measured, size)
    has(img("measure", "-O", "fvd", "-o", "block_size=3k", "--size", "1G", status=1), "block_size", "3072")

with suite.test("bench, dd, compare, resize, convert with a base"):
    local("qemu-img", "create", "-q", "-f", "fvd", "-b", "base.raw", "-F", "raw", "w.img", "4M")
    for extra in (["-w"], [], ["-w", "-d", "8", "--flush-interval=8"], ["-w", "-d", "64", "-s", "512", "-S", "1536"]):
        has(local("qemu-img", "bench", "-f", "fvd", "-c", "500", *extra, "w.img"), "Run completed")
    check_clean(suite.path("w.img"))
    local("qemu-img", "dd", "-f", "fvd", "-O", "raw", "if=w.img", "of=dd.raw", "bs=64k")
    local("qemu-img", "compare", "-q", "-f", "fvd", "-F", "raw", "w.img", "dd.raw")
    local("qemu-img", "convert", "-f", "raw", "-O", "fvd", "-B", "base.raw", "-F", "raw", "-o", "block_size=4k", "dd.raw", "v.img")
    local("qemu-img", "compare", "-q", "-f", "fvd", "-F", "raw", "v.img", "dd.raw")
    check("backing-filename" in run_json("qemu-img", "info", "--output=json", suite.path("v.img")), "no base")
    for mode in ("falloc", "full", "metadata"):
        local("qemu-img", "resize", "-q", "-f", "fvd", "--preallocation=" + mode, "w.img", "+1M")
    io(suite.path("w.img"), "read -q -P 0 4M 3M")
    check_clean(suite.path("w.img"))

with suite.test("a disk shrinks only with --shrink; what was cut off is zero when it grows again"):
    for options in ("compact_image=off", "compact_image=on,chunk_size=64k,storage_grow_unit=1M"):
        path = suite.path("sh.img")
        img("create", "-q", "-f", "fvd", "-b", suite.path("base.raw"), "-F", "raw", "-o", options, path, "8M")
        io(path, "write -q -P 7 0 8M")
        has(img("resize", "-q", "-f", "fvd", path, "3M", status=1), "--shrink")
        io(path, "read -q -P 7 0 8M")
        img("resize", "-q", "-f", "fvd", "--shrink", path, "3M")
        io(path, "read -q 3M 512", status=1)
        check_clean(path)
        img("resize", "-q", "-f", "fvd", path, "8M")
        io(path, "read -q -P 7 0 3M", "read -q -P 0 3M 5M")
        check_clean(path)

NOT_YET = [
    (["snapshot", "-c", "x", "w.img"], ["not supported"]),
    (["convert", "-c", "-f", "raw", "-O", "fvd", "base.raw", "z.img"], ["Compression not supported"]),
    (["bitmap", "--add", "-f", "fvd", "w.img", "b"], ["not supported"]),
]
with suite.test("not yet: snapshots, compression, stored bitmaps are refused clearly"):
    for words, parts in NOT_YET:
        has(local("qemu-img", *words, status=1), *parts)
    check_clean(suite.path("w.img"))

# --- damaged and foreign files -------------------------------------------------

with suite.test("wrong magic, empty, short and truncated files are refused with a reason"):
    path = suite.path("t.img")
    img("create", "-q", "-f", "fvd", "-b", suite.path("base.raw"), "-F", "raw", "-o", "journal_size=1M", path, "1M")
    io(path, "write -q -P 1 0 1M")
    with open(path, "rb") as f:
        whole = f.read()
    has(img("info", "-f", "fvd", write("foreign.img", b"no image\n" * 1000), status=1), "not an FVD image")
    has(img("info", "-f", "fvd", write("empty.img", b""), status=1), "not an FVD image")
    for length in (512, 4096, 8192, 131072, 135168, 262144, len(whole) // 2, len(whole) - 4096):
        short = write("short.img", whole[:length])
        has(io(short, "read -q -P 1 0 1M", status=1), "short")
    for length in (512, 8192, 131072):
        img("info", "-f", "fvd", write("short.img", whole[:length]), status=1)

with suite.test("a version 1 image is refused as such"):
    folder = os.environ.get("GOLDEN_V1") or os.path.join(TOP, "tests/golden-v1")
    found = os.path.join(folder, "cow_clean.tar.xz")
    if os.path.exists(found):
        with tarfile.open(found) as tar:
            head = tar.extractfile([m for m in tar.getmembers() if m.name.endswith(".fvd")][0]).read(64 * KIB)
        print("# with a golden image")
    else:
        # By docs/format.md, FMT-150.
        head = bytes.fromhex("a9f543510100000000000000000080000000000000300001") + b"\0" * 8192
    v1 = write("v1.img", head)
    for words in (["info", v1], ["info", "-f", "fvd", v1], ["check", "-f", "fvd", v1], ["convert", "-O", "raw", v1, v1 + ".raw"]):
        has(img(*words, status=1), "version 1")
    has(run("fvd", "info", v1, status=None), "version 1")

with suite.test("flipped bits in the metadata: an error or right data, no crash, no hang"):
    path = suite.path("f.img")
    base = write("fb.raw", rnd.randbytes(MIB))
    img("create", "-q", "-f", "fvd", "-b", base, "-F", "raw", "-o", "journal_size=1M,block_size=4k", path, "2M")
    # Left without a clean close, so that the journal counts.
    daemon = Daemon("--blockdev", json.dumps(node("d", path)), "--nbd-server", "addr.type=unix,addr.path=%s" % suite.path("f.nbd"),
                    "--export", "nbd,id=e,node-name=d,writable=on")
    link = NBD(suite.path("f.nbd"), "d")
    for number in range(60):
        link.write(rnd.randrange(200) * 4096, bytes([number + 1]) * 4096)
        link.flush()
    # The last commit is one whose loss shows nowhere: without its last unit it looks like a cut.
    with open(base, "rb") as f:
        f.seek(210 * 4096)
        link.write(210 * 4096, f.read(4096))
    link.flush()
    daemon.kill()
    img("convert", "-f", "fvd", "-O", "raw", path, suite.path("right.raw"))
    with open(path, "rb") as f:
        whole = f.read()
    offset = run_json("qemu-img", "info", "--output=json", path)["format-specific"]["data"]["data-offset"]
    # Where something is written; most of the metadata is zero.
    places = [p for p in range(0, offset, 4096) if whole[p:p + 4096] != bytes(4096)]
    refused = 0
    for turn in range(60):
        at = rnd.choice(places) * 8 + rnd.randrange(4096 * 8)
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << (at % 8)
        bad = write("bad.img", broken)
        out = img("convert", "-f", "fvd", "-O", "raw", bad, suite.path("bad.raw"), status=(0, 1))
        if "Could not" in out or "rror" in out:
            refused += 1
            continue
        if "the journal is damaged" in out:
            # FMT-55: reading goes on with a warning, writing is refused.
            has(io(bad, "write -q 0 512", status=1), "journal")
            refused += 1
            continue
        compared = img("compare", "-f", "raw", "-F", "raw", suite.path("bad.raw"), suite.path("right.raw"), status=(0, 1))
        check("identical" in compared, "bit %d of byte %d flipped: wrong data without an error", at % 8, at // 8)
        img("check", "-f", "fvd", bad, status=(0, 1, 2, 3))
    print("# %d of 60 refused" % refused)

# --- QMP ----------------------------------------------------------------------

with suite.test("QMP: blockdev-create with all options, errors in the job"):
    with Daemon() as daemon:
        qmp = daemon.qmp
        path = write("q.img", b"")
        qmp("blockdev-add", driver="file", node_name="qf", filename=path)
        qmp.create(driver="fvd", file="qf", size=MIB, preallocation="falloc",
                   **{"block-size": 8192, "journal-size": MIB, "backing-file": suite.path("base.raw"), "backing-fmt": "raw",
                      "detect-sparse-hole": 4096})
        for options, parts in (
                (dict(size=MIB, block_size=3000), ["3000"]),
                (dict(size=MIB, journal_size=5), ["journal", "5"]),
                (dict(size=MIB, backing_file="x.raw"), ["x.raw", "backing-fmt"]),
                (dict(size=MIB, backing_fmt="raw"), ["backing-fmt", "raw"]),
                (dict(size=MIB, backing_file="", backing_fmt="raw"), ["backing-file"]),
                (dict(size=2 ** 63), ["9223372036854775808"])):
            try:
                qmp.create(driver="fvd", file="qf", **{k.replace("_", "-"): v for k, v in options.items()})
                raise AssertionError(options)
            except Failure as error:
                has(str(error), *parts)
                qmp.raw("job-dismiss", id="create")
        qmp.create(driver="fvd", file="qf", size=MIB, **{"block-size": 8192, "backing-file": suite.path("base.raw"), "backing-fmt": "raw"})
        qmp("blockdev-add", driver="fvd", node_name="q", file="qf")
        image = qmp.node("q")["image"]
        check(image["format-specific"]["data"]["block-size"] == 8192, "%s", image)
        qmp("blockdev-del", node_name="q")
        qmp("blockdev-del", node_name="qf")
    check_clean(path)
    io(path, "read -q -P 0x11 0 1M")

with suite.test("QMP: libvirt's external snapshot, commit with pivot, pull, copy"):
    disk, over = suite.path("lv.img"), write("over.img", b"")
    img("create", "-q", "-f", "fvd", disk, "4M")
    io(disk, "write -q -P 0x71 0 1M")
    sock = suite.path("lv.nbd")
    with Daemon("--object", "iothread,id=io0", "--nbd-server", "addr.type=unix,addr.path=%s" % sock) as daemon:
        qmp = daemon.qmp
        qmp("blockdev-add", driver="file", node_name="disk-storage", filename=disk, discard="unmap")
        qmp("blockdev-add", driver="fvd", node_name="disk", file="disk-storage", discard="unmap")
        qmp("block-export-add", id="e", type="nbd", node_name="disk", name="e", writable=True, iothread="io0")
        link = NBD(sock, "e")
        link.write(MIB, b"\x72" * (64 * KIB))
        # The overlay by names only, opened without its base, then put on.
        qmp("blockdev-add", driver="file", node_name="over-storage", filename=over, discard="unmap")
        qmp.create(driver="fvd", file="over-storage", size=4 * MIB, **{"backing-file": disk, "backing-fmt": "fvd"})
        qmp("blockdev-add", driver="fvd", node_name="over", file="over-storage", backing=None, discard="unmap")
        info = qmp.node("over")["image"]
        check(info.get("backing-filename") == disk, "the base's name is not in the header: %s", info)
        # While it has no base there is nothing to read there, and nothing of it may be kept.
        qmp("blockdev-snapshot", node="disk", overlay="over")
        link.write(2 * MIB, b"\x73" * (64 * KIB))
        link.write(100, b"\x74" * 1000)
        check(link.read(0, 100) == b"\x71" * 100 and link.read(100, 1000) == b"\x74" * 1000, "first bytes")
        check(link.read(1100, 3000) == b"\x71" * 3000, "the rest of the block is not the base's")
        check(link.read(MIB, 64 * KIB) == b"\x72" * (64 * KIB), "the base's write is not seen")
        check(link.read(3 * MIB, 4096) == bytes(4096), "never written")
        link.flush()
        # Pull everything up and copy to a third image, pivot there.
        qmp.job("block-stream", job_id="pull", device="over", auto_dismiss=False)
        check("backing-filename" not in qmp.node("over")["image"], "after the pull there is still a base")
        third = write("third.img", b"")
        qmp("blockdev-add", driver="file", node_name="third-storage", filename=third)
        qmp.create(driver="fvd", file="third-storage", size=4 * MIB)
        qmp("blockdev-add", driver="fvd", node_name="third", file="third-storage")
        qmp.job("blockdev-mirror", job_id="copy", device="over", target="third", sync="full", auto_dismiss=False)
        link.write(3 * MIB, b"\x75" * 512)
        link.flush()
        link.close()
        qmp("block-export-del", id="e", mode="hard")
    for path, last in ((over, 0), (third, 0x75)):
        check_clean(path)
        io(path, "read -q -P 0x71 0 100", "read -q -P 0x74 100 1000", "read -q -P 0x71 1100 1047476",
           "read -q -P 0x72 1M 64k", "read -q -P 0x73 2M 64k", "read -q -P %d 3M 512" % last)

with suite.test("QMP: base attached by blockdev-reopen, read-only and read-write in turn"):
    path = suite.path("ro.img")
    img("create", "-q", "-f", "fvd", "-b", suite.path("base.raw"), "-F", "raw", path, "2M")
    sock = suite.path("ro.nbd")
    with Daemon("--nbd-server", "addr.type=unix,addr.path=%s" % sock) as daemon:
        qmp = daemon.qmp
        qmp("blockdev-add", driver="raw", node_name="b", read_only=True, file={"driver": "file", "filename": suite.path("base.raw")})
        qmp("blockdev-add", **node("n", path, backing=None))
        qmp("blockdev-reopen", options=[node("n", path, backing="b")])
        for turn in range(6):
            writable = turn % 2 == 0
            qmp("blockdev-reopen", options=[node("n", path, backing="b", **{"read-only": not writable, "commit-interval": turn + 1})])
            qmp("block-export-add", id="e", type="nbd", node_name="n", name="e", writable=writable)
            link = NBD(sock, "e")
            if writable:
                link.write(turn * 8192, bytes([turn + 1]) * 4096)
            check(link.read(4096, 512) == b"\x11" * 512, "the base is not read")
            for before in range(0, turn + 1, 2):
                check(link.read(before * 8192, 4096) == bytes([before + 1]) * 4096, "turn %d: write %d is lost", turn, before)
            link.close()
            qmp("block-export-del", id="e", mode="hard")
            wait_for(lambda: not qmp("query-block-exports"), "the end of the export")
        has(qmp.error("blockdev-reopen", options=[node("n", path, backing="b", **{"commit-interval": 0})]), "commit-interval")
    check_clean(path)

# --- locks --------------------------------------------------------------------

with suite.test("locks: a writer keeps others out, readers share, the fvd tool and QEMU see each other"):
    path = suite.path("l.img")
    img("create", "-q", "-f", "fvd", "-b", suite.path("base.raw"), "-F", "raw", path, "2M")
    with Daemon("--blockdev", json.dumps(node("n", path)), "--nbd-server", "addr.type=unix,addr.path=%s" % suite.path("l.nbd"),
                "--export", "nbd,id=e,node-name=n,writable=on"):
        has(io(path, "write 0 512", status=1), "lock")
        has(io(path, "read 0 512", args=["-r"], status=1), "lock")
        has(img("info", path, status=1), "lock")
        has(img("create", "-q", "-f", "fvd", path, "1M", status=1), "lock")
        img("info", "-U", path)
        for words in (["info", path], ["check", path], ["map", path], ["create", path, "1M"]):
            has(run("fvd", *words, status=None), "in use")
        run("fvd", "info", "-U", path)
    with Daemon("--blockdev", json.dumps(node("n", path, **{"read-only": True}))):
        io(path, "read -q -P 0x11 0 512", args=["-r"])
        has(io(path, "write 0 512", status=1), "lock")
        run("fvd", "info", path)
        run("fvd", "check", path)
    # The tool writes, stopped in the middle; QEMU must stay out.
    tool = subprocess.Popen([program("fvd"), "create", "-q", "--preallocation", "full", suite.path("lt.img"), "400M"])
    try:
        wait_for(lambda: os.path.exists(suite.path("lt.img")) and os.stat(suite.path("lt.img")).st_blocks > 64, "the tool's first write")
        tool.send_signal(signal.SIGSTOP)
        check(tool.poll() is None, "the tool was done before it could be stopped")
        has(img("create", "-q", "-f", "fvd", suite.path("lt.img"), "1M", status=1), "lock")
        has(io(suite.path("lt.img"), "write 0 512", fmt="raw", status=1), "lock")
    finally:
        tool.send_signal(signal.SIGKILL)
        tool.wait()
    # What an interrupted creation leaves is refused, not half an image.
    img("info", "-f", "fvd", suite.path("lt.img"), status=1)
    os.unlink(suite.path("lt.img"))

# --- devices and full disks ---------------------------------------------------


class Loop:
    def __init__(self, path, *options):
        if not ROOT:
            raise Skip("needs root (loop devices)")
        done = subprocess.run(["losetup", "--show", "-f", *options, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise Skip("losetup: %s" % done.stderr.strip())
        self.device = done.stdout.strip()

    def __enter__(self):
        return self.device

    def __exit__(self, *exc):
        subprocess.run(["losetup", "-d", self.device], check=False)


def exercise(path, words=(), args=("-t", "none", "-i", "native"), size="8M", zeroes=True):
    """Unaligned I/O over a base on something special; without zeroes space never written may hold anything."""
    img("create", "-q", "-f", "fvd", "-b", suite.path("base.raw"), "-F", "raw", "-o", "journal_size=1M", *words, path, size)
    io(path, "write -q -P 0x81 100 5000", "write -q -P 0x82 1048000 3000", "write -q -z 70001 9000", "flush",
       "aio_write -q -P 0x83 2M 4097", "aio_write -q -P 0x84 2101249 511", "aio_flush", "discard -q 5M 1M",
       "write -q -f -P 0x85 %d 512" % (8 * MIB - 512), args=list(args))
    reads = ["read -q -P 0x11 0 100", "read -q -P 0x81 100 5000", "read -q -P 0x11 5100 64901", "read -q -P 0 70001 9000",
             "read -q -P 0x82 1048000 3000", "read -q -P 0 1051000 4096", "read -q -P 0x83 2M 4097",
             "read -q -P 0x84 2101249 511", "read -q -P 0 3M 1M", "read -q -P 0x85 %d 512" % (8 * MIB - 512)]
    if not zeroes:
        reads = [r for r in reads if r not in ("read -q -P 0 1051000 4096", "read -q -P 0 3M 1M")]
    for other in (args, ("-t", "none", "-i", "io_uring"), ("-t", "writeback")):
        io(path, *reads, args=list(other))
    check_clean(path)


with suite.test("a block device as image file, full of old data (512 and 4096 bytes a sector)"):
    for sector in ("512", "4096"):
        with Loop(write("dev.bin", b"\xff" * (16 * MIB)), "--sector-size", sector) as device:
            exercise(device, zeroes=False)
            # What is converted there is right everywhere, as no zeroes are taken for granted.
            content = bytearray(8 * MIB)
            content[MIB:MIB + 1000] = b"\x07" * 1000
            img("convert", "-f", "raw", "-O", "fvd", write("dc.raw", content), device)
            img("compare", "-q", "-f", "fvd", "-F", "raw", device, suite.path("dc.raw"))
            io(device, "write -q -z 0 8M", "read -q -P 0 0 8M", args=["-t", "none"])
            check_clean(device)
            has(img("create", "-q", "-f", "fvd", device, "64M", status=1), os.path.basename(device))
            exercise(device, zeroes=False)

with suite.test("an image in a file system on a device of 4096-byte sectors, cache=none"):
    mount = suite.path("mnt")
    os.mkdir(mount)
    with Loop(write("fs.bin", b"", 96 * MIB), "--sector-size", "4096", "--direct-io=off") as device:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", device], check=True)
        if subprocess.run(["mount", device, mount]).returncode != 0:
            raise Skip("mount")
        try:
            exercise(os.path.join(mount, "a.img"))
            exercise(os.path.join(mount, "b.img"), args=("-t", "none", "-i", "io_uring"))
        finally:
            subprocess.run(["umount", mount], check=False)

with suite.test("a full disk: writes and flushes fail with ENOSPC, nothing is lost, a retry works"):
    if not ROOT:
        raise Skip("needs root (mount)")
    mount = suite.path("full")
    os.mkdir(mount)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "none", mount]).returncode != 0:
        raise Skip("mount")
    try:
        filler = os.path.join(mount, "filler")
        for words in ([], ["-b", suite.path("base.raw"), "-F", "raw"], ["-o", "compact_image=on,chunk_size=64k"],
                      ["-o", "compact_image=on,chunk_size=64k", "-b", suite.path("base.raw"), "-F", "raw"]):
            path = os.path.join(mount, "n.img")
            img("create", "-q", "-f", "fvd", *words, *(["-o", "journal_size=1M"] if words else []), path, "16M")
            with open(filler, "wb") as f:
                f.write(bytes(12 * MIB))
            with Daemon("--blockdev", json.dumps(node("n", path)),
                        "--nbd-server", "addr.type=unix,addr.path=%s" % suite.path("n.nbd"),
                        "--export", "nbd,id=e,node-name=n,writable=on") as daemon:
                link = NBD(suite.path("n.nbd"), "n")
                done, failed = [], []
                for at in range(0, 16 * MIB, 64 * KIB):
                    try:
                        link.write(at, bytes([at >> 16]) * 65536)
                        done.append(at)
                    except NBDError as error:
                        check(error.code == 28, "%s instead of ENOSPC", error)
                        failed.append(at)
                check(done and failed, "%d writes succeeded, %d failed", len(done), len(failed))
                try:
                    link.flush()
                except NBDError as error:
                    check(error.code == 28, "%s instead of ENOSPC", error)
                for at in done:
                    check(link.read(at, 65536) == bytes([at >> 16]) * 65536, "a write that succeeded reads otherwise")
                os.unlink(filler)
                for at in failed:
                    link.write(at, bytes([at >> 16]) * 65536)
                link.flush()
                link.close()
                daemon.qmp("block-export-del", id="e", mode="hard")
            check_clean(path)
            img("convert", "-f", "fvd", "-O", "raw", path, suite.path("n.raw"))
            with open(suite.path("n.raw"), "rb") as f:
                for at in range(0, 16 * MIB, 64 * KIB):
                    check(f.read(65536) == bytes([at >> 16]) * 65536, "after the retry %d is wrong", at)
            os.unlink(path)
        # Creation on a full disk leaves nothing behind.
        with open(filler, "wb") as f:
            f.write(bytes(23 * MIB))
        has(img("create", "-q", "-f", "fvd", "-o", "preallocation=full", os.path.join(mount, "x.img"), "8M", status=1), "x.img")
        check(not os.path.exists(os.path.join(mount, "x.img")), "a file is left")
    finally:
        subprocess.run(["umount", mount], check=False)
suite.finish()
