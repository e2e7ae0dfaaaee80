# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the benchmarks share: where they work, how they judge, the report."""

import atexit
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("FVD_BUILD", os.path.join(TOP, "build"))
BIN = os.path.join(BUILD, "bin")
LIB = os.path.join(BUILD, "lib")
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# The rivals, as qemu-img create options.
QCOW2 = ("qcow2", "")
EXTENDED = ("qcow2", "extended_l2=on,cluster_size=128k")
LAZY = ("qcow2", "lazy_refcounts=on")
LARGE = ("qcow2", "cluster_size=2M")


class Failed(Exception):
    """A command that should have worked did not."""


def tool(name):
    return os.path.join(BIN, name)


def run(*args, timeout=600, cwd=None):
    """Output of a command that must succeed."""
    done = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, timeout=timeout, cwd=cwd, check=False)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, args))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def load():
    return os.getloadavg()[0]


# --- where the files are ----------------------------------------------------


def can_direct(folder):
    """Whether O_DIRECT works in a folder (tmpfs: Linux 6.6 or newer)."""
    path = os.path.join(folder, "direct-test")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
        return True
    except OSError:
        return False
    finally:
        if os.path.exists(path):
            os.unlink(path)


class Place:
    """A folder for the images, taken away at the end.

    kind "tmpfs": tmpfs with O_DIRECT. "loop": where tmpfs has none, ext4 on a loop device over a
    file in tmpfs. "disk": neither can be had; time is shown then and not judged. BENCH_FS asks
    for one of them.
    """

    def __init__(self, need):
        self.undo = []
        atexit.register(self.remove)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(130))
        want = os.environ.get("BENCH_FS", "")
        if want not in ("", "tmpfs", "loop", "disk"):
            raise Failed(f"BENCH_FS={want}: one of tmpfs, loop, disk")
        self.kind = "disk"
        memory = None if want == "disk" else self.tmpfs(need)
        if memory and want != "loop" and can_direct(memory):
            self.kind, self.dir = "tmpfs", memory
        elif memory and want != "tmpfs" and os.geteuid() == 0 and self.loop(memory, need):
            self.kind = "loop"
        elif want in ("tmpfs", "loop"):
            raise Failed(f"BENCH_FS={want}: not possible here")
        else:
            os.makedirs(os.path.join(BUILD, "bench"), exist_ok=True)
            self.dir = self.folder(os.path.join(BUILD, "bench"))
        self.direct = can_direct(self.dir)

    def folder(self, parent):
        path = tempfile.mkdtemp(prefix="fvd-bench.", dir=parent)
        self.undo.append(lambda: shutil.rmtree(path, ignore_errors=True))
        return path

    def tmpfs(self, need):
        shm = "/dev/shm"
        if os.path.isdir(shm) and os.access(shm, os.W_OK):
            vfs = os.statvfs(shm)
            if vfs.f_bavail * vfs.f_frsize >= need:
                return self.folder(shm)
        if os.geteuid() != 0:
            return None
        mount = self.folder(tempfile.gettempdir())
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={need}", "fvd-bench", mount], check=False).returncode:
            return None
        self.undo.append(lambda: subprocess.run(["umount", "-l", mount], check=False))
        return mount

    def loop(self, memory, need):
        image, mount = os.path.join(memory, "disk"), os.path.join(memory, "mnt")
        try:
            with open(image, "wb") as file:
                file.truncate(need)
            run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
            os.mkdir(mount)
            run("mount", "-o", "loop", image, mount)
        except (Failed, OSError) as error:
            print(f"no loop device: {error}", file=sys.stderr)
            return False
        self.undo.append(lambda: subprocess.run(["umount", mount], check=False))
        self.dir = self.folder(mount)
        return True

    def remove(self):
        while self.undo:
            self.undo.pop()()

    def path(self, name):
        return os.path.join(self.dir, name)

    @property
    def cache(self):
        return "none" if self.direct else "writeback"

    def describe(self):
        return {
            "tmpfs": f"tmpfs, cache={self.cache}",
            "loop": "ext4 on a loop device over tmpfs (no O_DIRECT on tmpfs here), cache=none",
            "disk": f"the disk of {self.dir}, cache={self.cache}: no tmpfs large enough",
        }[self.kind]


