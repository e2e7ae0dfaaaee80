#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Storage that does not grow by itself: who is told that it runs low, and who makes it longer while a guest writes.

Needs root (loop devices). There is no device mapper here: fvd-lvextend runs a stand-in of lvextend.

Environment: see common.py.
"""

import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import (KIB, MIB, NBD, TOP, Daemon, Failure, Loop, NBDError, Skip, Suite, check, check_clean, img, io, program, run, wait_for)

suite = Suite("space")
OPTIONS = "compact_image=on,chunk_size=64k,storage_grow_unit=1M,journal_size=1M"


def script(name, text):
    path = suite.path(name)
    with open(path, "w") as f:
        f.write("#!/bin/sh\n" + text)
    os.chmod(path, 0o755)
    return path


def grower(loop, log):
    """A helper as a host would have one, told where the loop device's file is."""
    return script("grow", 'echo "$@" >> %s\nset -e\ntruncate -s "+$3" %s\nexec losetup -c "$1"\n' % (log, loop.file))


def lines(path):
    with open(path, encoding="utf-8") as f:
        return f.read().splitlines()


def node(path, **more):
    return json.dumps(dict({"driver": "fvd", "node-name": "n", "file": {"driver": "host_device", "filename": path}}, **more))


class Export:
    """The storage daemon with an image on a device, exported; writes through NBD."""

    def __init__(self, loop, iothread=False, **more):
        img("create", "-q", "-f", "fvd", "-o", OPTIONS, loop.device, str(64 * MIB))
        sock = suite.path("nbd%d" % time.monotonic_ns())
        words = ["--blockdev", node(loop.device, **more), "--nbd-server", "addr.type=unix,addr.path=" + sock]
        if iothread:
            words = ["--object", "iothread,id=io", *words]
        words += ["--export", "nbd,id=e,node-name=n,writable=on" + (",iothread=io" if iothread else "")]
        self.daemon = Daemon(*words)
        self.link = NBD(sock, "n")
        self.path = loop.device

    def __enter__(self):
        self.daemon.__enter__()
        return self

    def __exit__(self, *exc):
        self.link.close()
        return self.daemon.__exit__(*exc)

    def low(self):
        """The events so far."""
        self.daemon.qmp("query-named-block-nodes")
        return [e["data"] for e in self.daemon.qmp.events if e["event"] == "BLOCK_SPACE_LOW"]

    def fill(self, until=48 * MIB, since=0, piece=128 * KIB):
        """Writes all pieces, many in flight; the first error is raised."""
        flights = []
        for at in range(since, until, piece):
            flights.append(self.link.request(NBD.WRITE, at, piece, data=pattern(at, piece)))
            if len(flights) == 8:
                flights.pop(0).wait()
        for flight in flights:
            flight.wait()

    def compare(self, until=48 * MIB, piece=128 * KIB):
        for at in range(0, until, piece):
            check(self.link.read(at, piece) == pattern(at, piece), "what was written at %d reads otherwise", at)


