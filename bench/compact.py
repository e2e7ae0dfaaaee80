# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compact images beside qcow2, counted: allocating writes, locality, metadata, use again after discard.

Nothing here is a time. Each part gives figures (name, value, limit, unit), reached where the value
is not above the limit, and rows of the formats side by side. `make bench` shows both in the section
counts; bench/test-counts.py asserts the figures.
"""

import json
import os
import random
import re

import counts
from common import EXTENDED, KIB, LARGE, LAZY, MIB, QCOW2, TIB, create, run, tool

COMPACT = "compact_image=on"
RIVALS = [("qcow2",) + QCOW2, ("qcow2 lazy refcounts",) + LAZY, ("qcow2 ext. L2",) + EXTENDED, ("qcow2 2M clusters",) + LARGE]


def io(form, image, commands):
    run(tool("qemu-io"), "-f", form, "-d", "unmap", *(part for text in commands for part in ("-c", text)), image)


# --- what an allocating write and its flush cost ------------------------------

# Each request meets a chunk or cluster of its own, in every format. What is judged is what the
# second half of a session costs: requests and nothing else. Such a disk has one growth step, in
# the first half; what a step costs is counted by itself, on a disk with many.
OPS = 16
STEP = 4 * MIB
ONE_STEP = f"{COMPACT},storage_grow_unit={2 * OPS * STEP}"
CHUNK, UNIT = 64 * KIB, 512 * KIB
MANY_STEPS = f"{COMPACT},chunk_size={CHUNK},storage_grow_unit={UNIT}"


def case(name, syncs, **how):
    return counts.Case(f"allocating write, {name}, flush each", 1, step=STEP, room=2 * OPS,
                       limits={"writes": 2, "KiB written": 8.5, "KiB read": 0, "syncs": syncs}, **how)


FRESH = case("fresh space", 1, base=None)
CASES = [FRESH, case("over base data", 2), case("space used before", 2, base=None, used=True),
         case("space used before, storage that cannot zero", 2, base=None, used=True, no_zeroing=True)]


def calls(got, kind):
    """Host calls of a kind that are counted apart."""
    return sum(parts[0] for what, parts in got.apart.items() if what.startswith(kind))


def second_half(place, what, form, options):
    """Counts of OPS requests of a session that had as many before, and of the whole session."""
    half, whole = (counts.measure(place, what, ops, what.name, form, options) for ops in (OPS, 2 * OPS))
    return whole - half, whole


def allocating(place, rivals=RIVALS, cases=CASES):
    figures, rows = [], []
    for what in cases:
        for label, form, options in [("fvd compact", "fvd", ONE_STEP)] + list(rivals):
            got, whole = second_half(place, what, form, options)
            rows.append([f"{what.name}: {label}"] + [f"{value:.3f}" for value in got.per(OPS).values()]
                        + [f"{calls(got, 'growth') / OPS:.3f}"])
            if form != "fvd":
                continue
            figures += [(f"compact, {what.name}: {name}", value, limit, "")
                        for name, value, limit, _ in counts.verdicts(what, got, got, OPS)]
            # Nothing of a request hides in what is counted apart.
            figures += [(f"compact, {what.name}: header writes of a request", calls(got, "header") / OPS, 0, ""),
                        (f"compact, {what.name}: header writes of a session", calls(whole, "header"), 6, ""),
                        (f"compact, {what.name}: checkpoint writes of a session", calls(whole, "checkpoint"), 5, "")]
    few, many = (counts.measure(place, FRESH, 2 * OPS, "growth", "fvd", options) for options in (ONE_STEP, MANY_STEPS))
    more = many - few
    steps = calls(more, "growth (ftruncate)")
    if steps < 2:
        raise AssertionError(f"{2 * OPS} chunks in steps of {UNIT // CHUNK}: {steps} steps more than one")
    figures += [("compact, a growth step: syncs", more.syncs / steps, 2, ""), ("compact, a growth step: writes", more.writes / steps, 1, ""),
                (f"compact, growth steps of {2 * OPS} chunks, {UNIT // CHUNK} a step, one ahead", steps + 1, 2 * OPS * CHUNK // UNIT + 1, "")]
    return figures, rows


# --- locality -----------------------------------------------------------------

PIECE = 64 * KIB
# Each beside qcow2 with the same unit, and both with their defaults.
UNITS = [("64 KiB units", f"{COMPACT},chunk_size=64k", QCOW2), ("128 KiB units", f"{COMPACT},chunk_size=128k", EXTENDED),
         ("2 MiB units", f"{COMPACT},chunk_size=2M", LARGE), ("defaults", COMPACT, QCOW2)]


def filled_at(place, form, options, order):
    """Mean KiB from the end of a guest's piece to the next one, in the file, and the map's extents."""
    image = place.path("locality.img")
    create(form, image, len(order) * PIECE, options=options)
    io(form, image, [f"write -q {at} {PIECE}" for at in order])
    extents = json.loads(run(tool("qemu-img"), "map", "--output=json", "-f", form, image))
    os.unlink(image)
    offsets = [extent["offset"] + at for extent in extents if extent["data"] for at in range(0, extent["length"], PIECE)]
    if len(offsets) != len(order):
        raise AssertionError(f"{form} {options}: {len(offsets)} pieces of {len(order)} are mapped")
    jumps = [abs(after - before - PIECE) for before, after in zip(offsets, offsets[1:])]
    return sum(jumps) / len(jumps) / KIB, len(extents)


def locality(place, size):
    figures, rows = [], []
    order = list(range(0, size, PIECE))
    distance, extents = filled_at(place, "fvd", f"{COMPACT},chunk_size=64k", order)
    figures += [("compact, filled in order: distance in the file", distance, 0, " KiB"), ("compact, filled in order: extents", extents, 1, "")]
    random.Random(1).shuffle(order)
    for unit, options, rival in UNITS:
        ours, theirs = filled_at(place, "fvd", options, order), filled_at(place, *rival, order)
        name = f"compact, filled at random, {unit}"
        figures += [(f"{name}: distance in the file (limit: qcow2's)", ours[0], theirs[0], " KiB"),
                    (f"{name}: extents (limit: qcow2's)", ours[1], theirs[1], "")]
        rows.append([f"{unit}, qcow2 {rival[1] or 'as it comes'}", f"{ours[0]:.0f}", f"{theirs[0]:.0f}", str(ours[1]), str(theirs[1])])
    return figures, rows


# --- a disk of 1 TiB ------------------------------------------------------------


def tebibyte(place, form, options, base=None):
    """Bytes of the file, bytes stored, {region: bytes} of fvd."""
    image = place.path("tebibyte.img")
    create(form, image, TIB, base, options)
    stat = os.stat(image)
    text = run(tool("fvd"), "dump", image) if form == "fvd" else ""
    os.unlink(image)
    return stat.st_size, stat.st_blocks * 512, {
        name: int(length) for name, length in re.findall(r"^ *region (\w+): offset \d+, length (\d+)", text, re.M)}


def sizes(place, rivals=RIVALS):
    figures, rows = [], []
    below = place.path("tebibyte.base")
    with open(below, "wb") as file:
        file.truncate(TIB)

    def row(label, *values):
        rows.append([label] + ["-" if value is None else f"{value / MIB:.2f}" for value in values])

    for name, base in (("compact", None), ("compact over a base", below)):
        size, stored, parts = tebibyte(place, "fvd", COMPACT, base)
        journal = parts["Journal"]
        tables = sum(parts.get(part, 0) for part in ("Table", "Bitmap", "PageMap"))
        figures += [(f"{name}, new image of 1 TiB: file beside the journal", (size - journal) / MIB, 8, " MiB"),
                    (f"{name}, new image of 1 TiB: stored beside the journal", (stored - journal) / MIB, 8, " MiB"),
                    (f"{name}, 1 TiB: table, bitmap and page map", tables / MIB, 6.2, " MiB")]
        row(f"fvd {name}, new", size - journal, stored - journal, tables)
    # preallocation=metadata: each chunk and cluster has its place, and is a hole there.
    full = "preallocation=metadata"

    def mapped(options):
        _, stored, parts = tebibyte(place, "fvd", f"{COMPACT},{full}{options}")
        return stored - parts["Journal"]

    ours = mapped("")
    row("fvd compact, fully mapped", None, ours, None)
    if rivals:
        row("fvd compact 64k chunks, fully mapped", None, mapped(",chunk_size=64k"), None)
    for label, form, options in rivals:
        row(f"{label}, new", *tebibyte(place, form, options)[:2], None)
        theirs = tebibyte(place, form, ",".join(filter(None, (options, full))))[1]
        row(f"{label}, fully mapped", None, theirs, None)
        figures.append((f"compact, fully mapped 1 TiB: stored beside the journal (limit: that of {label})", ours / MIB, theirs / MIB, " MiB"))
    return figures, rows


# --- filled and discarded, again and again ----------------------------------------

DISK, TURNS = 64 * MIB, 10
SMALL = (f"{COMPACT},chunk_size=64k,storage_grow_unit=1M", 64 * KIB + MIB)
DEFAULT = (COMPACT, MIB + 64 * MIB)


def cycled(place, form, options, cycles):
    """Bytes of the file: new, the most after any session of TURNS cycles; bytes stored at the end."""
    image = place.path("cycle.img")
    create(form, image, DISK, options=options)
    new = most = os.stat(image).st_size
    order, rng = list(range(0, DISK, 2 * MIB)), random.Random(1)
    for first in range(0, cycles, TURNS):
        commands = []
        for turn in range(first, min(first + TURNS, cycles)):
            rng.shuffle(order)
            commands += [f"write -q -P {turn % 255 + 1} {at} 2M" for at in order]
            commands += ["flush"] if turn % 3 else []
            commands += [f"read -q -P {turn % 255 + 1} 0 {DISK}"] if turn == first else []
            rng.shuffle(order)
            commands += [f"discard -q 0 {DISK}"] if turn % 2 else [f"discard -q {at} 2M" for at in order]
        io(form, image, commands)
        most = max(most, os.stat(image).st_size)
    stored = os.stat(image).st_blocks * 512
    os.unlink(image)
    if most < new + DISK:
        raise AssertionError(f"{form} {options}: {most} bytes cannot have held {DISK} and what was there before")
    return new, most, stored


def cycles(place, number=100, ours=(SMALL, DEFAULT), rivals=RIVALS[:1]):
    figures, rows = [], []
    for options, chunk_and_step in ours:
        new, most, stored = cycled(place, "fvd", options, number)
        # A new compact image is metadata and nothing else.
        limit = DISK + new + chunk_and_step
        figures.append((f"compact, {number} times filled and discarded, {options}: the file", most / MIB, limit / MIB, " MiB"))
        rows.append([f"fvd {options}"] + [f"{size / MIB:.2f}" for size in (new, most, limit, stored)])
    for label, form, options in rivals:
        new, most, stored = cycled(place, form, options, number)
        rows.append([label] + [f"{new / MIB:.2f}", f"{most / MIB:.2f}", "-", f"{stored / MIB:.2f}"])
    return figures, rows


def report(place, quick, out):
    parts = [
        (f"Compact images: allocating writes of 4 KiB, one in {STEP // MIB} MiB (strace; requests {OPS + 1} to {2 * OPS} of a session)",
         ["", "writes", "KiB written", "reads", "KiB read", "syncs", "fallocate"], allocating(place)),
        ("Compact images: mean distance in the file between pieces of 64 KiB that are neighbours in the guest, after a random fill",
         ["", "fvd KiB", "qcow2 KiB", "fvd extents", "qcow2 extents"], locality(place, (16 if quick else 128) * MIB)),
        ("Compact images: a disk of 1 TiB, MiB; of fvd without its journal",
         ["", "file", "stored", "table, bitmap, page map"], sizes(place)),
        (f"Compact images: a disk of {DISK // MIB} MiB filled and discarded 100 times, MiB",
         ["", "new file", "largest file", "limit", "stored at the end"], cycles(place)),
    ]
    for title, heads, (figures, rows) in parts:
        out.section(title)
        out.table(heads, rows)
        for figure in figures:
            out.at_most(*figure)
