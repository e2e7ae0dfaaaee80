# SPDX-License-Identifier: MIT OR Apache-2.0
"""A 1 MiB journal that wraps many times beside one of 256 MiB: waits and throughput."""

import json
import os

from common import MIB, interval, judge_ratio, run

FIGURE = 0.97
WRAPS = 50
# label, writes, depth, flush after each so many writes
LOADS = [
    ("depth 1, flush after each write", 14000, 1, 1),
    ("depth 16, flush after each write", 115000, 16, 1),
]


def report(place, programs, quick, rounds, out):
    out.section("A 1 MiB journal that wraps (first writes of 4 KiB over a base, a read for each 4 writes, C API)")
    base, image = place.path("journal-base"), place.path("journal.fvd")
    rows = []
    for label, writes, depth, every in LOADS:
        size = 1 << (writes * 4096 - 1).bit_length()
        with open(base, "wb") as file:
            file.truncate(size)

        def once(mib, writes=writes, depth=depth, every=every):
            got = json.loads(run(programs["journal"], image, base, mib, writes, depth, every))
            os.unlink(image)
            return got

        once(1)
        small, large = [], []
        for _ in range(rounds):
            a1, b1, b2, a2 = once(1), once(256), once(256), once(1)
            small.append((a1, a2))
            large.append((b1, b2))
        every_small = [run_ for pair in small for run_ in pair]
        every_large = [run_ for pair in large for run_ in pair]

        def ratios(key):
            return [(b[0][key] + b[1][key]) / (a[0][key] + a[1][key]) for a, b in zip(small, large)]

        for name, runs in (("1 MiB", every_small), ("256 MiB", every_large)):
            middle, low, high = interval([writes / r["seconds"] for r in runs])
            rows.append([
                f"{label}: {name}", f"{middle:.0f}", f"{low:.0f}..{high:.0f}", f"{max(writes / r['seconds'] for r in runs):.0f}",
                f"{min(r['journal_bytes'] / r['journal_size'] for r in runs):.1f}",
                f"{max(r['checkpoints'] for r in runs)}",
                f"{max(r['write_waits'] for r in runs)}", f"{max(r['flush_waits'] for r in runs)}",
                f"{interval([r['slowest_read_ms'] for r in runs])[0]:.2f}",
                f"{interval([r['slowest_write_ms'] for r in runs])[0]:.2f}",
            ])
        wraps = min(r["journal_bytes"] / r["journal_size"] for r in every_small)
        waits = max(r["write_waits"] for r in every_small)
        flush_waits = max(r["flush_waits"] for r in every_small)
        out.figure(f"1 MiB journal, {label}: wraps", f"{wraps:.1f}", f">= {WRAPS}", "reached" if wraps >= WRAPS else "NOT REACHED")
        out.at_most(f"1 MiB journal, {label}: writes that waited", waits, 0)
        out.figure(f"1 MiB journal, {label}: flushes that waited for a checkpoint", str(flush_waits), "no limit", "shown")
        median, low, high, verdict = judge_ratio(ratios("seconds"), FIGURE)
        verdict = "shown" if place.kind == "disk" else verdict
        out.figure(f"1 MiB journal, {label}: throughput to 256 MiB", f"{median:.3f} [{low:.3f}, {high:.3f}]", f">= {FIGURE}", verdict)
        cpu, low, high, _ = judge_ratio(ratios("cpu"), FIGURE)
        out.figure(f"1 MiB journal, {label}: CPU time of 256 MiB to it", f"{cpu:.3f} [{low:.3f}, {high:.3f}]", "no limit", "shown")
    out.table(["", "writes/s", "95 %", "best", "wraps", "checkpoints", "write waits", "flush waits", "slowest read ms", "slowest write ms"], rows,
              f"{rounds} rounds A/B/B/A, fresh images; waits: the largest of any run; slowest: the median of the runs' slowest.\n"
              "  The engine has no wait for a checkpoint in its read path, and so no counter of it: the slowest read stands for it")
    os.unlink(base)
