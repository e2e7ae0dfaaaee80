# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compact images in time: allocating writes, random reads over a mapped disk of 1 TiB, its open and check.

Reads: `preallocation=metadata` gives each chunk and cluster its place, which is a hole; raw is a
sparse file. So what is compared is the way to the place. Memory is what the process needs at most
beyond one that does the same with raw. Images that are written to are made anew for each run.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import time

from common import EXTENDED, GIB, LARGE, LAZY, MIB, QCOW2, TIB, Failed, create, interval, judge_ratio, run, tool
from ratios import STRIDE, Side, compare

COMPACT = "compact_image=on"
# Odd numbers of MiB and of blocks: a disk of a power of two is met at every place.
ALLOCATING = 1021 * MIB
FAR = 340573 * 4096
QCOW2S = [("qcow2",) + QCOW2, ("qcow2 ext. L2",) + EXTENDED, ("qcow2 2M clusters",) + LARGE]


def allocating(place, rounds, requests, out):
    """New disks. Random writes, as the figure says; and the worst there is for chunks of 1 MiB: each write meets another
    one, and a growth step lasts for few."""

    def sides(size):
        def side(label, form, options):
            return Side(place, f"alloc {label}", form, lambda path: create(form, path, size, None, options), True)

        ours = [side("fvd", "fvd", COMPACT), side("fvd 128k", "fvd", COMPACT + ",chunk_size=128k")]
        return ours, side("raw", "raw", ""), [side(label, form, options) for label, form, options in QCOW2S + [("qcow2 lazy",) + LAZY]]

    rows = []
    cases = [("random over 1 GiB, depth 32", GIB, requests, {"depth": 32, "stride": STRIDE}, True),
             ("random over 1 GiB, flush each", GIB, requests // 16, {"depth": 1, "flush": 1, "stride": STRIDE}, True),
             ("one in each MiB, depth 32", 16 * GIB, requests, {"depth": 32, "stride": ALLOCATING}, False),
             ("one in each MiB, flush each", 16 * GIB, requests // 16, {"depth": 1, "flush": 1, "stride": ALLOCATING}, True)]
    for name, size, n, how, judged in cases:
        ours, raw, rivals = sides(size)
        for ourselves in ours[:1] if "flush" in how else ours:
            for theirs in rivals + ([raw] if "flush" not in how else []):
                if size > GIB and "2M" in theirs.label:
                    continue  # There is no room for so much zeroing.
                shown = not judged or ourselves is not ours[0]
                times, _, iops, _ = compare(ourselves, theirs, min(rounds, 5) if shown else rounds, n, write=True, **how)
                figure = 0.85 if theirs is raw else 1.1 if "flush" not in how else 1.0
                median, low, high, verdict = judge_ratio(times, figure)
                what = f"{ourselves.label[6:]}, {name}: {theirs.label[6:]}"
                mid = [interval(iops[s.label])[0] for s in (ourselves, theirs)]
                rows.append([what, f"{mid[0]:.0f}", f"{mid[1]:.0f}", f"{median:.3f}", f"{low:.3f}..{high:.3f}"])
                if ourselves is ours[0]:
                    out.figure(f"compact, allocating 4 KiB writes, {what[5:]}", f"{median:.3f} [{low:.3f}, {high:.3f}]", f">= {figure}", verdict if judged else "shown")
                print("  " + "  ".join(rows[-1]), flush=True)
    out.table(["", "fvd IOPS", "rival IOPS", "ratio", "95 %"], rows)


def resident(place, form, image, requests, extra=""):
    """IOPS of random reads at depth 1, and the most memory the process had: bytes."""
    target = f"driver={form},file.driver=file,file.filename={image},file.aio=io_uring,cache.direct={'on' if place.cache == 'none' else 'off'}{extra}"
    child = subprocess.Popen([tool("qemu-img"), "bench", "--image-opts", target, "-d", "1", "-c", str(requests), "-s", "4096", "-S", str(FAR)],
                             stdout=subprocess.PIPE, text=True)
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    found = re.search(r"Run completed in ([0-9.]+) seconds", text)
    if status or not found:
        raise Failed(text)
    return requests / float(found.group(1)), usage.ru_maxrss * 1024


def reads(place, rounds, requests, out):
    raw, ours = place.path("mapped-raw"), place.path("mapped-fvd")
    create("raw", raw, TIB)
    create("fvd", ours, TIB, None, COMPACT + ",preallocation=metadata")
    sides = [("fvd", "fvd", ours, "")]
    theirs = place.path("mapped-qcow2")
    create(QCOW2[0], theirs, TIB, None, QCOW2[1] + ("," if QCOW2[1] else "") + "preallocation=metadata")
    sides += [("qcow2, l2-cache-size as it is", "qcow2", theirs, ""), ("qcow2, all of L2 in memory", "qcow2", theirs, ",l2-cache-size=128M")]
    rows = []
    for label, form, image, extra in sides:
        ratios, memory = [], []
        for _ in range(rounds):
            got = [resident(place, *side) for side in ((form, image, requests, extra), ("raw", raw, requests), ("raw", raw, requests), (form, image, requests, extra))]
            ratios.append((1 / got[1][0] + 1 / got[2][0]) / (1 / got[0][0] + 1 / got[3][0]))
            memory.append((max(got[0][1], got[3][1]) - min(got[1][1], got[2][1])) / MIB)
        median, low, high, verdict = judge_ratio(ratios, 0.9)
        rows.append([label, f"{median:.3f}", f"{low:.3f}..{high:.3f}", f"{statistics.median(memory):.1f}"])
        print("  " + "  ".join(rows[-1]), flush=True)
        if form == "fvd":
            out.figure("compact, random reads over a mapped 1 TiB, depth 1, to raw", f"{median:.3f} [{low:.3f}, {high:.3f}]", ">= 0.9", verdict)
            out.at_most("compact, the same: memory beyond raw's", statistics.median(memory), 16, " MiB")
    out.table(["", "ratio to raw", "95 %", "MiB beyond raw"], rows)
    os.unlink(theirs)
    os.unlink(raw)
    return ours


def crashed(place, image):
    """An image of 1 TiB whose writer was killed with as much in its journal as it gets: bytes of that."""
    create("fvd", image, TIB, None, COMPACT)
    child = subprocess.Popen([tool("qemu-img"), "bench", "-f", "fvd", "-t", place.cache, "-w", "--flush-interval=8", "-d", "8",
                              "-c", "1000000", "-s", "4096", "-S", str(ALLOCATING), image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    used = 0
    deadline = time.monotonic() + 60
    # Just before the first checkpoint, which comes when half of the journal is used.
    while used < 7 * MIB and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
        used = journal_used(image)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return journal_used(image)


def journal_used(image):
    """Bytes of the journal that are not zero, by halving: it is filled from its start in the first session."""
    found = re.search(r"^ *region Journal: offset (\d+), length (\d+)", run(tool("fvd"), "dump", image), re.M) if image not in _journal else None
    if found:
        _journal[image] = tuple(map(int, found.groups()))
    offset, length = _journal[image]
    low, high = 0, length // 4096
    with open(image, "rb") as file:
        while low < high:
            middle = (low + high) // 2
            file.seek(offset + middle * 4096)
            if any(file.read(4096)):
                low = middle + 1
            else:
                high = middle
    return low * 4096


_journal = {}


def open_and_check(place, programs, mapped, out):
    got = json.loads(run(programs["open"], mapped, 100, "nobase", "rw"))
    clean = statistics.median(got["ms"])
    out.at_most("compact, open of the mapped 1 TiB, clean: median of 100, C API", clean, 5, " ms")
    image, copy = place.path("crashed"), place.path("crashed-copy")
    used = crashed(place, image)
    if used < 4 * MIB:
        raise Failed(f"the writer left {used} bytes of journal")
    took = []
    for _ in range(5):
        run("cp", "--sparse=always", image, copy)
        took += json.loads(run(programs["open"], copy, 1, "nobase", "rw"))["ms"]
    after = statistics.median(took)
    out.at_most(f"compact, open of 1 TiB after a crash, {used / MIB:.1f} MiB of journal to replay: median of 5", after, 100, " ms")
    times = []
    for _ in range(5):
        start = time.monotonic()
        run(tool("qemu-img"), "check", "-f", "fvd", mapped)
        times.append(time.monotonic() - start)
    out.at_most("compact, check of the mapped 1 TiB: median of 5, the process included", statistics.median(times), 1, " s")
    out.table(["", ""], [["open, clean", f"{clean:.2f} ms"], [f"open after a crash, {used / MIB:.1f} MiB of journal", f"{after:.1f} ms"],
                         ["check", f"{statistics.median(times):.3f} s"]])
    for path in (image, copy):
        os.unlink(path)


def after_random_fill(place, rounds, out):
    """Reading a disk in order that was filled at random: time to raw's, filled alike."""
    size, piece = 512 * MIB, 64 * 1024
    rows = []
    images = {}
    for label, form, options in [("raw", "raw", ""), ("fvd", "fvd", COMPACT), ("fvd, 64 KiB chunks", "fvd", COMPACT + ",chunk_size=64k")] + QCOW2S:
        image = place.path("filled-" + re.sub(r"\W+", "-", label))
        create(form, image, size, None, options)
        run(tool("qemu-img"), "bench", "-f", form, "-t", place.cache, "-w", "-d", "1", "-c", size // piece, "-s", piece, "-S", 2503 * piece, image)
        images[label] = (form, image)

    def read(label):
        form, image = images[label]
        text = run(tool("qemu-img"), "bench", "-f", form, "-t", place.cache, "-i", "io_uring", "-d", "4", "-c", size // MIB, "-s", MIB, image)
        return float(re.search(r"Run completed in ([0-9.]+) seconds", text).group(1))

    for label in images:
        if label == "raw":
            continue
        ratios = []
        for _ in range(rounds):
            t = [read(l) for l in (label, "raw", "raw", label)]
            ratios.append((t[1] + t[2]) / (t[0] + t[3]))
        median, low, high = interval(ratios)
        rows.append([label, f"{median:.3f}", f"{low:.3f}..{high:.3f}"])
        print("  " + "  ".join(rows[-1]), flush=True)
    out.table(["1 MiB reads in order, depth 4", "throughput to raw", "95 %"], rows)
    for _, image in images.values():
        os.unlink(image)


def report(place, programs, quick, rounds, out):
    out.section(f"Compact images: allocating 4 KiB writes to new disks, aio=io_uring, {place.describe()}")
    allocating(place, rounds, 4000 if quick else 16000, out)
    out.section("Compact images: random reads of 4 KiB over a fully mapped 1 TiB, depth 1")
    mapped = reads(place, rounds, 5000 if quick else 40000, out)
    out.section("Compact images: open and check of 1 TiB")
    open_and_check(place, programs, mapped, out)
    os.unlink(mapped)
    out.section("Compact images: reading in order after a fill in random order, 64 KiB at a time (512 MiB)")
    after_random_fill(place, min(rounds, 15), out)