def filled(path, size):
    """A file without zeroes."""
    piece = os.urandom(MIB)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(piece)
        file.write(piece[: size % MIB])


def create(form, path, size=None, base=None, options=""):
    if os.path.exists(path):
        os.unlink(path)
    args = [tool("qemu-img"), "create", "-q", "-f", form]
    if base:
        args += ["-b", base, "-F", "raw"]
    if options:
        args += ["-o", options]
    run(*args, path, *([size] if size else []))


# --- statistics ---------------------------------------------------------------


def interval(values):
    """Median, and the order statistics around it that hold it with at least 95 %.

    Too few values for that give their minimum and maximum.
    """
    ordered, n = sorted(values), len(values)
    k, tail = 0, 0.0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 0.05:
            break
        k += 1
    k = max(k, 1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def judge_ratio(values, figure, rounds_needed=15):
    """The issue's rule: reached if the interval's lower end is above the figure less 0.02."""
    median, low, high = interval(values)
    if len(values) < rounds_needed:
        verdict = "shown"
    elif low > figure - 0.02:
        verdict = "reached"
    elif high < 1:
        verdict = "BEHIND"
    else:
        verdict = "undecided"
    return median, low, high, verdict


# --- the report ---------------------------------------------------------------


class Report:
    """Prints as it goes; text and JSON at the end."""

    def __init__(self):
        self.lines = []
        self.sections = []
        self.figures = []

    def say(self, text=""):
        print(text, flush=True)
        self.lines.append(text)

    def section(self, title):
        self.say()
        self.say(f"== {title}")
        self.sections.append({"title": title, "load": load(), "tables": []})

    def table(self, heads, rows, note=None):
        """First column to the left, the others to the right."""
        texts = [[cell if isinstance(cell, str) else f"{cell:g}" for cell in row] for row in [heads] + rows]
        widths = [max(len(row[i]) for row in texts) for i in range(len(heads))]
        for row in texts:
            self.say("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))
        if note:
            self.say("  " + note)
        self.sections[-1]["tables"].append({"heads": heads, "rows": rows})

    def figure(self, name, value, limit, verdict, detail=""):
        """One of the issue's figures. verdict: reached, NOT REACHED, BEHIND, undecided, shown."""
        self.figures.append({"name": name, "value": value, "limit": limit, "verdict": verdict, "detail": detail})

    def at_most(self, name, value, limit, unit=""):
        verdict = "reached" if value <= limit else "NOT REACHED"
        self.figure(name, f"{value:.4g}{unit}", f"<= {limit:g}{unit}", verdict)

    def finish(self, folder):
        self.say()
        self.say("== Figures of the issue")
        width = max((len(f["name"]) for f in self.figures), default=0)
        for f in self.figures:
            detail = f"  {f['detail']}" if f["detail"] else ""
            self.say(f"  {f['verdict']:<11}  {f['name']:<{width}}  {f['value']}  ({f['limit']}){detail}")
        bad = [f for f in self.figures if f["verdict"] in ("NOT REACHED", "BEHIND")]
        open_ = [f for f in self.figures if f["verdict"] == "undecided"]
        shown = [f for f in self.figures if f["verdict"] == "shown"]
        reached = len(self.figures) - len(bad) - len(open_) - len(shown)
        busiest = max([section["load"] for section in self.sections] + [load()])
        if busiest > 1.5 * os.cpu_count():
            self.say(f"  The machine was busy (load up to {busiest:.1f} on {os.cpu_count()} processors): times say little; counts stand.")
        self.say(f"  {reached} reached, {len(bad)} not, {len(open_)} undecided, {len(shown)} only shown")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "report.txt"), "w", encoding="utf-8") as file:
            file.write("\n".join(self.lines) + "\n")
        with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "sections": self.sections, "figures": self.figures}, file, indent=1)
            file.write("\n")
        return bad


def machine():
    cpu = ""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        found = re.search(r"^model name\s*: (.*)$", file.read(), re.M)
        cpu = found.group(1) if found else platform.machine()
    commit = subprocess.run(["git", "-C", TOP, "describe", "--always", "--dirty"], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "qemu": run(tool("qemu-img"), "--version").splitlines()[0],
        "commit": commit,
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "load": load(),
    }
