# SPDX-License-Identifier: MIT OR Apache-2.0
"""What scripts/run-vm.sh runs; its head comment says what can be set."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import vm as guest
from vm import VM, ReadCounter, VMError, qemu_img

FORMAT = os.environ.get("FORMAT") or "fvd"
CREATE_OPTS = os.environ.get("CREATE_OPTS", "")
DRIVE_OPTS = os.environ.get("DRIVE_OPTS", "")
RUN_DIR = os.environ.get("RUN_DIR") or os.path.join(guest.TOP, "build/run")
PARTITION = 1 << 20     # where make-template.sh puts the file system
SYNCED_FILES = 12       # acknowledged by the guest before the kill

# New files of many sizes, odd-sized overwrites inside files of the base, a removed
# file and a truncated one: each kind of copy-on-write a file system makes.
WRITE = r"""
set -eu
mkdir -p /fvd-test && cd /fvd-test
for i in $(seq 1 40); do
    head -c $((i * i * 511 + i)) /dev/urandom >file.$i
done
head -c 6000000 /dev/zero >zeroes
head -c 8000000 /dev/urandom >big
truncate -s 3333333 big
cp -r /usr/lib/grub/i386-pc copy
rm copy/a*.mod
n=0
for f in /usr/lib/grub/i386-pc/[b-m]*.mod; do
    n=$((n + 1))
    head -c 777 /dev/urandom | dd of="$f" bs=1 seek=$((n * 13)) conv=notrunc status=none iflag=fullblock
done
sync
echo "$(find /fvd-test -type f | wc -l) $(du -sb /fvd-test | cut -f1)"
"""

# Read back from the disk, not from the guest's page cache.
CHECKSUM = r"""
set -eu
echo 3 >/proc/sys/vm/drop_caches
cd / && find fvd-test usr/lib/grub boot -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
"""

# Synced files, each acknowledged once it must survive, and beside them a stream of
# unsynced changes so that the kill hits data and metadata on their way.
CRASH = r"""
mkdir -p /fvd-crash && cd /fvd-crash && sync /fvd-crash
( n=0; while :; do n=$((n + 1)); cp -r /usr/lib/grub/i386-pc churn.$n; rm -rf churn.$((n - 2)); done ) &
i=0
while :; do
    i=$((i + 1))
    head -c $((RANDOM * 20 + i)) /dev/urandom >new.$i || exit 1
    sum=$(sha256sum <new.$i | cut -d' ' -f1)
    sync new.$i && sync /fvd-crash && mv new.$i synced.$i && sync /fvd-crash || exit 1
    echo "SYNCED synced.$i $sum"