def pattern(at, piece):
    return bytes([at // piece % 251 + 1]) * piece


def room(loop):
    return os.path.getsize(loop.file)


with suite.test("a manager is told ahead of need (BLOCK_SPACE_LOW), and a device that it makes longer is used"):
    with Loop(suite.path("told.bin"), 8 * MIB) as loop, Export(loop) as export:
        done, told = 0, 0
        while done < 32 * MIB:
            export.fill(done + 128 * KIB, done)
            done += 128 * KIB
            events = export.low()
            if len(events) > told:
                told = len(events)
                check(events[-1] == {"node-name": "n", "free": events[-1]["free"], "wanted": MIB}, "%s", events[-1])
                # Ahead: this much is left.
                check(events[-1]["free"] > 0, "told when nothing was left: %s", events)
                loop.grow(MIB)
        check(24 <= told <= 32, "told %d times", told)
        export.compare(32 * MIB)
        # Nobody makes it longer: told once, and writes fail.
        try:
            export.fill(64 * MIB, 32 * MIB)
            raise Failure("there is no room for this")
        except NBDError as error:
            check(error.code == 28, "%s instead of ENOSPC", error)
        check(len(export.low()) == told + 1, "told %d times more", len(export.low()) - told)

for iothread in (False, True):
    with suite.test("a helper makes the device longer while a guest writes%s" % (", in an iothread" if iothread else "")):
        with Loop(suite.path("helped.bin"), 8 * MIB) as loop:
            log = suite.path("helped%d.log" % iothread)
            with Export(loop, iothread, **{"space-helper": [grower(loop, log)]}) as export:
                # Not one write fails.
                export.fill()
                export.link.flush()
                export.compare()
            runs = lines(log)
            check(40 <= len(runs) <= 64, "the helper ran %d times for 48 MiB by steps of 1 MiB", len(runs))
            for line in runs:
                device, free, wanted = line.split()
                check(device == loop.device and int(free) < 2 * MIB and int(wanted) == MIB, "the helper got: %s", line)
            check(room(loop) <= 48 * MIB + 8 * MIB, "the device has %d bytes", room(loop))
            check_clean(loop.device)

with suite.test("writes wait for a slow helper and for one that does little; reads and flushes do not"):
    with Loop(suite.path("slow.bin"), 6 * MIB) as loop:
        log = suite.path("slow.log")
        # Half of what is wanted, half a second late.
        slow = script("slow", 'echo "$@" >> %s\nset -e\nsleep 0.5\ntruncate -s "+$(($3 / 2))" %s\nexec losetup -c "$1"\n' % (log, loop.file))
        with Export(loop, **{"space-helper": [slow]}) as export:
            big = export.link.request(NBD.WRITE, 0, 6 * MIB, data=b"\x2a" * (6 * MIB))
            time.sleep(0.3)
            check(not big.event.is_set(), "6 MiB fit into the device")
            began = time.monotonic()
            export.link.flush()
            check(export.link.read(60 * MIB, 4 * KIB) == bytes(4 * KIB), "nothing was written there")
            check(not big.event.is_set() or time.monotonic() - began < 0.5, "reads and flushes waited for the helper")
            big.wait()
            check(export.link.read(0, 6 * MIB) == b"\x2a" * (6 * MIB), "what waited reads otherwise")
        check(len(lines(log)) >= 4, "the helper ran %d times", len(lines(log)))
        check_clean(loop.device)

with suite.test("a helper that fails: ENOSPC for who waits, no second run at once, nothing is lost"):
    with Loop(suite.path("failing.bin"), 8 * MIB) as loop:
        log = suite.path("failing.log")
        with Export(loop, **{"space-helper": [script("failing", "echo run >> %s\nsleep 0.2\nexit 3\n" % log)]}) as export:
            errors, done = 0, []
            for at in range(0, 48 * MIB, 128 * KIB):
                try:
                    export.link.write(at, pattern(at, 128 * KIB))
                    done.append(at)
                except NBDError as error:
                    check(error.code == 28, "%s instead of ENOSPC", error)
                    errors += 1
            check(errors > 100 and len(done) > 20, "%d errors, %d writes", errors, len(done))
            check(len(lines(log)) <= 2, "the helper ran %d times", len(lines(log)))
            for at in done:
                check(export.link.read(at, 128 * KIB) == pattern(at, 128 * KIB), "what was written at %d", at)
            text = export.daemon.text()
            check("space-helper" in text and "status 3" in text or "code 3" in text, "no word of the failure: %s", text)
        check_clean(loop.device)

with suite.test("a drain ends the wait: no transaction hangs, the guest gets ENOSPC and may try again"):
    with Loop(suite.path("drain.bin"), 6 * MIB) as loop:
        log, go = suite.path("drain.log"), suite.path("drain.go")
        waits = script("waits", 'echo "$@" >> %s\nset -e\nwhile [ ! -e %s ]; do sleep 0.05; done\ntruncate -s +16M %s\nexec losetup -c "$1"\n'
                       % (log, go, loop.file))
        with Export(loop, **{"space-helper": [waits]}) as export:
            big = export.link.request(NBD.WRITE, 0, 6 * MIB, data=b"\x2b" * (6 * MIB))
            wait_for(lambda: os.path.exists(log), "a run of the helper")
            time.sleep(0.2)
            check(not big.event.is_set(), "the write did not wait")
            began = time.monotonic()
            # Drains all nodes.
            export.daemon.qmp("blockdev-add", **{"driver": "null-co", "node-name": "x"})
            export.daemon.qmp("blockdev-reopen", options=[json.loads(node(loop.device, **{"space-helper": [waits], "discard": "unmap"}))])
            check(time.monotonic() - began < 10, "the drain took %.1f s", time.monotonic() - began)
            try:
                big.wait()
                raise Failure("the write that waited succeeded without storage")
            except NBDError as error:
                check(error.code == 28, "%s instead of ENOSPC", error)
            with open(go, "w"):
                pass
            wait_for(lambda: room(loop) > 20 * MIB, "the helper's end")
            export.link.write(0, b"\x2c" * (6 * MIB))
            check(export.link.read(0, 6 * MIB) == b"\x2c" * (6 * MIB), "the second attempt")
        check_clean(loop.device)

with suite.test("the tools wait for a helper as well (qemu-io, qemu-img convert)"):
    with Loop(suite.path("tools.bin"), 6 * MIB) as loop:
        log, source = suite.path("tools.log"), suite.path("tools.raw")
        img("create", "-q", "-f", "fvd", "-o", OPTIONS, loop.device, str(64 * MIB))
        target = "driver=fvd,file.driver=host_device,file.filename=%s,space-helper.0=%s" % (loop.device, grower(loop, log))
        io(loop.device, "write -q -P 7 0 12M", "read -q -P 7 0 12M", opts=target)
        with open(source, "wb") as f:
            f.write(b"\x37" * (24 * MIB))
        img("convert", "-n", "-f", "raw", "--target-image-opts", source, target)
        img("compare", "-q", "-f", "raw", "-F", "fvd", source, loop.device)
        check(len(lines(log)) > 16, "the helper ran %d times", len(lines(log)))
        check_clean(loop.device)

with suite.test("contrib/fvd-lvextend calls lvextend with the volume and what is wanted"):
    with Loop(suite.path("lv.bin"), 6 * MIB) as loop:
        log, folder = suite.path("lv.log"), suite.path("bin")
        os.mkdir(folder)
        # As lvextend: -A and --size are options, the volume comes last.
        fake = os.path.join(folder, "lvextend")
        with open(fake, "w") as f:
            f.write('#!/bin/sh\necho "$@" >> %s\nset -e\n[ "$1 $2 $3" = "--autobackup n --size" ] && [ "$5" = -- ]\n'
                    'size=${4#+}\ntruncate -s "+${size%%b}" %s\nexec losetup -c "$6"\n' % (log, loop.file))
        os.chmod(fake, 0o755)
        old = os.environ["PATH"]
        os.environ["PATH"] = folder + ":" + old
        try:
            helper = [os.path.join(TOP, "contrib", "fvd-lvextend"), "--autobackup", "n"]
            with Export(loop, **{"space-helper": helper}) as export:
                export.fill(16 * MIB)
                export.compare(16 * MIB)
        finally:
            os.environ["PATH"] = old
        check(lines(log)[0] == "--autobackup n --size +1048576b -- " + loop.device, "lvextend got: %s", lines(log)[0])
        check_clean(loop.device)

with suite.test("a device that cannot zero shows nothing old and is not filled with zeroes"):
    folder = suite.path("ramfs")
    os.mkdir(folder)
    if subprocess.run(["mount", "-t", "ramfs", "none", folder], check=False).returncode != 0:
        raise Skip("needs root (ramfs)")
    try:
        # Nothing can punch holes in a file there, so the device has neither discard nor write-zeroes.
        with Loop(os.path.join(folder, "dear.bin"), 48 * MIB) as loop:
            device = loop.device
            with open("/sys/block/%s/queue/write_zeroes_max_bytes" % os.path.basename(device), encoding="ascii") as f:
                check(int(f.read()) == 0, "the device can zero")
            for base in (None, suite.path("dear-base")):
                more = []
                if base:
                    with open(base, "wb") as f:
                        f.write(b"\x42" * (2 * MIB + 512))
                    more = ["-b", base, "-F", "raw"]
                img("create", "-q", "-f", "fvd", "-o", "compact_image=on,chunk_size=1M,journal_size=1M", *more, device, "64M")
                rest = "0x42" if base else "0"
                io(device, "write -q -P 1 1052672 4k", "write -q -P 2 10M 512", "write -q -P 3 20M 3M", "flush",
                   "read -q -P %s 1M 4k" % rest, "read -q -P %s 1056768 64k" % rest, "read -q -P 0 10486272 1048064")
                # Parts of chunks, and whole ones, are zero at once, and can be written to again.
                io(device, "write -q -z 21M 64k", "discard -q 22M 1M", "write -q -P 4 23134208 4k", "flush", args=("-d", "unmap"))
                io(device, "read -q -P 3 20M 1M", "read -q -P 0 21M 64k", "read -q -P 3 22085632 983040", "read -q -P 0 22M 65536",
                   "read -q -P 4 23134208 4k", "read -q -P 0 23138304 978944")
                check_clean(device)
                img("resize", "-q", "-f", "fvd", device, "80M")
                io(device, "write -q -P 5 70M 4k", "read -q -P 0 73404416 1044480", "read -q -P 3 20M 1M")
                check_clean(device)
                # The figure of the design: up to 8 MiB of bits for each TiB.
                info = json.loads(run("fvd", "info", "--output", "json", device))["format-specific"]["data"]
                check(info["covered"] == 80 * MIB, "the bits speak of %s bytes", info["covered"])
    finally:
        subprocess.run(["umount", folder], check=True)

with suite.test("what cannot be is refused, by name"):
    path = suite.path("file.img")
    img("create", "-q", "-f", "fvd", "-o", OPTIONS, path, "16M")
    base = "driver=fvd,file.driver=file,file.filename=" + path

    def refused(options, *parts):
        text = io(path, "read 0 512", opts=base + "," + options, status=1)
        for part in parts:
            check(part in text, "'%s' is not in: %s", part, text)

    refused("space-helper.0=grow", "space-helper", "'grow'", "absolute path")
    refused("space-helper=/bin/true", "space-helper", "list")
    refused("space-helper.x=/bin/true", "list")
    refused("space-helper.0.y=/bin/true", "space-helper", "list of words")
    refused("space-wait=on", "space-wait needs space-helper")
    done = subprocess.run([program("qemu-system-x86_64"), "-M", "none", "-display", "none", "-sandbox", "on,spawn=deny", "-monitor", "none",
                           "-blockdev", node(path, file={"driver": "file", "filename": path}, **{"space-helper": ["/bin/true"]})],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    check(done.returncode == 1 and "spawn=deny" in done.stdout and "space-helper" in done.stdout, "%s: %s", done.returncode, done.stdout)
    # The image cannot name one.
    check("helper" not in run("fvd", "info", path), "an image names a helper")

suite.finish()
