# SPDX-License-Identifier: MIT OR Apache-2.0
"""Opening 1 TiB images, inside one process, and what their metadata takes."""

import json
import os
import re
import statistics
import time

from common import EXTENDED, GIB, MIB, QCOW2, TIB, Failed, create, run, tool

OPENS = 100


def through_qemu(form, image):
    """Milliseconds an open and close takes: one process with 101 less one process with 1."""

    def seconds(opens):
        args = [tool("qemu-io")]
        for _ in range(opens):
            args += ["-c", f"open -n -o driver={form} {image}", "-c", "close"]
        args += ["-c", f"open -n -o driver={form} {image}", "-c", "length"]
        start = time.monotonic()
        got = run(*args)
        took = time.monotonic() - start
        # qemu-io goes on after a command that failed.
        if got.strip() != "1 TiB":
            raise Failed(f"opening {image}: {got}")
        return took

    seconds(1)
    return (statistics.median(seconds(OPENS + 1) for _ in range(5)) - statistics.median(seconds(1) for _ in range(5))) * 1000 / OPENS


def report(place, programs, out):
    out.section(f"Opening a 1 TiB image ({OPENS} opens in one process, warm)")
    base = place.path("tib-base")
    with open(base, "wb") as file:
        file.truncate(TIB)
    images = {
        "fvd over a 1 TiB base": ("fvd", base, ""),
        "fvd over it, each bitmap page in use": ("fvd", base, ""),
        "fvd without base": ("fvd", None, ""),
        "raw": ("raw", None, ""),
        "qcow2": QCOW2[:1] + (None, QCOW2[1]),
        "qcow2 over a 1 TiB base": QCOW2[:1] + (base, QCOW2[1]),
        "qcow2 ext. L2": EXTENDED[:1] + (None, EXTENDED[1]),
    }
    rows = []
    for label, (form, backing, options) in images.items():
        image = place.path("tib.img")
        create(form, image, TIB, backing, options)
        if "in use" in label:
            # A page of the bitmap speaks of 1.98 GiB at 64 KiB blocks.
            writes = [part for at in range(0, TIB, GIB) for part in ("-c", f"write -q {at} 4k")]
            run(tool("qemu-io"), "-f", form, *writes, image)
        row = [label]
        if form == "fvd":
            got = json.loads(run(programs["open"], image, OPENS, "base" if backing else "nobase", "rw"))
            ms = got["ms"]
            row += [f"{statistics.median(ms):.2f}", f"{sorted(ms)[len(ms) * 95 // 100]:.2f}", f"{max(ms):.2f}"]
            out.at_most(f"open, {label}: median of {OPENS}, C API", statistics.median(ms), 5, " ms")
        else:
            row += ["-", "-", "-"]
        qemu = through_qemu(form, image)
        row.append(f"{qemu:.2f}")
        if form == "fvd":
            out.at_most(f"open and close, {label}: mean, QEMU", qemu, 5, " ms")
        size = os.stat(image).st_blocks * 512
        bitmap = "-"
        if form == "fvd":
            found = re.search(r"^ *region Bitmap: offset \d+, length (\d+)", run(tool("fvd"), "dump", image), re.M)
            bytes_ = int(found.group(1)) if found else 0
            bitmap = f"{bytes_ / MIB:.3f}"
            if label == "fvd over a 1 TiB base":
                out.at_most("bitmap for a 1 TiB base", bytes_ / MIB, 2.1, " MiB")
        row += [bitmap, f"{size / MIB:.2f}"]
        rows.append(row)
        os.unlink(image)
    out.table(["", "C API median ms", "95 %", "max", "QEMU open+close ms", "bitmap MiB", "disk MiB"], rows,
              "disk MiB of fvd: with the journal (16 MiB), written at creation; opened for writing, past the page cache")
