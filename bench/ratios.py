# SPDX-License-Identifier: MIT OR Apache-2.0
"""Throughput of 4 KiB pass-through requests, fvd to raw and qcow2, in interleaved rounds A/B/B/A.

Preallocated: fvd over a base with every block written, raw preallocation=full, qcow2 with every
cluster written. Sparse: fvd without base and a sparse raw file, both made anew for each run, so
that both pay the host for its space. Requests stride pseudo-randomly and meet each block once.
"""

import os
import re
import resource
import statistics
import subprocess

from common import EXTENDED, MIB, QCOW2, Failed, create, filled, interval, judge_ratio, load, run, tool

FIGURE = 0.95
# Odd number of blocks: every block of a power of two is met.
STRIDE = 49999 * 4096


def timed(args):
    """Seconds of the requests as qemu-img says, CPU seconds of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if done.returncode != 0 or not found:
        raise Failed(f"{' '.join(map(str, args))}\n{done.stdout}{done.stderr}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return float(found.group(1)), cpu


class Side:
    """One format: its image, and whether it is made anew for each run."""

    def __init__(self, place, label, form, make, fresh):
        self.place, self.label, self.form, self.make, self.fresh = place, label, form, make, fresh
        self.image = place.path("ratio-" + re.sub(r"\W+", "-", label))
        if not fresh:
            make(self.image)

    def run(self, write, depth, requests, flush=None, stride=STRIDE):
        if self.fresh:
            self.make(self.image)
        args = [tool("qemu-img"), "bench", "-f", self.form, "-t", self.place.cache, "-i", "io_uring",
                "-d", depth, "-c", requests, "-s", 4096, "-S", stride]
        args += ["-w"] if write else []
        args += [f"--flush-interval={flush}"] if flush else []
        got = timed(args + [self.image])
        if self.fresh:
            os.unlink(self.image)
        return got


def compare(ours, theirs, rounds, requests, **how):
    """Per round: their time to ours (throughput ratio), their CPU time to ours; all runs' IOPS."""
    idle = {side.label: statistics.median(side.run(requests=1, **dict(how, depth=1))[1] for _ in range(5)) for side in (ours, theirs)}
    time_ratios, cpu_ratios, iops = [], [], {ours.label: [], theirs.label: []}
    cpu_us = {ours.label: [], theirs.label: []}
    for _ in range(rounds):
        seconds, cpu = {ours.label: 0.0, theirs.label: 0.0}, {ours.label: 0.0, theirs.label: 0.0}
        for side in (ours, theirs, theirs, ours):
            took, burnt = side.run(requests=requests, **how)
            burnt = max(burnt - idle[side.label], 1e-6)
            seconds[side.label] += took
            cpu[side.label] += burnt
            iops[side.label].append(requests / took)
            cpu_us[side.label].append(burnt * 1e6 / requests)
        time_ratios.append(seconds[theirs.label] / seconds[ours.label])
        cpu_ratios.append(cpu[theirs.label] / cpu[ours.label])
    return time_ratios, cpu_ratios, iops, cpu_us


def sides(place, size):
    base = place.path("ratio-base")
    filled(base, size)

    def written(form, backing, options):
        def make(path):
            create(form, path, size, backing, options)
            run(tool("qemu-io"), "-f", form, "-c", f"write -q -P 90 0 {size}", path)
        return make

    def plain(form, options="", backing=None):
        return lambda path: create(form, path, size, backing, options)

    full = Side(place, "fvd", "fvd", written("fvd", base, "block_size=4k"), False)
    steady = [
        Side(place, "raw preallocated", "raw", plain("raw", "preallocation=full"), False),
        Side(place, "qcow2", QCOW2[0], written(QCOW2[0], None, QCOW2[1]), False),
        Side(place, "qcow2 ext. L2", EXTENDED[0], written(EXTENDED[0], None, EXTENDED[1]), False),
    ]
    sparse = (Side(place, "fvd sparse", "fvd", plain("fvd"), True), Side(place, "raw sparse", "raw", plain("raw"), True))
    cow = Side(place, "fvd over base", "fvd", plain("fvd", "block_size=4k", base), True)
    rivals = [
        Side(place, "qcow2 over base", QCOW2[0], plain(QCOW2[0], QCOW2[1], base), True),
        Side(place, "qcow2 ext. L2 over base", EXTENDED[0], plain(EXTENDED[0], EXTENDED[1], base), True),
    ]
    return full, steady, sparse, cow, rivals


def report(place, quick, rounds, out):
    size = (128 if quick else 256) * MIB
    blocks = size // 4096
    out.section(f"4 KiB pseudo-random requests, aio=io_uring, {place.describe()}: fvd's throughput to a rival's")
    full, steady, sparse, cow, rivals = sides(place, size)
    rows = []

    def cell(name, ours, theirs, requests, judged, **how):
        # A rival that is only shown needs no narrow interval.
        n = rounds if judged else min(rounds, 15)
        times, cpus, iops, cpu_us = compare(ours, theirs, n, min(requests, blocks), **how)
        median, low, high, verdict = judge_ratio(times, FIGURE)
        if not judged or place.kind == "disk":
            verdict = "shown"
        cpu, cpu_low, cpu_high = interval(cpus)
        spread = max(max(v) / min(v) for v in iops.values())
        mid = [interval(iops[s.label])[0] for s in (ours, theirs)]
        us = [interval(cpu_us[s.label])[0] for s in (ours, theirs)]
        rows.append([f"{name}: {theirs.label}", f"{mid[0]:.0f}", f"{mid[1]:.0f}", f"{median:.3f}", f"{low:.3f}..{high:.3f}",
                     f"{us[0]:.1f}", f"{us[1]:.1f}", f"{cpu:.3f}", f"{cpu_low:.3f}..{cpu_high:.3f}", f"{spread:.2f}", f"{load():.1f}"])
        print(f"  {name}: {theirs.label}: {median:.3f} [{low:.3f}, {high:.3f}], CPU {cpu:.3f}", flush=True)
        if judged:
            out.figure(f"pass-through, {name}, to {theirs.label}", f"{median:.3f} [{low:.3f}, {high:.3f}]", f">= {FIGURE}", verdict,
                       f"CPU time {cpu:.3f} [{cpu_low:.3f}, {cpu_high:.3f}]")

    for write, depth in ((False, 1), (True, 1), (False, 32), (True, 32)):
        name = f"{'write' if write else 'read'}, depth {depth}"
        requests = 10000 if depth == 1 else 40000
        for theirs in steady:
            cell(name, full, theirs, requests, theirs.form == "raw", write=write, depth=depth)
        cell(name, *sparse, requests, True, write=write, depth=depth)
    for theirs in rivals:
        cell("first write, depth 32", cow, theirs, 16000, False, write=True, depth=32)
        cell("first write + flush, depth 1", cow, theirs, 3000, False, write=True, depth=1, flush=1)
    out.table(["", "fvd IOPS", "rival IOPS", "ratio", "95 %", "fvd CPU us", "rival CPU us", "CPU ratio", "95 %", "max/min", "load"], rows,
              f"{rounds} rounds A/B/B/A, {min(rounds, 15)} to qcow2; ratios above 1: fvd is ahead; max/min: spread of one side's runs (the larger);\n"
              "  load: of the machine, these runs take 1 to 2 of it")
