# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the QEMU tests share: the programs, one line per check, QMP, an NBD client.

Python's standard library only.

Environment: BIN_DIR (programs under test, default build/bin), TMPDIR, KEEP=1 (keep the
scratch folder; KEEP=failed: if a test fails), SEED (repeat a random run), VERBOSE=1 (every command).
"""

import glob
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.path.abspath(os.environ.get("BIN_DIR") or os.path.join(TOP, "build/bin"))
VERBOSE = os.environ.get("VERBOSE") == "1"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SECTOR = 512


class Failure(Exception):
    """A check that did not hold; the text says which."""


class Skip(Exception):
    """This machine cannot do what the test needs; the text says what."""


def program(name):
    path = os.path.join(BIN, name)
    if not os.access(path, os.X_OK):
        sys.exit("no %s (make build makes it)" % path)
    return path


class Suite:
    """Counts and prints; `with suite.test(name):` is one test."""

    def __init__(self, name):
        self.name = name
        self.passed = self.failed = self.skipped = 0
        self.seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))
        self.random = random.Random(self.seed)
        self.dir = tempfile.mkdtemp(prefix="qtest-%s-" % name)
        self.started = time.monotonic()

    def test(self, name):
        return _Test(self, name)

    def path(self, name):
        return os.path.join(self.dir, name)

    def finish(self):
        if os.environ.get("KEEP") == "1" or self.failed and os.environ.get("KEEP") == "failed":
            print("# kept: %s" % self.dir)
        else:
            shutil.rmtree(self.dir, ignore_errors=True)
        print("# %s: seed %d, %.0f s" % (self.name, self.seed, time.monotonic() - self.started))
        print("%d passed, %d failed, %d skipped" % (self.passed, self.failed, self.skipped))
        sys.exit(1 if self.failed or not self.passed else 0)


class _Test:
    def __init__(self, suite, name):
        self.suite, self.name = suite, name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.suite.passed += 1
            print("ok - %s" % self.name, flush=True)
            return True
        if issubclass(kind, Skip):
            self.suite.skipped += 1
            print("skip - %s: %s" % (self.name, error), flush=True)
            return True
        if issubclass(kind, Exception):
            self.suite.failed += 1
            print("not ok - %s\n#   %s" % (self.name, str(error or repr(error)).replace("\n", "\n#   ")), flush=True)
            if kind is not Failure:
                import traceback
                print("#   " + "".join(traceback.format_exception(kind, error, trace)).replace("\n", "\n#   "))
            return True
        return False


def check(condition, text, *args):
    if not condition:
        raise Failure(text % args if args else text)


def quote(words):
    return " ".join(w if w and not set(w) & set(" \"'$;&|(){}*") else "'%s'" % w for w in words)


def run(*words, status=0, timeout=120, cwd=None, text_in=None):
    """Runs one of our programs; its output (both streams). Another status than wanted fails.

    status: a number, a tuple of them, or None for "any but 0 and no signal".
    """
    words = list(words)
    words[0] = program(words[0]) if os.sep not in words[0] else words[0]
    if VERBOSE:
        print("# $ " + quote(words), flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, cwd=cwd,
                          input=text_in, stdin=None if text_in is not None else subprocess.DEVNULL,
                          text=True, errors="replace")
    got = done.returncode
    fine = got > 0 if status is None else got in (status if isinstance(status, tuple) else (status,))
    check(fine, "%s: exit status %s\n%s", quote([os.path.basename(words[0])] + words[1:]), got, done.stdout[-3000:])
    return done.stdout


def run_json(*words, **more):
    """As run(), for a program that prints JSON."""
    out = run(*words, **more)
    try:
        return json.loads(out[min(i for i in (out.find("{"), out.find("[")) if i >= 0):])
    except ValueError as error:
        raise Failure("%s: no JSON (%s):\n%s" % (quote(words), error, out[:1000]))


def img(*words, **more):
    return run("qemu-img", *words, **more)


def io(path, *commands, fmt="fvd", args=(), status=0, opts=None, **more):
    """qemu-io: runs the commands; a pattern that does not match fails, whatever the exit status."""
    words = ["qemu-io", *args]
    for command in commands:
        words += ["-c", command]
    if opts is not None:
        words += ["--image-opts", opts]
    else:
        words += ["-f", fmt, path]
    out = run(*words, status=status, **more)
    check("Pattern verification failed" not in out, "%s\n%s", quote(words), out[-2000:])
    # An asynchronous request that fails shows in the text only.
    check(status != 0 or " failed: " not in out, "%s\n%s", quote(words), out[-2000:])
    return out


def check_clean(path):
    """qemu-img check finds nothing, neither damage nor leaks."""
    img("check", "-q", "-f", "fvd", path)


def check_sound(path):
    """qemu-img check finds no damage; a crash may have left space (C6)."""
    img("check", "-q", "-f", "fvd", path, status=(0, 3))


def check_leaks(path, largest_write):
    """What a crash left is one growth step of which no record became stable, as long as writes of so
    many bytes make one, and in a flat image nothing (C6)."""
    leaked = run_json("fvd", "check", "--output", "json", path, status=(0, 3))["leaked-bytes"]
    info = run_json("fvd", "info", "--output", "json", path)["format-specific"]["data"]
    unit, limit = info.get("storage-grow-unit", 0), 0
    if unit:
        limit = -(-(largest_write + 2 * info["chunk-size"]) // unit) * unit
    check(leaked <= limit, "%d bytes are leaked, %d may be", leaked, limit)


def check_gets_leaks_back(path):
    """What a crash left is given back, and then nothing is found."""
    img("check", "-q", "-r", "leaks", "-f", "fvd", path)
    check_clean(path)


def direct_io(folder):
    """Does the file system take O_DIRECT?"""
    path = os.path.join(folder, "direct-probe")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT))
        return True
    except OSError:
        return False
    finally:
        if os.path.exists(path):
            os.unlink(path)


def guest_module():
    """scripts/guest/vm.py, to boot the template with; Skip if it is not in the cache and GUEST is not 1."""
    wanted = os.environ.get("GUEST")
    if wanted == "0":
        raise Skip("GUEST=0")
    sys.path.insert(0, os.path.join(TOP, "scripts/guest"))
    os.environ.setdefault("QEMU", os.path.join(BIN, "qemu-system-x86_64"))
    os.environ.setdefault("QEMU_IMG", os.path.join(BIN, "qemu-img"))
    import vm
    if wanted != "1" and not os.environ.get("TEMPLATE") and not glob.glob(os.path.join(vm.cache_dir(), "template-*.raw")):
        raise Skip("no template in the cache (GUEST=1 makes one)")
    return vm


def wait_for(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, "%s did not happen in %g s", what, seconds)
        time.sleep(0.01)


class QMP:
    """A QMP connection over a socket we hold."""

    def __init__(self, sock, timeout=60):
        sock.settimeout(timeout)
        # Not "rw": a text file of both forgets, at a write, what it has read ahead; that may be an event.
        self.file = sock.makefile("r")
        self.sock = sock
        self.events = []
        self._read()
        self("qmp_capabilities")

    def _read(self):
        line = self.file.readline()
        if not line:
            raise EOFError("QMP closed")
        return json.loads(line)

    def raw(self, name, /, **arguments):
        """The whole answer, be it return or error; '_' in names stands for '-'."""
        request = {"execute": name}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        if VERBOSE:
            print("# -> " + json.dumps(request), flush=True)
        self.sock.sendall((json.dumps(request) + "\n").encode())
        while True:
            message = self._read()
            if "event" in message:
                self.events.append(message)
            else:
                if VERBOSE and "error" in message:
                    print("# <- " + json.dumps(message), flush=True)
                return message

    def __call__(self, name, /, **arguments):
        message = self.raw(name, **arguments)
        check("error" not in message, "QMP %s %s: %s", name, json.dumps(arguments), message.get("error", {}).get("desc"))
        return message["return"]

    def error(self, name, /, **arguments):
        """The text of the error that must come."""
        message = self.raw(name, **arguments)
        check("error" in message, "QMP %s %s did not fail", name, json.dumps(arguments))
        return message["error"]["desc"]

    def job(self, name, /, seconds=60, dismiss=True, **arguments):
        """Starts a job, completes it if it waits for that; Failure with its error."""
        ident = arguments.setdefault("job_id", "job%d" % len(self.events))
        self(name, **arguments)
        self.wait_job(ident, seconds, dismiss)

    def wait_job(self, ident, seconds=60, dismiss=True):
        deadline = time.monotonic() + seconds
        while True:
            jobs = [j for j in self("query-jobs") if j["id"] == ident]
            if not jobs:
                # Gone by itself: its last event tells how.
                for event in self.events[::-1]:
                    if event["event"] == "BLOCK_JOB_COMPLETED" and event["data"]["device"] == ident:
                        check("error" not in event["data"], "job %s: %s", ident, event["data"].get("error"))
                        return
                raise Failure("job %s is gone" % ident)
            if jobs[0]["status"] == "ready":
                try:
                    self("job-complete", id=ident)
                except Failure:
                    # One that failed meanwhile says why below.
                    if any(j["id"] == ident and j["status"] == "ready" for j in self("query-jobs")):
                        raise
                    continue
            if jobs[0]["status"] == "concluded":
                if dismiss:
                    self("job-dismiss", id=ident)
                check("error" not in jobs[0], "job %s: %s", ident, jobs[0].get("error"))
                return
            check(time.monotonic() < deadline, "job %s is still %s", ident, jobs[0]["status"])
            time.sleep(0.02)

    def create(self, seconds=60, **options):
        """blockdev-create; a failed job is a Failure with its text."""
        ident = "create"
        self("blockdev-create", job_id=ident, options=options)
        self.wait_job(ident, seconds)

    def node(self, name):
        for node in self("query-named-block-nodes"):
            if node.get("node-name") == name:
                return node
        raise Failure("no node '%s'" % name)


class Daemon:
    """qemu-storage-daemon with QMP; ends with the block that holds it."""

    def __init__(self, *args, stderr=None):
        self.args = args
        ours, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile("w+")
        words = [program("qemu-storage-daemon"), "--chardev", "socket,id=qmp,fd=%d" % theirs.fileno(),
                 "--monitor", "chardev=qmp", *args]
        if VERBOSE:
            print("# $ " + quote(words), flush=True)
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                                        pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            self.qmp = QMP(ours)
        except (EOFError, OSError):
            self.process.wait(30)
            raise Failure("qemu-storage-daemon does not start: %s" % self.text())

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def quit(self):
        """Orderly end; a bad status or a sanitizer's word on stderr fails."""
        self.qmp("quit")
        status = self.process.wait(60)
        check(status == 0, "qemu-storage-daemon ended with %s: %s", status, self.text())
        return self.text()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.process.poll() is None:
            if kind is None:
                self.quit()
            else:
                self.kill()
        elif self.process.returncode != 0 and kind is not None and not issubclass(kind, Skip):
            # The test fails because of this: say so instead of "QMP closed".
            raise Failure("qemu-storage-daemon ended with %s: %s\n(%s)" % (self.process.returncode, self.text(), error))
        return False


