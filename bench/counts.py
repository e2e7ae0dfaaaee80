# SPDX-License-Identifier: MIT OR Apache-2.0
"""Host operations per guest operation, counted by strace: exact, whatever the machine's load.

One qemu-img process a case, aio=threads, depth 1, each request in a 128 KiB of its own. Of an fvd
image the region that a write goes to tells what it is for: guest data and journal are the
operation's cost; header, page map, bitmap pages and double-write area are the session's and the
checkpoints', and are counted apart. A sync belongs to what was written since the one before.
"""

import errno
import os
import re

from common import EXTENDED, MIB, QCOW2, create, filled, run, tool

STEP = 128 * 1024
CALLS = ("pread64,preadv,preadv2,pwrite64,pwritev,pwritev2,fdatasync,fsync,sync_file_range,"
         "ftruncate,fallocate,copy_file_range,io_submit")
LINE = re.compile(r"^(\d+) +(\w+)\((\d+)<([^>]*)>(.*)$")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>.*\)\s+= (-?\d+)")
# The last argument is the offset; preadv2 and pwritev2 have flags after it.
AT = re.compile(r", (\d+)(?:\)\s+=| <unfinished)")
AT_FLAGS = re.compile(r", (\d+), [\w|]+(?:\)\s+=| <unfinished)")
RESULT = re.compile(r"\)\s+= (-?\d+)")


class Call:
    def __init__(self, name, path, at, ret, durable):
        self.name, self.path, self.at, self.ret = name, path, at, ret
        self.durable = durable


