#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Asserts the host operations per guest operation, and the counted figures of compact images;
`make bench` shows them beside raw and qcow2.

    bench/test-counts.py        against build/bin
"""

import sys

sys.dont_write_bytecode = True

import compact
import counts
from common import GIB, MIB, Failed, Place

OPS = 256


def main():
    place = Place(GIB // 2)
    passed = failed = 0

    def check(right, text):
        nonlocal passed, failed
        passed += right
        failed += not right
        if not right:
            print(f"FAILED  {text}")

    formats = [entry for entry in counts.FORMATS if entry[0] in ("fvd", "raw")]
    counts.FORMATS[:] = formats
    for case in counts.CASES:
        try:
            got = {label: counts.measure(place, case, OPS, label, form, options) for label, form, options in formats}
        except (AssertionError, Failed) as error:
            check(False, f"{case.name}: {error}")
            continue
        for what, value, limit, right in counts.verdicts(case, got["fvd"], got["raw"], OPS):
            check(right, f"{case.name}: {what} per operation is {value:.3f}, at most {limit:g}")
        # The header changes when the session begins and when it ends, two copies each; a longer
        # list means that something of each operation hides in what is counted apart.
        updates = got["fvd"].apart.get("header", (0, 0, 0))
        check(updates[0] <= 4, f"{case.name}: {updates[0]} header writes in a session, at most 4")
        checkpoint = got["fvd"].apart.get("checkpoint", (0, 0, 0))
        check(checkpoint[0] <= 4 and checkpoint[2] <= 3,
              f"{case.name}: one small checkpoint at close takes {checkpoint[0]} writes, {checkpoint[2]} syncs")
        check(not set(got["fvd"].by_kind) - {"header", "journal", "data", "pages", "double write"},
              f"{case.name}: writes to {got['fvd'].by_kind}")
    for name, extra, right in counts.empty_verdicts(place):
        check(right, f"100 empty flushes {name}: {extra['fvd']} host operations, raw {extra['raw']}")

    for part in (lambda: compact.allocating(place, ()), lambda: compact.locality(place, 8 * MIB), lambda: compact.sizes(place, ()),
                 lambda: compact.cycles(place, 20, (compact.SMALL,), ())):
        try:
            for name, value, limit, unit in part()[0]:
                check(value <= limit, f"{name} is {value:.4g}{unit}, at most {limit:g}{unit}")
        except (AssertionError, Failed) as error:
            check(False, f"compact: {error}")

    # The counting itself must be able to fail: qcow2 is far beyond the limits, and a write of
    # half a block reads the base.
    case = counts.CASES[0]
    rival = counts.measure(place, case, OPS, "qcow2", "qcow2", "")
    wrong = [what for what, _, _, right in counts.verdicts(case, rival, rival, OPS) if not right]
    check({"writes", "KiB written", "KiB read"} <= set(wrong), f"qcow2 would pass: only {wrong} are beyond the limits")
    rival = compact.second_half(place, compact.FRESH, "qcow2", "")[0]
    wrong = [what for what, _, _, right in counts.verdicts(compact.FRESH, rival, rival, compact.OPS) if not right]
    check({"writes", "KiB written", "syncs"} <= set(wrong), f"qcow2 would pass as compact: only {wrong} are beyond the limits")
    distance, extents = compact.filled_at(place, "fvd", f"{compact.COMPACT},chunk_size=64k", list(range(0, 2 * MIB, compact.PIECE))[::-1])
    check(distance > 64 and extents > 1, f"filled backwards: distance {distance} KiB, {extents} extents, as if in order")
    stored = compact.tebibyte(place, "qcow2", "preallocation=metadata,cluster_size=2M")[1]
    check(stored > 8 * MIB, f"qcow2's tables of 1 TiB were not seen: {stored} bytes")
    check(partial(place) > 0, "first write of half a block: the read from the base was not counted")

    print(f"{passed} passed, {failed} failed")
    return failed != 0


def partial(place):
    """Bytes read from the base by a first write of half a block, as this test counts them."""
    base, image = place.path("base-partial"), place.path("partial.fvd")
    counts.filled(base, 1 << 20)
    counts.create("fvd", image, base=base, options="block_size=4k")
    calls = counts.traced(place.path("trace"), counts.tool("qemu-io"), "-f", "fvd", "-t", place.cache, "-i", "threads",
                          "-c", "write -q 0 4k", "-c", "write -q 65536 2k", image)
    return counts.count(calls, image, base, counts.regions(image)).read


if __name__ == "__main__":
    sys.exit(main())