done
"""


def mib(count):
    return "%.1f MiB" % (count / (1 << 20))


def say(what, text):
    print("%-9s %s" % (what, text), flush=True)


def drive(image):
    opts = "file=%s,format=%s,if=virtio" % (image, FORMAT)
    return ["-drive", opts + ("," + DRIVE_OPTS if DRIVE_OPTS else "")]


def create(image, template):
    args = ["create", "-q", "-f", FORMAT, "-b", template, "-F", "raw"]
    if CREATE_OPTS:
        args += ["-o", CREATE_OPTS]
    begin = time.monotonic()
    qemu_img(*args, image)
    return time.monotonic() - begin


def allocated(image):
    return json.loads(qemu_img("info", "--output=json", image))["actual-size"]


def check(image):
    """qemu-img check; its first line. Leaked clusters after a kill are qcow2's habit, not ours."""
    done = subprocess.run([guest.qemu_img_binary(), "check", "-f", FORMAT, image],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 3 and FORMAT != "fvd":
        return "leaked clusters only"
    if done.returncode != 0:
        raise VMError("qemu-img check: exit status %d\n%s" % (done.returncode, done.stdout.rstrip()))
    return done.stdout.strip().splitlines()[0]


def fsck(image, raw):
    """Full check of the guest's file system from outside, changing nothing."""
    if os.path.exists(raw):
        os.unlink(raw)
    qemu_img("convert", "-f", FORMAT, "-O", "raw", image, raw)
    tool = shutil.which("e2fsck", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not tool:
        raise VMError("no e2fsck (package e2fsprogs)")
    done = subprocess.run([tool, "-fn", "%s?offset=%d" % (raw, PARTITION)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise VMError("e2fsck -fn: exit status %d (%s kept)\n%s" % (done.returncode, raw, done.stdout))
    os.unlink(raw)
    return done.stdout.strip().splitlines()[-1]


def boot(number, image, template, trace=False):
    counter = ReadCounter(os.path.join(RUN_DIR, "trace.log")) if trace else None
    machine = VM(drive(image) + (counter.args() if counter else []),
                 console_log=os.path.join(RUN_DIR, "console-%d.log" % number))
    machine.start()
    try:
        seconds = machine.wait_marker()
        text = "guest's marker %.1f s after QEMU's start (%s)" % (seconds, machine.accel)
        if counter:
            requests, total = counter.result(template)
            text += "; until then %s read from the base in %d requests" % (mib(total), requests)
        say("boot %d" % number, text)
        kernel_root = machine.run("cat /proc/mounts")
        if not re.search(r"^/dev/vda1 / ext4 rw[, ]", kernel_root, re.M):
            raise VMError("the guest's root is not writable:\n" + kernel_root)
        return machine, counter
    except BaseException:
        machine.kill()
        raise


def checks():
    begin = time.monotonic()
    template = guest.template()
    image = os.path.join(RUN_DIR, "vm." + FORMAT)
    raw = os.path.join(RUN_DIR, "vm.raw")
    if os.path.exists(image):
        os.unlink(image)
    say("template", "%s: %s used" % (template, mib(os.stat(template).st_blocks * 512)))
    seconds = create(image, template)
    say("disk", "%s: created in %.2f s, %s" % (os.path.relpath(image), seconds, mib(allocated(image))))

    machine, counter = boot(1, image, template, trace=True)
    with machine:
        files, size = machine.run(WRITE, 180).split()
        checksum = machine.run(CHECKSUM, 180)
        say("write", "%s files, %s in the guest, synced; sha256 over all %s…" % (files, mib(int(size)), checksum[:16]))
        machine.poweroff()
    requests, total = counter.result(template)
    os.unlink(counter.log)
    say("power off", "%s read from the base in the whole run (%d requests); %s in the image"
        % (mib(total), requests, mib(allocated(image))))
    say("check", check(image))

    machine, _ = boot(2, image, template)
    with machine:
        if machine.run(CHECKSUM, 180) != checksum:
            raise VMError("the files' checksum is not what it was before the power-off")
        say("verify", "after power-off and boot: the same checksum")
        job = machine.start_job(CRASH)
        while sum(line.startswith("SYNCED ") for line in job.output) < SYNCED_FILES:
            if job.next_line(120) is None:
                raise VMError("the guest's writer ended: %s" % "\n".join(job.output))
        time.sleep(random.uniform(0, 1))    # anywhere in a round, not always behind a sync
        in_flight = machine.qmp("query-blockstats")[0]["stats"]
        machine.kill()
        synced = [line.split()[1:] for line in job.lines_so_far() if line.startswith("SYNCED ")]
    say("kill -9", "in the middle of writes, %d files synced, %s written since boot"
        % (len(synced), mib(in_flight["wr_bytes"])))
    say("check", "after the kill: " + check(image))

    machine, _ = boot(3, image, template)
    with machine:
        replay = machine.run("dmesg | grep -E 'EXT4-fs .*recover' | cut -d] -f2- || true")
        if "recovery complete" not in replay:
            raise VMError("the guest's ext4 journal was not replayed: the kill hit nothing\n" + replay)
        say("replay", replay.splitlines()[-1].strip())
        lost = machine.run("cd /fvd-crash\nwhile read -r name sum; do\n"
                           "  [ \"$(sha256sum <$name | cut -d' ' -f1)\" = $sum ] || echo $name\ndone <<'END'\n%s\nEND"
                           % "\n".join(" ".join(pair) for pair in synced), 180)
        if lost:
            raise VMError("synced before the kill, wrong or lost now: " + lost)
        if machine.run(CHECKSUM, 180) != checksum:
            raise VMError("the first files' checksum changed by the kill")
        say("verify", "%d of %d synced files intact, the first files' checksum the same" % (len(synced), len(synced)))
        machine.poweroff()
    say("fsck", "e2fsck -fn: " + fsck(image, raw))
    say("check", check(image))
    say("image", "%s in %s" % (mib(allocated(image)), os.path.relpath(image)))
    say("all well", "%.0f s" % (time.monotonic() - begin))


def interactive():
    template = guest.template()
    image = os.path.join(RUN_DIR, "vm." + FORMAT)
    if not os.path.exists(image):
        create(image, template)
    accel = guest.accel()
    command = [guest.qemu_binary(), "-machine", "pc", *guest.accel_args(accel),
               "-m", os.environ.get("VM_MEMORY", "512"), "-smp", os.environ.get("VM_SMP", "1"),
               "-display", "none", "-vga", "none", "-net", "none", "-serial", "mon:stdio", "-serial", "null",
               *drive(image)]
    say("disk", os.path.relpath(image) + " stays for the next time; remove it to begin anew")
    say("console", "%s; root is logged in by itself; `poweroff` ends it, Ctrl-A X pulls the plug" % accel)
    sys.stdout.flush()
    os.execv(command[0], command)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.makedirs(RUN_DIR, exist_ok=True)
    try:
        if os.environ.get("INTERACTIVE", "0") not in ("", "0"):
            interactive()
        else:
            checks()
    except VMError as error:
        print("run-vm: FAILED: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run-vm: interrupted", file=sys.stderr)
        return 130
    return 0


sys.exit(main())