def traced(trace, *args):
    """The calls that touch files, in the order in which they were started."""
    run("strace", "-f", "-qq", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", trace, *args)
    calls, waiting = [], {}
    with open(trace, encoding="utf-8", errors="replace") as file:
        for line in file:
            found = RESUMED.match(line)
            if found:
                call = waiting.pop((found.group(1), found.group(2)), None)
                if call:
                    call.ret = int(found.group(3))
                continue
            found = LINE.match(line)
            if not found:
                if " io_submit(" in line:
                    raise AssertionError("io_submit under aio=threads: it would not be counted")
                continue
            pid, name, _, path, rest = found.groups()
            at = (AT_FLAGS if name.endswith("v2") else AT).search(rest)
            ret = RESULT.search(rest)
            call = Call(name, path, int(at.group(1)) if at else None, int(ret.group(1)) if ret else None, "RWF_DSYNC" in rest or "RWF_SYNC" in rest)
            if call.ret is None:
                waiting[pid, name] = call
            calls.append(call)
    os.unlink(trace)
    return calls


def regions(image):
    """What the header of an fvd image says lies where: (start, end, kind)."""
    text = run(tool("fvd"), "dump", image)
    out = [(0, 262144, "header")]
    kinds = {"Journal": "journal", "DoubleWrite": "double write", "PageMap": "pages", "Bitmap": "pages", "Table": "pages"}
    for name, start, length in re.findall(r"^ *region (\w+): offset (\d+), length (\d+)", text, re.M):
        out.append((int(start), int(start) + int(length), kinds.get(name, name)))
    data = int(re.search(r"^ *data offset: (\d+)", text, re.M).group(1))
    out.append((data, 1 << 63, "data"))
    return out


def kind_of(places, at):
    for start, end, kind in places:
        if start <= at < end:
            return kind
    return "unknown"


# What is not the operation's: written once a session, or by checkpoints.
APART = {"header": "header", "pages": "checkpoint", "double write": "checkpoint"}


class Counts:
    """Sums over a run; per() gives them per operation."""

    def __init__(self):
        self.writes = self.written = self.reads = self.read = self.syncs = 0
        self.apart = {}
        self.by_kind = {}

    def add_apart(self, what, writes, written, syncs):
        old = self.apart.get(what, (0, 0, 0))
        self.apart[what] = (old[0] + writes, old[1] + written, old[2] + syncs)

    def __sub__(self, other):
        """What a longer run cost more than this other one."""
        out = Counts()
        for name in ("writes", "written", "reads", "read", "syncs"):
            setattr(out, name, getattr(self, name) - getattr(other, name))
        for what, ours in self.apart.items():
            theirs = other.apart.get(what, (0, 0, 0))
            out.apart[what] = tuple(a - b for a, b in zip(ours, theirs))
        return out

    def per(self, ops):
        return {
            "writes": self.writes / ops,
            "KiB written": self.written / 1024 / ops,
            "reads": self.reads / ops,
            "KiB read": self.read / 1024 / ops,
            "syncs": self.syncs / ops,
        }


def count(calls, image, base, places):
    """places None: everything written is the operation's (raw, qcow2)."""
    out = Counts()
    image, base = os.path.realpath(image), base and os.path.realpath(base)
    since = set()
    started = False
    for call in calls:
        if call.path not in (image, base):
            continue
        if call.name.startswith("pread"):
            # Before the first write: the formats read their headers and tables.
            if started:
                out.reads += 1
                out.read += call.ret
            else:
                out.add_apart("opening (reads)", 1, call.ret, 0)
        elif call.name.startswith("pwrite"):
            started = True
            kind = kind_of(places, call.at) if places else "any"
            since.add(kind)
            out.by_kind[kind] = out.by_kind.get(kind, 0) + 1
            if kind in APART:
                out.add_apart(APART[kind], 1, call.ret, 0)
            else:
                out.writes += 1
                out.written += call.ret
            if call.durable:
                # As good as a sync, and as dear.
                out.syncs += 1
        elif call.name in ("fdatasync", "fsync", "sync_file_range"):
            if since and all(kind in APART for kind in since):
                out.add_apart("checkpoint" if since & {"pages", "double write"} else "header", 0, 0, 1)
            else:
                out.syncs += 1
            since = set()
        else:
            # No data: space given to the file or taken from it.
            out.add_apart(f"growth ({call.name})", 1, 0, 0)
    return out


class Case:
    """One guest operation, repeated.

    base: "full", "holes" or None. step: from one request to the next. room: requests the disk has
    room for, instead of as many as there are. used: the disk was full, and the first half of each
    step discarded. no_zeroing: the storage refuses to zero, so that QEMU writes zeroes.
    """

    def __init__(self, name, flush=None, base="full", prefill=False, past_end=False, fvd="", limits=None, like_raw=False,
                 step=STEP, room=None, used=False, no_zeroing=False):
        self.name, self.flush, self.base = name, flush, base
        self.prefill, self.past_end, self.fvd = prefill, past_end, fvd
        self.limits, self.like_raw = limits or {}, like_raw
        self.step, self.room, self.used, self.no_zeroing = step, room, used, no_zeroing


CASES = [
    Case("first write over a base, flush each", 1,
         limits={"writes": 2, "KiB written": 8.5, "KiB read": 0, "syncs": 2}),
    Case("first write over a base, no flush",
         limits={"writes": 1.02, "KiB written": 4.2, "KiB read": 0}),
    Case("first write over a base, flush each 32", 32),
    Case("overwrite of a present block, flush each", 1, prefill=True, like_raw=True),
    Case("write past the base's end, flush each", 1, past_end=True, like_raw=True),
    Case("write to a known-zero block, flush each", 1, base="holes", fvd="detect_sparse_hole=on", like_raw=True),
]

FORMATS = [("fvd", "fvd", "block_size=4k"), ("raw", "raw", ""), ("qcow2",) + QCOW2, ("qcow2 ext. L2",) + EXTENDED]


def measure(place, case, ops, label, form, options):
    """Counts of one case in one format."""
    size = (case.room or ops) * case.step
    image, base = place.path("count.img"), None
    if case.base and form != "raw":
        base = place.path(f"base-{case.base}-{size}")
        if not os.path.exists(base):
            if case.base == "full":
                filled(base, size)
            else:
                with open(base, "wb") as file:
                    file.truncate(size)
    if form == "fvd" and case.fvd:
        options += "," + case.fvd
    create(form, image, size * (2 if case.past_end else 1), base, options)
    target = [image, "-f", form]
    if case.no_zeroing:
        rule = "file.inject-error.0"
        target = ["--image-opts", f"driver={form},file.driver=blkdebug,file.image.driver=file,file.image.filename={image},"
                  f"{rule}.event=none,{rule}.iotype=write-zeroes,{rule}.errno={errno.ENOTSUP}"]
    bench = [tool("qemu-img"), "bench", *target, "-q", "-w", "-t", place.cache, "-i", "threads",
             "-d", 1, "-c", ops, "-s", 4096, "-S", case.step]
    if case.past_end:
        bench += ["-o", size]
    if case.prefill:
        run(*bench)
    if case.used:
        discards = [part for at in range(0, size, case.step) for part in ("-c", f"discard -q {at} {case.step // 2}")]
        # By the same path: what the storage can do decides how an image is laid out.
        opened = target[:2] if case.no_zeroing else ["-f", form, image]
        run(tool("qemu-io"), "-d", "unmap", "-c", f"write -q -P 1 0 {size}", *discards, *opened)
    if case.flush:
        bench += [f"--flush-interval={case.flush}"]
    places = regions(image) if form == "fvd" else None
    out = count(traced(place.path("trace"), *bench), image, base, places)
    data = out.by_kind.get("data" if places else "any", 0)
    if data < ops:
        raise AssertionError(f"{case.name}, {label}: {data} data writes seen for {ops} requests")
    os.unlink(image)
    return out


def empty_flushes(place, form, options, flushes, write):
    """Host operations of a session with so many flushes of nothing."""
    image, base = place.path("count.img"), None
    if form != "raw":
        base = place.path("base-flush")
        if not os.path.exists(base):
            filled(base, MIB)
    create(form, image, MIB, base, options)
    commands = ["-c", "write -q 0 4k", "-c", "flush"] if write else []
    calls = traced(place.path("trace"), tool("qemu-io"), "-f", form, "-t", place.cache, "-i", "threads",
                   *commands, *(["-c", "flush"] * flushes), image)
    os.unlink(image)
    real = {os.path.realpath(image), base and os.path.realpath(base)}
    calls = [call for call in calls if call.path in real]
    if write and not any(call.name.startswith("pwrite") for call in calls):
        raise AssertionError(f"{form}: the write before the empty flushes was not seen")
    return len(calls)


def measure_all(place, ops):
    """{case name: {format label: Counts}}"""
    return {case.name: {label: measure(place, case, ops, label, form, options) for label, form, options in FORMATS}
            for case in CASES}


def verdicts(case, fvd, raw, ops):
    """(what, value, limit, right) for each figure of a case."""
    ours, theirs = fvd.per(ops), raw.per(ops)
    out = [(what, ours[what], limit, ours[what] <= limit) for what, limit in case.limits.items()]
    if case.like_raw:
        # Exactly one write and one sync an operation, raw's and ours.
        for what, limit in (("writes", 1), ("syncs", 1), ("KiB written", 4), ("KiB read", 0)):
            out.append((what, ours[what], limit, ours[what] <= max(limit, theirs[what])))
    return out


def empty_verdicts(place):
    """(name, host operations that 100 empty flushes add, right) in fvd, and raw's number."""
    out = []
    for write, name in ((False, "after opening"), (True, "after a write and a flush")):
        extra = {}
        for label, form, options in FORMATS:
            extra[label] = (empty_flushes(place, form, options, 101, write)
                            - empty_flushes(place, form, options, 1, write))
        out.append((name, extra, extra["fvd"] <= extra["raw"]))
    return out


def report(place, quick, out):
    ops = 256 if quick else 1000
    out.section(f"Host operations per guest operation ({ops} requests of 4 KiB in 128 KiB each, strace, aio=threads, depth 1)")
    results = measure_all(place, ops)
    rows, apart = [], []
    for case in CASES:
        for label, counts in results[case.name].items():
            per = counts.per(ops)
            rows.append([f"{case.name}: {label}"] + [f"{value:.3f}" for value in per.values()])
            if label == "fvd":
                parts = [f"{what}: {n} calls, {size / 1024:.0f} KiB, {syncs} syncs"
                         for what, (n, size, syncs) in sorted(counts.apart.items())]
                apart.append(f"{case.name}: " + "; ".join(parts))
        checks = verdicts(case, results[case.name]["fvd"], results[case.name]["raw"], ops)
        for what, value, limit, right in checks:
            out.figure(f"{case.name}: {what}", f"{value:.3f}", f"<= {limit:g}", "reached" if right else "NOT REACHED")
    out.table(["", "writes", "KiB written", "reads", "KiB read", "syncs"], rows,
              "raw has no base: the same requests to a fresh sparse file")
    out.say("  Of fvd, counted apart, in the whole session:")
    for line in apart:
        out.say("    " + line)
    for name, extra, right in empty_verdicts(place):
        out.say(f"  100 empty flushes {name} add host operations: " + ", ".join(f"{k} {v}" for k, v in extra.items()))
        out.figure(f"empty flush {name}: host operations of 100", str(extra["fvd"]), f"<= raw's {extra['raw']}",
                   "reached" if right else "NOT REACHED")
