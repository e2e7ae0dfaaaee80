# SPDX-License-Identifier: MIT OR Apache-2.0
"""Start the template guest and script it: marker, commands, QMP, SIGKILL.

Python's standard library only. The guest's side is rootfs/usr/local/sbin/fvd-agent;
its head comment holds the protocol. All connections are socket pairs handed to QEMU
by file descriptor, so nothing is left behind on disk and no path can be too long.

    with VM(["-drive", "file=vm.fvd,format=fvd,if=virtio"]) as vm:
        vm.wait_marker()
        print(vm.run("uname -a"))
        vm.poweroff()

Environment: TEMPLATE (raw), QEMU (qemu-system-x86_64), QEMU_IMG, ACCEL=kvm|tcg (no probe),
VM_MEMORY (MiB), VM_SMP, VM_BOOT_TIMEOUT (s), VM_VERBOSE=1 (guest console on stderr).
"""

import base64
import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
MARKER = re.compile(r"FVD-GUEST-READY uptime=([0-9.]+)")
# TCG on a busy machine; a hang is still found.
BOOT_TIMEOUT = int(os.environ.get("VM_BOOT_TIMEOUT", "240"))
# Longest request line: the guest's tty buffer has room for it even if bash is slow.
REQUEST_MAX = 3000


class VMError(Exception):
    """Something the guest or QEMU did not do; the text says what."""


def qemu_binary():
    return os.environ.get("QEMU") or os.path.join(TOP, "build/bin/qemu-system-x86_64")


def qemu_img_binary():
    return os.environ.get("QEMU_IMG") or os.path.join(TOP, "build/bin/qemu-img")


def cache_dir():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(base, "libfvd")
    os.makedirs(path, exist_ok=True)
    return path