class Loop:
    """A loop device over a file of old bytes; grow() enlarges both."""

    def __init__(self, path, size, *options):
        if os.geteuid() != 0:
            raise Skip("needs root (loop devices)")
        self.file = path
        with open(self.file, "wb") as f:
            for at in range(0, size, MIB):
                f.write(b"\xd7" * min(MIB, size - at))
        done = subprocess.run(["losetup", "--show", "-f", *options, self.file], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise Skip("losetup: %s" % done.stderr.strip())
        self.device = done.stdout.strip()

    def grow(self, by):
        with open(self.file, "ab") as f:
            f.write(b"\xd7" * by)
        subprocess.run(["losetup", "-c", self.device], check=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        subprocess.run(["losetup", "-d", self.device], check=False)
        os.unlink(self.file)


class NBDError(Exception):
    def __init__(self, code):
        super().__init__("NBD error %d" % code)
        self.code = code


class NBD:
    """One connection of an NBD client, many requests in flight, from any thread.

    request() returns a Pending; its wait() gives the data (reads) or b"", raises NBDError
    for an answer with an error and EOFError when the connection broke first.
    """

    READ, WRITE, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 3, 4, 6
    FUA, NO_HOLE = 1, 2

    class Pending:
        __slots__ = ("event", "error", "data", "length", "on_done")

        def wait(self, seconds=120):
            if not self.event.wait(seconds):
                raise Failure("NBD: no answer in %g s" % seconds)
            if self.error is None:
                return self.data
            if self.error < 0:
                raise EOFError("NBD connection broke")
            raise NBDError(self.error)

    def __init__(self, path, name):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect(path)
        magic, version, flags = struct.unpack(">QQH", self._get(18))
        if magic != 0x4E42444D41474943 or version != 0x49484156454F5054:
            raise Failure("not an NBD server")
        self.sock.sendall(struct.pack(">I", 3))                 # fixed newstyle, no zeroes
        body = struct.pack(">I", len(name)) + name.encode() + struct.pack(">H", 0)
        self.sock.sendall(struct.pack(">QII", version, 7, len(body)) + body)     # NBD_OPT_GO
        self.size = None
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._get(20))
            data = self._get(length)
            if kind == 1:
                break
            if kind & 0x80000000:
                raise Failure("NBD: export '%s': error %x %s" % (name, kind, data.decode(errors="replace")))
            if kind == 3 and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:12])
        self._lock = threading.Lock()
        self._pending = {}
        self._next = 1
        self._dead = False
        self._thread = threading.Thread(target=self._reader, daemon=True)
        self._thread.start()

    def _get(self, length):
        data = bytearray()
        while len(data) < length:
            more = self.sock.recv(min(length - len(data), 1 << 20))
            if not more:
                raise EOFError("NBD connection broke")
            data += more
        return bytes(data)

    def _reader(self):
        try:
            while True:
                _, error, cookie = struct.unpack(">IIQ", self._get(16))
                with self._lock:
                    pending = self._pending.pop(cookie)
                data = self._get(pending.length) if pending.length and not error else b""
                self._finish(pending, error or None, data)
        except (OSError, EOFError, KeyError):
            with self._lock:
                self._dead = True
                left, self._pending = self._pending, {}
            for pending in left.values():
                self._finish(pending, -1, b"")

    @staticmethod
    def _finish(pending, error, data):
        pending.error, pending.data = error, data
        if pending.on_done:
            pending.on_done(pending)
        pending.event.set()

    def request(self, kind, offset=0, length=0, data=b"", flags=0, on_done=None):
        pending = NBD.Pending()
        pending.event, pending.on_done = threading.Event(), on_done
        pending.error = pending.data = None
        pending.length = length if kind == self.READ else 0
        with self._lock:
            if not self._dead:
                cookie = self._next
                self._next += 1
                self._pending[cookie] = pending
                head = struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, len(data) or length)
                try:
                    self.sock.sendall(head + data)
                    return pending
                except OSError:
                    self._pending.pop(cookie, None)
        self._finish(pending, -1, b"")
        return pending

    def read(self, offset, length):
        return self.request(self.READ, offset, length).wait()

    def write(self, offset, data, flags=0):
        self.request(self.WRITE, offset, data=data, flags=flags).wait()

    def flush(self):
        self.request(self.FLUSH).wait()

    def close(self):
        try:
            self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()
        self._thread.join(10)


def stamp(sector, number):
    """512 bytes that say where and when they were written; number 0 is a sector of zeroes."""
    if number == 0:
        return bytes(SECTOR)
    return struct.pack("<QQ", sector, number) * (SECTOR // 16)


def stamps(first, count, number):
    return b"".join(stamp(first + i, number) for i in range(count))


def read_stamp(data, sector):
    """The number of a sector, 0 for zeroes; Failure if it is torn or from elsewhere."""
    if data == bytes(SECTOR):
        return 0
    where, number = struct.unpack_from("<QQ", data)
    check(where == sector and data == data[:16] * (SECTOR // 16),
          "sector %d holds foreign or torn data: %s ... %s", sector, data[:16].hex(), data[-16:].hex())
    return number
