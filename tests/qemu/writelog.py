# SPDX-License-Identifier: MIT OR Apache-2.0
"""Replays what QEMU's `blklogwrites` recorded, up to any point, with losses a power cut may bring.

The log (that of Linux's dm-log-writes, little-endian): sector 0 is the superblock - magic,
version, number of entries, sector size. Then entry after entry: one sector that begins with
sector, nr_sectors, flags, data_len; then nr_sectors of data, but none for a discard.

QEMU appends an entry when the operation on the file is complete, so the order is that of
completion. What the log cannot tell: when a request began. A write that completed while a
flush was under way stands before that flush and counts as covered by it, though a real disk
may lose it; the simulator (docs/simulator.md) has that case. Changes of the file's length are
not recorded: the replayed file grows to its highest write.

Python's standard library only.
"""

import struct

MAGIC, VERSION = 0x6A736677736872, 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
PIECE = 512             # what a power cut leaves whole


class LogError(Exception):
    """Not a log that blklogwrites writes."""


class Entry:
    """One operation: data is None for discards; start and end are places in the log file."""

    __slots__ = ("offset", "length", "flags", "data", "start", "end")

    def __init__(self, offset, length, flags, data, start, end):
        self.offset, self.length, self.flags, self.data = offset, length, flags, data
        self.start, self.end = start, end

    @property
    def flush(self):
        return bool(self.flags & FLUSH)

    @property
    def changes(self):
        return self.length > 0

    def pieces(self):
        return (self.length + PIECE - 1) // PIECE

    def __repr__(self):
        kind = "flush" if self.flush else "discard" if self.flags & DISCARD else "write"
        return "%s%s %d+%d" % (kind, " FUA" if self.flags & FUA else "", self.offset, self.length)


def parse(path):
    """All entries of a log whose writer has ended."""
    with open(path, "rb") as f:
        log = f.read()
    if len(log) < 28:
        raise LogError("no superblock")
    magic, version, count, size = struct.unpack_from("<QQQI", log)
    if magic != MAGIC or version != VERSION:
        raise LogError("magic %x, version %d" % (magic, version))
    if size < PIECE or size & (size - 1):
        raise LogError("sector size %d" % size)
    entries = []
    at = size
    while at < len(log):
        sector, sectors, flags, data_len = struct.unpack_from("<QQQQ", log, at)
        if flags & ~(FLUSH | FUA | DISCARD) or data_len or any(log[at + 32:at + size]):
            raise LogError("entry %d at %d: flags %x, data_len %d" % (len(entries), at, flags, data_len))
        if not sectors and not flags & FLUSH:
            raise LogError("entry %d at %d is empty" % (len(entries), at))
        end = at + size
        data = None
        if not flags & DISCARD:
            data = memoryview(log)[end:end + sectors * size]
            end += sectors * size
            if end > len(log):
                raise LogError("entry %d is cut off" % len(entries))
        entries.append(Entry(sector * size, sectors * size, flags, data, at, end))
        at = end
    # The superblock is written at each flush (and every 4096 entries), so it may lag behind.
    if count > len(entries) or any(e.flush for e in entries[count:]):
        raise LogError("the superblock says %d entries, there are %d" % (count, len(entries)))
    return entries


def apply(image, entry, survives=None):
    """Does to image (a bytearray) what entry did; survives: for each 512 bytes, whether it is kept."""
    end = entry.offset + entry.length
    if not entry.changes or (survives is not None and not any(survives)):
        return
    if entry.data is not None and end > len(image):
        image.extend(bytes(end - len(image)))
    data = entry.data if entry.data is not None else bytes(max(0, min(end, len(image)) - entry.offset))
    if survives is None:
        image[entry.offset:entry.offset + len(data)] = data
        return
    for i, kept in enumerate(survives):
        piece = data[i * PIECE:(i + 1) * PIECE]
        if kept and len(piece):
            image[entry.offset + i * PIECE:entry.offset + i * PIECE + len(piece)] = piece


class Replay:
    """Walks a log forwards; keeps what is durable, and what was done since the last flush."""

    def __init__(self, start, entries):
        self.stable = bytearray(start)
        self.entries = entries
        self.at = 0
        self.flushed = 0        # entries that are in stable

    def to(self, count):
        """The first count entries happened."""
        assert count >= self.at
        for number in range(self.at, count):
            if self.entries[number].flush:
                # A flush flag on a write means: flushed first, then written.
                for entry in self.entries[self.flushed:number]:
                    apply(self.stable, entry)
                self.flushed = number
        self.at = count

    def open_entries(self):
        """What a power cut may lose, in the order of completion."""
        return [e for e in self.entries[self.flushed:self.at] if e.changes]

    def image(self, fate=None):
        """The file after the cut. fate(number, entry): None whole, else a list for Entry.pieces().

        Survivors are applied in their order of completion: of two writes to one place the older
        cannot win, as a disk's cache holds one content for each place.
        """
        image = bytearray(self.stable)
        for number, entry in enumerate(self.open_entries()):
            apply(image, entry, None if fate is None or entry.flags & FUA else fate(number, entry))
        return image
