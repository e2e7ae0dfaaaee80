#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Verified writes from several connections and iothreads at once.

First with qemu-storage-daemon: two exports, each image in its own iothread, two connections
each, many requests in flight, while QMP moves the images between iothreads, grows them,
takes external snapshots and runs jobs. Then, if the template is in the cache (make-template.sh
made it), a guest whose one virtio disk is served by two iothreads at once
(iothread-vq-mapping); without it that test is skipped.

Environment: see common.py; SECONDS_BUSY (8) of writing per test; GUEST=0 skips the guest,
GUEST=1 makes the template if need be.
"""

import json
import os
import random
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import (KIB, MIB, NBD, SECTOR, Daemon, Failure, NBDError, Skip, Suite, check, check_clean,
                    direct_io, guest_module, img, run_json, read_stamp, stamps, wait_for)

BUSY = float(os.environ.get("SECONDS_BUSY", "8"))
suite = Suite("iothreads")
rnd = suite.random
DISK = 32 * MIB
PLACES = DISK // (4 * KIB)


class Writers:
    """Threads that write, zero, read back and verify one export over connections of their own.

    The disk is dealt out in places of 4 KiB, interleaved, so that the connections share every
    block larger than that; each place has one owner, who knows what it holds.
    """

    def __init__(self, path, export, connections, content):
        self.path, self.export = path, export
        self.stop = threading.Event()
        self.errors = []
        self.content = content          # place -> number; each thread touches its own only
        self.requests = 0
        self.threads = [threading.Thread(target=self.work, args=(n, connections, rnd.randrange(1 << 32)))
                        for n in range(connections)]
        for thread in self.threads:
            thread.start()

    def work(self, mine, of, seed):
        try:
            own = random.Random(seed)
            link = NBD(self.path, self.export)
            number = 10 + mine
            while not self.stop.is_set():
                number = self.batch(link, own, mine, of, number)
            link.flush()
            link.close()
        except (Failure, EOFError, OSError, NBDError) as error:
            self.errors.append("connection %d: %s" % (mine, error or repr(error)))
            self.stop.set()

    def batch(self, link, own, mine, of, number):
        batch = []
        places = own.sample(range(mine, PLACES, of), 24)
        for place in places:
            kind = own.randrange(10)
            offset = place * 4 * KIB
            if kind < 5:
                number += of
                self.content[place] = number
                # Unaligned pieces of one place, all in flight.
                data = stamps(offset // SECTOR, 8, number)
                cut = own.choice([0, 0, SECTOR, 1000, 4095])
                if cut:
                    batch.append(link.request(NBD.WRITE, offset, data=data[:cut]))
                    batch.append(link.request(NBD.WRITE, offset + cut, data=data[cut:]))
                else:
                    batch.append(link.request(NBD.WRITE, offset, data=data,
                                              flags=NBD.FUA if own.randrange(8) == 0 else 0))
            elif kind == 5:
                self.content[place] = 0
                batch.append(link.request(NBD.WRITE_ZEROES, offset, 4 * KIB,
                                          flags=own.choice([0, NBD.NO_HOLE])))
            else:
                pending = link.request(NBD.READ, offset, 4 * KIB)
                batch.append(pending)
                self.verify(place, pending.wait())
        if own.randrange(4) == 0:
            batch.append(link.request(NBD.FLUSH))
        for pending in batch:
            pending.wait()
        self.requests += len(batch)
        # A part of what was just written, with writes of the others around it.
        for place in own.sample(places, 4):
            self.verify(place, link.read(place * 4 * KIB, 4 * KIB))
        return number

    def verify(self, place, data):
        for i in range(8):
            sector = place * 8 + i
            found = read_stamp(data[i * SECTOR:(i + 1) * SECTOR], sector)
            check(found == self.content[place], "sector %d holds %d, not %d", sector, found, self.content[place])

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(120)
            check(not thread.is_alive(), "a request of export '%s' hangs", self.export)
        check(not self.errors, "export '%s': %s", self.export, self.errors)
        return self.requests


def make_disks(options):
    """Two images over one base, which holds stamps of number 1 in its first half."""
    base = suite.path("base.raw")
    with open(base, "wb") as f:
        f.write(stamps(0, DISK // 2 // SECTOR, 1))
    for name in ("a", "b"):
        img("create", "-q", "-f", "fvd", "-b", base, "-F", "raw", "-o", options, suite.path(name + ".img"), str(DISK))
    return [[1] * (PLACES // 2) + [0] * (PLACES - PLACES // 2) for _ in "ab"]


def blockdev(name, path, aio, **more):
    direct = aio != "threads"
    return json.dumps(dict({"driver": "fvd", "node-name": name, "discard": "unmap", "commit-interval": 1,
                            "cache": {"direct": direct},
                            "file": {"driver": "file", "filename": path, "aio": aio, "cache": {"direct": direct}}}, **more))


def verify_image(path, content):
    """Everything, read from the closed image."""
    check_clean(path)
    out = suite.path("all.raw")
    img("convert", "-f", "fvd", "-O", "raw", path, out)
    with open(out, "rb") as f:
        for place in range(PLACES):
            data = f.read(4 * KIB)
            for i in range(8):
                found = read_stamp(data[i * SECTOR:(i + 1) * SECTOR], place * 8 + i)
                check(found == content[place], "%s: sector %d holds %d, not %d", path, place * 8 + i, found, content[place])
    os.unlink(out)


def daemon_test(name, options, aio, disturb):
    with suite.test("storage-daemon, %s" % name):
        if aio != "threads" and not direct_io(suite.dir):
            raise Skip("the scratch folder's file system has no O_DIRECT")
        contents = make_disks(options)
        sock = suite.path("nbd")
        # All in one iothread, two, or the main loop: the disturber moves them.
        with Daemon("--object", "iothread,id=io0", "--object", "iothread,id=io1",
                    "--blockdev", blockdev("a", suite.path("a.img"), aio),
                    "--blockdev", blockdev("b", suite.path("b.img"), aio),
                    "--nbd-server", "addr.type=unix,addr.path=%s,max-connections=20" % sock,
                    "--export", "nbd,id=ea,node-name=a,name=a,writable=on,iothread=io0",
                    "--export", "nbd,id=eb,node-name=b,name=b,writable=on,iothread=io1") as daemon:
            writers = [Writers(sock, n, 2, c) for n, c in zip("ab", contents)]
            try:
                deadline = time.monotonic() + BUSY
                turn = 0
                while time.monotonic() < deadline and not any(w.errors for w in writers):
                    disturb(daemon.qmp, turn)
                    turn += 1
            finally:
                # Failures of the writers say more than those of the disturber.
                requests = [w.end() for w in writers]
            print("# %d and %d requests, %d disturbances" % (*requests, turn))
            check(min(requests) > 100, "only %s requests: the test was idle", requests)
            daemon.qmp("block-export-del", id="ea", mode="hard")
            daemon.qmp("block-export-del", id="eb", mode="hard")
        for n, content in zip("ab", contents):
            verify_image(suite.path(n + ".img"), content)


def quiet(qmp, turn):
    time.sleep(0.2)


def bitmaps_and_questions(qmp, turn):
    """What a backup program does meanwhile: all of it drains or reads the graph."""
    for name in "ab":
        qmp("block-dirty-bitmap-add", node=name, name="dirty")
    for node in qmp("query-named-block-nodes"):
        if node["drv"] == "fvd":
            check(node["image"]["virtual-size"] == DISK, "size %s", node["image"]["virtual-size"])
    for name in "ab":
        qmp("block-dirty-bitmap-remove", node=name, name="dirty")
    time.sleep(0.03)


def reopen(qmp, turn):
    """Other options, the same access: the engine is swapped under the writers."""
    for name in "ab":
        options = json.loads(blockdev(name, suite.path(name + ".img"), "threads"))
        options["commit-interval"] = 1 + turn % 3
        options["backing"] = qmp.backing[name]
        qmp("blockdev-reopen", options=[options])
    time.sleep(0.05)


daemon_test("4k blocks, threads", "block_size=4k,journal_size=1M", "threads", quiet)
daemon_test("64k blocks, io_uring, asked meanwhile", "block_size=64k,journal_size=1M", "io_uring", bitmaps_and_questions)
daemon_test("2M blocks, native", "block_size=2M,journal_size=1M,detect_sparse_hole=on", "native", quiet)
daemon_test("compact, 64k chunks, io_uring, asked meanwhile",
            "compact_image=on,chunk_size=64k,storage_grow_unit=1M,block_size=4k,journal_size=1M", "io_uring",
            bitmaps_and_questions)

with suite.test("storage-daemon, reopened while written to"):
    contents = make_disks("block_size=64k,journal_size=1M")
    sock = suite.path("nbd2")
    with Daemon("--object", "iothread,id=io0", "--object", "iothread,id=io1",
                "--blockdev", blockdev("a", suite.path("a.img"), "threads"),
                "--blockdev", blockdev("b", suite.path("b.img"), "threads"),
                "--nbd-server", "addr.type=unix,addr.path=%s" % sock,
                "--export", "nbd,id=ea,node-name=a,name=a,writable=on,iothread=io0",
                "--export", "nbd,id=eb,node-name=b,name=b,writable=on,iothread=io1") as daemon:
        nodes = {n["node-name"]: n for n in daemon.qmp("query-named-block-nodes")}
        # The base's node was made by itself; reopen wants its name.
        bases = [n for n in nodes.values() if n["drv"] == "raw"]
        check(len(bases) == 2, "two raw nodes expected: %s", [n["node-name"] for n in bases])
        daemon.qmp.backing = {}
        for name in "ab":
            options = json.loads(blockdev(name, suite.path(name + ".img"), "threads"))
            for base in bases:
                message = daemon.qmp.raw("blockdev-reopen", options=[dict(options, backing=base["node-name"])])
                if "error" not in message:
                    daemon.qmp.backing[name] = base["node-name"]
                    break
            else:
                raise Failure("blockdev-reopen: %s" % message["error"]["desc"])
        writers = [Writers(sock, n, 2, c) for n, c in zip("ab", contents)]
        try:
            deadline = time.monotonic() + BUSY / 2
            turn = 0
            while time.monotonic() < deadline and not any(w.errors for w in writers):
                reopen(daemon.qmp, turn)
                turn += 1
        finally:
            requests = [w.end() for w in writers]
        print("# %d and %d requests, %d reopens" % (*requests, 2 * turn))
        daemon.qmp("block-export-del", id="ea", mode="hard")
        daemon.qmp("block-export-del", id="eb", mode="hard")
    for n, content in zip("ab", contents):
        verify_image(suite.path(n + ".img"), content)

with suite.test("storage-daemon, snapshots and commits under writes, then another iothread"):
    contents = make_disks("block_size=64k,journal_size=1M")
    sock = suite.path("nbd3")
    top = suite.path("top.img")
    with Daemon("--object", "iothread,id=io0", "--object", "iothread,id=io1",
                "--blockdev", blockdev("a", suite.path("a.img"), "threads"),
                "--nbd-server", "addr.type=unix,addr.path=%s" % sock,
                "--export", "nbd,id=ea,node-name=a,name=a,writable=on,iothread=io0") as daemon:
        qmp = daemon.qmp
        writers = Writers(sock, "a", 2, contents[0])
        turn = 0
        try:
            deadline = time.monotonic() + BUSY
            while time.monotonic() < deadline and not writers.errors:
                # Overlay on, written to for a moment, committed down again, all of it under writes.
                img("create", "-q", "-f", "fvd", "-u", "-b", suite.path("a.img"), "-F", "fvd", top, str(DISK))
                qmp("blockdev-add", **json.loads(blockdev("top", top, "threads", backing=None)))
                qmp("blockdev-snapshot", node="a", overlay="top")
                time.sleep(0.3)
                qmp.job("block-commit", job_id="c%d" % turn, device="top", base_node="a", auto_dismiss=False)
                qmp("blockdev-del", node_name="top")
                turn += 1
        finally:
            requests = writers.end()
        print("# %d requests, %d snapshots committed" % (requests, turn))
        check(turn >= 3, "only %d snapshots", turn)
        # The same node from another thread: its queues move.
        qmp("block-export-del", id="ea", mode="hard")
        for number, thread in enumerate(["io1", "io0", "io1"]):
            export = "again%d" % number
            def added():
                return "error" not in qmp.raw("block-export-add", id=export, type="nbd", node_name="a", name=export,
                                              writable=True, iothread=thread)
            deadline = time.monotonic() + 10
            while not added():
                check(time.monotonic() < deadline, "the export cannot move to %s", thread)
                time.sleep(0.05)
            writers = Writers(sock, export, 2, contents[0])
            time.sleep(1)
            writers.end()
            qmp("block-export-del", id=export, mode="hard")
            wait_for(lambda: not qmp("query-block-exports"), "the end of the export")
    verify_image(suite.path("a.img"), contents[0])

GUEST = r"""
set -e
dev=$(for d in /dev/vd?; do [ "$(blockdev --getsize64 $d)" = %(size)d ] && echo $d; done)
[ -b "$dev" ]
cat /sys/block/${dev#/dev/}/mq/*/cpu_list
head -c 1048576 /dev/urandom >/run/seed
# Each writer is pinned to a processor, so that both queues are used; pieces of both share blocks.
for cpu in 0 1; do
    (
        for i in $(seq 0 %(pieces)d); do
            n=$((i * 2 + cpu))
            { printf '%%08d' $n; tail -c +9 /run/seed; } >/run/p$cpu
            # 1 MiB less 512 bytes at places that are 1 MiB apart: neighbours in one 64 KiB block.
            taskset -c $cpu dd if=/run/p$cpu of=$dev bs=1048064 count=1 seek=$((n * 1048064)) \
                oflag=direct,seek_bytes conv=notrunc status=none
            if [ $((i %% 4)) = 0 ]; then taskset -c $cpu dd if=/run/p$cpu of=$dev bs=512 count=0 conv=notrunc,fsync status=none; fi
        done
    ) &
done
wait
sync
echo 3 >/proc/sys/vm/drop_caches
for n in $(seq 0 $((%(pieces)d * 2 + 1))); do
    { printf '%%08d' $n; tail -c +9 /run/seed; } | head -c 1048064 >/run/want
    dd if=$dev bs=1048064 count=1 skip=$((n * 1048064)) iflag=direct,skip_bytes status=none | cmp - /run/want || { echo BAD $n; exit 1; }
done
mkfs.ext4 -q -F $dev
mount $dev /mnt
cp -r /etc /mnt/one & cp -r /etc /mnt/two & wait
diff -r --no-dereference /mnt/one /mnt/two
umount /mnt
e2fsck -fn $dev >/dev/null 2>&1
echo GUEST-FINE
"""

with suite.test("guest, one virtio disk in two iothreads"):
    guest = guest_module()
    boot, data = suite.path("boot.img"), suite.path("data.img")
    size = 160 * MIB
    aio = "io_uring" if direct_io(suite.dir) else "threads"
    base = suite.path("guest-base.raw")
    with open(base, "wb") as f:
        f.write(b"\xa5" * (40 * MIB))
    try:
        img("create", "-q", "-f", "fvd", "-b", guest.template(), "-F", "raw", boot)
        img("create", "-q", "-f", "fvd", "-b", base, "-F", "raw", "-o", "block_size=64k", data, str(size))
        args = ["-object", "iothread,id=io0", "-object", "iothread,id=io1",
                "-blockdev", blockdev("boot", boot, aio), "-device", "virtio-blk-pci,drive=boot",
                "-blockdev", blockdev("data", data, aio),
                "-device", json.dumps({"driver": "virtio-blk-pci", "drive": "data", "num-queues": 2,
                                       "iothread-vq-mapping": [{"iothread": "io0"}, {"iothread": "io1"}]})]
        with guest.VM(args, smp=2) as vm:
            vm.wait_marker()
            job = vm.start_job(GUEST % {"size": size, "pieces": 32})
            # Drains and graph reads while both queues are busy.
            turn = 0
            while job.status is None and turn < 2000:
                if turn % 3 == 0:
                    vm.qmp("stop")
                    vm.qmp("cont")
                else:
                    vm.qmp("query-named-block-nodes")
                turn += 1
                try:
                    while job.next_line(0.2) is not None:
                        pass
                except guest.VMError as error:
                    if "no output" not in str(error):
                        raise
            status = job.wait(300)
            check(status == 0 and "GUEST-FINE" in job.output, "guest: status %s: %s", status, "\n".join(job.output[-10:]))
            print("# booted in %.0f s (%s), %d disturbances" % (vm.marker_seconds, vm.accel, turn))
            vm.poweroff()
        check_clean(data)
        check_clean(boot)
    except guest.VMError as error:
        raise Failure(str(error))
suite.finish()