def template():
    """Path of the template disk, made on first use; TEMPLATE names one of the same kind."""
    if os.environ.get("TEMPLATE"):
        return os.path.abspath(os.environ["TEMPLATE"])
    script = os.path.join(os.path.dirname(HERE), "make-template.sh")
    done = subprocess.run([script], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise VMError("make-template.sh failed")
    return done.stdout.strip().splitlines()[-1]


def qemu_img(*args):
    """Run qemu-img, return what it printed; VMError with its message on failure."""
    try:
        done = subprocess.run([qemu_img_binary(), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace")
    except OSError as error:
        raise VMError("%s: %s (make build makes it)" % (qemu_img_binary(), error.strerror))
    if done.returncode != 0:
        raise VMError("qemu-img %s: exit status %d\n%s" % (" ".join(args), done.returncode, done.stdout.rstrip()))
    return done.stdout


def accel_args(accel):
    # Nothing in the guest wants five page table levels or KVM, both slow it down.
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg", "-cpu", "max,la57=off,svm=off"]


_accel = None


def accel():
    """'kvm' where the template really boots under it, else 'tcg'.

    /dev/kvm alone says little (nested and software virtualisation often cannot run a
    stock kernel), so the template is started once; the answer holds until the next boot
    of this machine and for this QEMU.
    """
    global _accel
    if _accel:
        return _accel
    wanted = os.environ.get("ACCEL")
    if wanted:
        if wanted not in ("kvm", "tcg"):
            raise VMError("ACCEL must be kvm or tcg, not '%s'" % wanted)
        _accel = wanted
        return _accel
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        _accel = "tcg"
        return _accel
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot_id = f.read().strip()
    answer_file = os.path.join(cache_dir(), "kvm-probe-%d" % os.getuid())
    key = "%s %d %s" % (boot_id, int(os.stat(qemu_binary()).st_mtime), os.path.abspath(qemu_binary()))
    with contextlib.suppress(OSError, ValueError):
        with open(answer_file) as f:
            answer, seen = f.read().strip().split(" ", 1)
        if seen == key and answer in ("kvm", "tcg"):
            _accel = answer
            return _accel
    print("probing KVM (20 s at most) ...", file=sys.stderr, flush=True)
    _accel = "tcg"
    vm = VM(["-drive", "file=%s,format=raw,if=virtio,snapshot=on" % template()], accel_name="kvm", verbose=False)
    try:
        with vm:
            vm.wait_marker(20)
            _accel = "kvm"
    except VMError:
        pass
    temporary = "%s.%d" % (answer_file, os.getpid())
    with open(temporary, "w") as f:
        f.write("%s %s\n" % (_accel, key))
    os.replace(temporary, answer_file)
    return _accel


class Lines:
    """The lines that come out of one socket, read by a thread so that QEMU never waits."""

    def __init__(self, sock, on_line, echo=None):
        self._sock = sock
        self._on_line = on_line
        self._echo = echo
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        rest = b""
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                if rest:
                    self._on_line(rest.decode(errors="replace").rstrip("\r"))
                self._on_line(None)
                return
            if self._echo:
                self._echo(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._on_line(line.decode(errors="replace").rstrip("\r"))

    def join(self):
        self._thread.join(10)


class Job:
    """One command running in the guest; its output arrives line by line."""

    def __init__(self, vm, ident, command):
        self._vm = vm
        self._ident = ident
        self.command = command
        self.output = []
        self.status = None
        self._queue = queue.Queue()

    def _deliver(self, line, status=None):
        self._queue.put((line, status))

    def next_line(self, timeout=60):
        """The next line of output, or None once the command has ended."""
        if self.status is not None:
            return None
        try:
            line, status = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise VMError("guest: no output for %g s from: %s" % (timeout, self.command.strip()))
        if line is not None:
            self.output.append(line)
            return line
        if status is None:
            raise VMError("QEMU ended while the guest ran: %s" % self.command.strip())
        self.status = status
        return None

    def lines_so_far(self):
        """Output that has arrived by now, without waiting; also after the VM is dead."""
        with contextlib.suppress(queue.Empty):
            while True:
                line, _ = self._queue.get_nowait()
                if line is not None:
                    self.output.append(line)
        return self.output

    def wait(self, timeout=120):
        """Wait for the end; returns the exit status."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise VMError("guest: still running after %g s: %s" % (timeout, self.command.strip()))
            if self.next_line(left) is None:
                return self.status


class VM:
    """One QEMU process. Use as a context manager: leaving it ends the process."""

    def __init__(self, args, accel_name=None, memory=None, smp=None, console_log=None, verbose=None, qemu=None):
        self.args = list(args)
        self.accel = accel_name
        self.memory = memory or int(os.environ.get("VM_MEMORY", "512"))
        self.smp = smp or int(os.environ.get("VM_SMP", "1"))
        self.qemu = qemu or qemu_binary()
        self.console_log = console_log
        self.verbose = os.environ.get("VM_VERBOSE") == "1" if verbose is None else verbose
        self.process = None
        self.started_at = None
        self.marker_seconds = None      # from QEMU's start to the marker
        self.guest_uptime = None        # what the guest itself says
        self.console = []               # all console lines so far
        self.stderr = []
        self._changed = threading.Condition()
        self._console_open = True
        self._agent_ready = threading.Event()
        self._jobs = {}
        self._next_job = 1
        self._qmp_replies = queue.Queue()
        self.qmp_events = []
        self._log_file = None
        self._sockets = []

    # --- life -------------------------------------------------------------

    def start(self):
        if not os.access(self.qemu, os.X_OK):
            raise VMError("no QEMU at %s (make build makes it)" % self.qemu)
        accel_name = self.accel or accel()
        self.accel = accel_name
        ours, theirs = {}, {}
        for name in ("console", "agent", "qmp"):
            ours[name], theirs[name] = socket.socketpair()
        command = [
            self.qemu, "-name", "fvd-guest", "-machine", "pc", *accel_args(accel_name),
            "-m", str(self.memory), "-smp", str(self.smp), "-no-reboot",
            "-display", "none", "-vga", "none", "-net", "none", "-monitor", "none",
            "-chardev", "socket,id=console,fd=%d" % theirs["console"].fileno(), "-serial", "chardev:console",
            "-chardev", "socket,id=agent,fd=%d" % theirs["agent"].fileno(), "-serial", "chardev:agent",
            "-chardev", "socket,id=qmp,fd=%d" % theirs["qmp"].fileno(), "-mon", "chardev=qmp,mode=control",
            *self.args,
        ]
        self.command = command
        if self.console_log:
            self._log_file = open(self.console_log, "wb", buffering=0)
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            pass_fds=[s.fileno() for s in theirs.values()])
        for sock in theirs.values():
            sock.close()
        self._sockets = list(ours.values())
        self._agent_socket, self._qmp_socket = ours["agent"], ours["qmp"]
        self._readers = [
            Lines(ours["console"], self._console_line, self._console_bytes),
            Lines(ours["agent"], self._agent_line),
            Lines(ours["qmp"], self._qmp_line),
        ]
        self._stderr_thread = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_thread.start()
        self._qmp_started = False
        return self

    def __enter__(self):
        return self if self.process else self.start()

    def __exit__(self, *exc):
        self.kill()
        return False

    def kill(self):
        """SIGKILL, as a crash of the host process; returns once it is gone."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self._gone()

    def _gone(self, timeout=None):
        if not self.process:
            return None
        status = self.process.wait(timeout)
        self._stderr_thread.join(10)
        for reader in self._readers:
            reader.join()
        for sock in self._sockets:
            sock.close()
        if self._log_file:
            self._log_file.close()
            self._log_file = None
        return status

    def wait(self, timeout=60):
        """Wait until QEMU has ended by itself; VMError unless with status 0."""
        try:
            status = self._gone(timeout)
        except subprocess.TimeoutExpired:
            raise VMError("QEMU still runs after %g s\n%s" % (timeout, self.console_tail()))
        if status != 0:
            raise VMError("QEMU ended with status %d: %s" % (status, self.stderr_text()))

    def poweroff(self, timeout=120):
        """Orderly shutdown from within the guest, then QEMU's own end."""
        self._send("R %d %s\n" % (0, base64.b64encode(b"systemctl poweroff").decode()))
        self.wait(timeout)

    # --- console ----------------------------------------------------------

    def _console_bytes(self, data):
        if self._log_file:
            with contextlib.suppress(ValueError):
                self._log_file.write(data)
        if self.verbose:
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()

    def _console_line(self, line):
        with self._changed:
            if line is None:
                self._console_open = False
            else:
                self.console.append(line)
                found = MARKER.search(line)
                if found and self.marker_seconds is None:
                    self.marker_seconds = time.monotonic() - self.started_at
                    self.guest_uptime = float(found.group(1))
            self._changed.notify_all()

    def console_tail(self, count=25):
        lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc", "", line) for line in self.console[-count:]]
        return "--- end of the guest's console ---\n" + "\n".join(lines) + "\n---"

    def wait_marker(self, timeout=None):
        """Seconds from QEMU's start to the guest's marker on the console."""
        timeout = timeout or BOOT_TIMEOUT
        deadline = self.started_at + timeout
        with self._changed:
            while self.marker_seconds is None:
                if not self._console_open:
                    break
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise VMError("no marker from the guest after %g s (%s)\n%s"
                                  % (timeout, self.accel, self.console_tail()))
        if self.marker_seconds is None:
            status = self._gone(10)
            raise VMError("QEMU ended with status %s before the guest's marker: %s\n%s"
                          % (status, self.stderr_text(), self.console_tail()))
        if not self._agent_ready.wait(60):
            raise VMError("the guest's agent does not answer\n%s" % self.console_tail())
        return self.marker_seconds

    def _read_stderr(self):
        for line in self.process.stderr:
            text = line.decode(errors="replace").rstrip()
            self.stderr.append(text)
            if self.verbose:
                print("qemu: " + text, file=sys.stderr, flush=True)
        self.process.stderr.close()

    def stderr_text(self):
        return "\n".join(self.stderr) or "(no message)"

    # --- agent ------------------------------------------------------------

    def _send(self, text):
        try:
            self._agent_socket.sendall(text.encode())
        except OSError as error:
            raise VMError("QEMU is gone: %s; %s" % (error, self.stderr_text()))

    def _agent_line(self, line):
        if line is None:
            self._agent_ready.set()
            for job in list(self._jobs.values()):
                job._deliver(None)
            return
        if MARKER.search(line):
            self._agent_ready.set()
            return
        verb, _, rest = line.partition(" ")
        ident, _, text = rest.partition(" ")
        job = self._jobs.get(int(ident)) if ident.isdigit() else None
        if job is None:
            return
        if verb == "O":
            job._deliver(text)
        elif verb == "E":
            self._jobs.pop(int(ident))
            job._deliver(None, int(text))

    def start_job(self, command):
        """Start a bash script in the guest and return at once."""
        encoded = base64.b64encode(command.encode()).decode()
        if len(encoded) > REQUEST_MAX:
            self._upload(encoded)
            encoded = base64.b64encode(b"base64 -d /run/fvd-upload >/run/fvd-upload.sh && . /run/fvd-upload.sh").decode()
        return self._start(encoded, command)

    def _start(self, encoded, command):
        ident = self._next_job
        self._next_job += 1
        job = Job(self, ident, command)
        self._jobs[ident] = job
        self._send("R %d %s\n" % (ident, encoded))
        return job

    def _upload(self, encoded):
        """A script too long for one line goes over in pieces."""
        redirect = ">"
        for at in range(0, len(encoded), 2000):
            piece = "printf %%s '%s' %s/run/fvd-upload" % (encoded[at:at + 2000], redirect)
            if self._start(base64.b64encode(piece.encode()).decode(), piece).wait(60) != 0:
                raise VMError("guest: the upload of a script failed")
            redirect = ">>"

    def run(self, command, timeout=120):
        """Run a bash script in the guest; its output. VMError if its status is not 0."""
        job = self.start_job(command)
        status = job.wait(timeout)
        text = "\n".join(job.output)
        if status != 0:
            raise VMError("guest: exit status %d from: %s\n%s" % (status, command.strip(), text))
        return text

    # --- QMP --------------------------------------------------------------

    def _qmp_line(self, line):
        if line is None:
            self._qmp_replies.put({"error": {"desc": "QEMU closed QMP"}})
            return
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if "event" in message:
                self.qmp_events.append(message)
            elif "QMP" not in message:
                self._qmp_replies.put(message)

    def _qmp_command(self, name, arguments, timeout):
        request = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            self._qmp_socket.sendall((json.dumps(request) + "\n").encode())
            reply = self._qmp_replies.get(timeout=timeout)
        except (OSError, queue.Empty):
            raise VMError("QMP %s: no answer; %s" % (name, self.stderr_text()))
        if "error" in reply:
            raise VMError("QMP %s: %s" % (name, reply["error"]["desc"]))
        return reply["return"]

    def qmp(self, name, _timeout=60, **arguments):
        """One QMP command; '_' in argument names stands for '-'."""
        if not self._qmp_started:
            self._qmp_command("qmp_capabilities", None, _timeout)
            self._qmp_started = True
        return self._qmp_command(name, {k.replace("_", "-"): v for k, v in arguments.items()}, _timeout)


class ReadCounter:
    """Bytes QEMU reads from each file, from its own trace events.

    query-blockstats counts at the guest's device only (a backing node has no counters
    of its own), so the two events that name nodes and their reads are added up here.
    """

    EVENTS = ("bdrv_open_common", "bdrv_co_preadv_part")

    def __init__(self, log):
        self.log = log

    def args(self):
        args = ["-D", self.log]
        for event in self.EVENTS:
            args += ["-trace", event]
        return args

    def result(self, filename, driver="file"):
        """(requests, bytes) read by the nodes of this driver that hold this file."""
        wanted = os.path.realpath(filename)
        nodes = set()
        requests = total = opened = 0
        with open(self.log, errors="replace") as f:
            for line in f:
                found = re.search(r'bdrv_open_common bs (0x[0-9a-f]+) filename "(.*)" flags \S+ format_name "(.*)"', line)
                if found:
                    # Addresses are used again after a close: the last open counts.
                    nodes.discard(found.group(1))
                    if found.group(3) == driver and os.path.realpath(found.group(2)) == wanted:
                        nodes.add(found.group(1))
                        opened += 1
                    continue
                found = re.search(r"bdrv_co_preadv_part bs (0x[0-9a-f]+) offset \S+ bytes (\S+) flags", line)
                if found and found.group(1) in nodes:
                    requests += 1
                    total += int(found.group(2), 0)
        if not opened:
            raise VMError("QEMU's trace does not show %s being opened" % filename)
        return requests, total
