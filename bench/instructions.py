# SPDX-License-Identifier: MIT OR Apache-2.0
"""Instructions of the engine for a pass-through request, by callgrind, and its heap allocations."""

import json
import os
import re

from common import GIB, KIB, MIB, create, filled, run, tool

LIMIT = 300


def callgrind(place, program, *args, count):
    """Instructions a call of fvd_lookup and fvd_end, all that they call included."""
    out = place.path("callgrind.out")
    run("valgrind", "--tool=callgrind", "--toggle-collect=fvd_lookup", "--toggle-collect=fvd_end",
        f"--callgrind-out-file={out}", program, *args)
    with open(out, encoding="utf-8") as file:
        total = int(re.search(r"^(?:summary|totals): (\d+)", file.read(), re.M).group(1))
    os.unlink(out)
    if total < count * 10:
        raise AssertionError(f"callgrind counted {total} instructions for {count} lookups: nothing was collected")
    return total / count


def report(place, programs, quick, out):
    count = 2000 if quick else 20000
    out.section(f"Engine cost of a pass-through request (callgrind, fvd_lookup + fvd_end, {count} calls each)")
    # Seventeen pages of bitmap; detect_sparse_hole sets all bits without a byte of data.
    size = 2 * GIB
    base, image, fresh = place.path("instr-base"), place.path("instr.fvd"), place.path("fresh.fvd")
    with open(base, "wb") as file:
        file.truncate(size)
    create("fvd", image, 2 * size, base, "block_size=4k,detect_sparse_hole=on")
    create("fvd", fresh, 2 * size, base, "block_size=4k")
    # label, image, offset, length, direction, answer; aligned, so that no request crosses SPAN
    cases = [
        ("4 KiB read of present blocks", image, 0, 4 * KIB, "read", "data"),
        ("4 KiB write of present blocks", image, 0, 4 * KIB, "write", "data"),
        ("64 KiB read of present blocks (16 bits)", image, 0, 64 * KIB, "read", "data"),
        ("1 MiB read of present blocks (256 bits)", image, 0, MIB, "read", "data"),
        ("4 KiB read past the base's end", image, size, 4 * KIB, "read", "data"),
        ("4 KiB write past the base's end", image, size, 4 * KIB, "write", "data"),
        ("4 KiB read of the base (answer: ask)", fresh, 0, 4 * KIB, "read", "ask"),
    ]
    rows = []
    for label, path, offset, length, direction, answer in cases:
        # An odd multiple of the length: pseudo-random over all of the span.
        args = [path, count, offset, size, length, length * 809, direction, answer]
        got = json.loads(run(programs["lookup"], *args))
        if got["allocations_at_open"] == 0:
            raise AssertionError("the library's allocations are not seen by the counter")
        cost = callgrind(place, programs["lookup"], *args, count=count)
        rows.append([label, f"{cost:.1f}", str(got["allocations"])])
        if answer == "data":
            out.at_most(f"instructions, {label}", cost, LIMIT)
            out.at_most(f"heap allocations, {label}", got["allocations"], 0)
    out.table(["", "instructions", f"allocations in {count}"], rows)
    for path in (base, image, fresh):
        os.unlink(path)
    whole(place, quick, out)


def whole(place, quick, out):
    """User-space instructions a request of the whole qemu-img: what the ratios show without noise.

    The difference of a long and a short run; aio=threads, as valgrind has no io_uring. The
    threads' timing moves it by a per cent or so.
    """
    size = 128 * MIB
    images = {form: place.path(f"instr.{form}") for form in ("fvd", "raw", "qcow2")}
    base = place.path("instr-base")
    filled(base, size)
    create("fvd", images["fvd"], size, base, "block_size=4k")
    create("raw", images["raw"], size)
    create("qcow2", images["qcow2"], size)
    for form, path in images.items():
        run(tool("qemu-io"), "-f", form, "-c", f"write -q 0 {size}", path)
    few, many = (1000, 3000) if quick else (2000, 8000)

    def collected(form, path, write, requests):
        result = place.path("callgrind.out")
        run("valgrind", "--tool=callgrind", f"--callgrind-out-file={result}", tool("qemu-img"), "bench", *(["-w"] if write else []),
            "-f", form, "-t", place.cache, "-i", "threads", "-d", 32, "-c", requests, "-s", 4096, "-S", 49999 * 4096, path)
        with open(result, encoding="utf-8") as file:
            total = int(re.search(r"^(?:summary|totals): (\d+)", file.read(), re.M).group(1))
        os.unlink(result)
        return total

    rows = []
    for write in (False, True):
        row = ["4 KiB write, depth 32" if write else "4 KiB read, depth 32"]
        for form, path in images.items():
            row.append(f"{(collected(form, path, write, many) - collected(form, path, write, few)) / (many - few):.0f}")
        row.append(f"{int(row[2]) / int(row[1]):.3f}")
        rows.append(row)
    out.say("  User-space instructions a request of the whole qemu-img bench, aio=threads (the kernel's part is not in it):")
    out.table(["", "fvd", "raw", "qcow2", "raw / fvd"], rows)
    for path in (base, *images.values()):
        os.unlink(path)
