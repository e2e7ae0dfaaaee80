#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""A guest's fstrim makes a compact image's file smaller, and what the guest keeps stays.

Environment: see common.py; GUEST=0 skips, GUEST=1 makes the template if it is not in the cache.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import MIB, Failure, Suite, check, check_clean, guest_module, img

suite = Suite("trim")
SIZE = 512 * MIB

FILL = """
set -e
dev=/dev/vdb
mkfs.ext4 -q -F -E nodiscard $dev
mount $dev /mnt
cp -r /etc /mnt/kept
dd if=/dev/zero bs=1M count=200 2>/dev/null | tr '\\0' 'x' >/mnt/gone
sync
echo GUEST-FILLED
"""

TRIM = """
set -e
rm /mnt/gone
sync
fstrim -v /mnt
sync
# The journal of ext4 holds freed blocks back until it commits.
fstrim -v /mnt
diff -r --no-dereference /etc /mnt/kept
umount /mnt
e2fsck -fn /dev/vdb >/dev/null 2>&1
echo GUEST-FINE
"""


def stored(path):
    return os.stat(path).st_blocks * 512


def node(name, path, **more):
    return json.dumps(dict({"driver": "fvd", "node-name": name, "discard": "unmap",
                            "file": {"driver": "file", "filename": path, "discard": "unmap"}}, **more))


def in_guest(vm, script, word):
    job = vm.start_job(script)
    status = job.wait(300)
    check(status == 0 and word in job.output, "guest: status %s: %s", status, "\n".join(job.output[-10:]))
    return job.output


with suite.test("fstrim in a guest shrinks the file"):
    guest = guest_module()
    boot, data = suite.path("boot.img"), suite.path("data.img")
    try:
        # Both disks are compact: the root file system lives on one.
        img("create", "-q", "-f", "fvd", "-b", guest.template(), "-F", "raw", "-o", "compact_image=on", boot)
        img("create", "-q", "-f", "fvd", "-o", "compact_image=on,chunk_size=64k,storage_grow_unit=1M,journal_size=1M", data, str(SIZE))
        empty = stored(data)
        args = ["-blockdev", node("boot", boot), "-device", "virtio-blk-pci,drive=boot",
                "-blockdev", node("data", data), "-device", "virtio-blk-pci,drive=data,discard=on"]
        with guest.VM(args) as vm:
            vm.wait_marker()
            in_guest(vm, FILL, "GUEST-FILLED")
            full = stored(data)
            check(full > empty + 200 * MIB, "200 MiB were written, the file grew from %d to %d bytes", empty, full)
            output = in_guest(vm, TRIM, "GUEST-FINE")
            vm.poweroff()
        after = stored(data)
        print("# %d MiB when filled, %d MiB after fstrim (%s)" % (full // MIB, after // MIB, "; ".join(l for l in output if "trimmed" in l)))
        check(after < full - 180 * MIB, "fstrim: %d bytes before, %d after", full, after)
        check_clean(data)
        check_clean(boot)
        # What was given back is used again before the file grows.
        length = os.path.getsize(data)
        with guest.VM(args) as vm:
            vm.wait_marker()
            in_guest(vm, "set -e\nmount /dev/vdb /mnt\ndd if=/dev/zero bs=1M count=150 2>/dev/null | tr '\\0' 'y' >/mnt/again\n"
                         "diff -r --no-dereference /etc /mnt/kept\numount /mnt\necho GUEST-FINE\n", "GUEST-FINE")
            vm.poweroff()
        check(os.path.getsize(data) <= length + MIB, "the file grew from %d to %d bytes", length, os.path.getsize(data))
        check_clean(data)
    except guest.VMError as error:
        raise Failure(str(error))

suite.finish()
