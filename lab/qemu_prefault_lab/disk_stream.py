# SPDX-License-Identifier: GPL-2.0-or-later
"""A stream of bytes between L0 and L1 through a disk that both can write.

Bochs emulates no virtio devices, and its serial lines transfer 11 KiB per second. The lab therefore
transfers data through a small raw disk. Each end writes records into its own ring on this disk. The
serial line COM2 only rings a doorbell: a byte on this line means that the other end must look for
new records or for free space. A lost doorbell delays the data, but does not lose data, because each
end also looks and rings once a second.

This module runs at both ends, so it uses only the standard library. L1 opens the disk with
O_DIRECT, because its page cache would hide L0's writes. All reads and writes therefore use whole
sectors and aligned buffers.

====================  ==========================================================================
sector                content
====================  ==========================================================================
0                     :data:`MAGIC` and the stream's random name
8 and 16              the number of sectors that L1 and L0 have read
64 to 8255            the ring with L0's records
8256 to 16447         the ring with L1's records
====================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import zlib
from typing import Final

MAGIC: Final = b"lab disk stream\n"
NAME_LENGTH: Final = 16
SECTOR: Final = 512
RING_SECTORS: Final = 8192
_RINGS: Final = (64, 64 + RING_SECTORS)
_COUNTERS: Final = (8, 16)
DISK_SECTORS: Final = 64 + 2 * RING_SECTORS

L0: Final = 0
L1: Final = 1

# The stream's name, the record's number, the payload's length and the payload's CRC-32. The name
# and the number distinguish a record from older data at the same place.
_HEADER: Final = struct.Struct("!16sQII")
_COUNTER: Final = struct.Struct("!16sQI")
_RECORD_BYTES: Final = (1 << 17) - _HEADER.size
_RECORD_SECTORS: Final = (1 << 17) // SECTOR
# The number of sectors to read before the record's length is known.
_FIRST_SECTORS: Final = 8
_WAITING_BYTES: Final = 1 << 20


def _sectors(payload: int) -> int:
    return -(-(_HEADER.size + payload) // SECTOR)


class DiskStream:
    """One end of a stream.

    :param disk: The file descriptor of the disk.
    :param end: :data:`L0` or :data:`L1`.
    """

    def __init__(self, disk: int, end: int) -> None:
        self._disk = disk
        self._buffer = mmap.mmap(-1, _RECORD_SECTORS * SECTOR)
        self._view = memoryview(self._buffer)
        self._own_ring, self._other_ring = _RINGS[end], _RINGS[1 - end]
        self._own_counter, self._other_counter = _COUNTERS[1 - end], _COUNTERS[end]
        # The numbers of sectors and records since the stream was created. _reported and _released
        # are the numbers of read sectors that this end has reported, and the other end.
        self._written = self._records_written = 0
        self._read = self._records_read = 0
        self._reported = self._released = 0
        self._load(0, 1)
        if self._buffer[: len(MAGIC)] != MAGIC:
            raise ValueError("this disk has no stream")
        self._name = self._buffer[len(MAGIC) : len(MAGIC) + NAME_LENGTH]

    def state(self) -> list[int]:
        """Return the state of this end, for a snapshot. No data may be in transit."""
        return [self._written, self._records_written, self._read, self._records_read,
                self._reported, self._released]  # fmt: skip

    def resume(self, state: list[int]) -> None:
        """Continue with the state of this end in a snapshot."""
        (self._written, self._records_written, self._read, self._records_read,
         self._reported, self._released) = state  # fmt: skip

    def put(self, payload: bytes) -> None:
        """Write a record. :meth:`has_room` must have returned True."""
        header = _HEADER.pack(self._name, self._records_written, len(payload), zlib.crc32(payload))
        self._buffer[: len(header)] = header
        self._buffer[len(header) : len(header) + len(payload)] = payload
        count = _sectors(len(payload))
        start = self._written % RING_SECTORS
        before_end = min(count, RING_SECTORS - start)
        # Write the part with the header last. The checksum detects a part of a record, too.
        if before_end < count:
            self._store(self._own_ring, before_end, count)
        self._store(self._own_ring + start, 0, before_end)
        self._written += count
        self._records_written += 1

    def has_room(self) -> bool:
        """Return whether the ring has room for a record of any length."""
        limit = RING_SECTORS - _RECORD_SECTORS
        if self._written - self._released > limit:
            self._load(self._other_counter, 1)
            name, count, checksum = _COUNTER.unpack_from(self._buffer)
            if name == self._name and checksum == zlib.crc32(b"%d" % count):
                self._released = count
        return self._written - self._released <= limit

    def take(self) -> bytes | None:
        """Read the next record, or return None if it is not complete yet."""
        start = self._read % RING_SECTORS
        before_end = RING_SECTORS - start
        first = min(_FIRST_SECTORS, before_end)
        self._load(self._other_ring + start, first)
        name, number, length, checksum = _HEADER.unpack_from(self._buffer)
        if name != self._name or number != self._records_read or length > _RECORD_BYTES:
            return None
        count = _sectors(length)
        if count > first:
            self._load(self._other_ring + start, min(count, before_end))
            if count > before_end:
                self._load(self._other_ring, count - before_end, before_end)
        payload = self._buffer[_HEADER.size : _HEADER.size + length]
        if zlib.crc32(payload) != checksum:
            return None
        self._read += count
        self._records_read += 1
        return payload

    def report(self) -> bool:
        """Release the sectors that were read, if they are many. Return whether they are."""
        if self._read - self._reported < RING_SECTORS // 4:
            return False
        counter = _COUNTER.pack(self._name, self._read, zlib.crc32(b"%d" % self._read))
        self._buffer[: len(counter)] = counter
        self._store(self._own_counter, 0, 1)
        self._reported = self._read
        return True

    def _load(self, sector: int, count: int, at: int = 0) -> None:
        """Read sectors into the buffer, to the position ``at`` (in sectors)."""
        view = self._view[at * SECTOR : (at + count) * SECTOR]
        done = 0
        while done < len(view):
            done += os.preadv(self._disk, [view[done:]], sector * SECTOR + done)

    def _store(self, sector: int, first: int, last: int) -> None:
        """Write the buffer's sectors from ``first`` to ``last`` (exclusive)."""
        view = self._view[first * SECTOR : last * SECTOR]
        done = 0
        while done < len(view):
            done += os.pwritev(self._disk, [view[done:]], sector * SECTOR + done)


def create(path: str, name: bytes, size: int) -> None:
    """Create the file of a disk with this size, which must be at least DISK_SECTORS sectors."""
    with open(path, "xb") as file:
        file.truncate(size)
        file.write(MAGIC + name)


class Bridge:
    """Connects a socket to a stream.

    :param near: The socket.
    :param bell: The file descriptor of the serial line, which must be non-blocking.
    """

    def __init__(self, near: socket.socket, stream: DiskStream, bell: int) -> None:
        near.setblocking(False)
        self._near = near
        self._stream = stream
        self._bell = bell
        self._waiting = bytearray()
        self._poll = select.poll()
        self._poll.register(bell, select.POLLIN)
        self._poll.register(near, 0)

    def register(self, fd: int) -> None:
        """Let :meth:`step` also wait until this file descriptor is readable."""
        self._poll.register(fd, select.POLLIN)

    def step(self) -> set[int] | None:
        """Wait up to a second and transfer data.

        :returns: The file descriptors that are ready, or None if the socket's peer has closed it.
        """
        room = self._stream.has_room()
        wanted = select.POLLIN if room else 0
        wanted |= select.POLLOUT if self._waiting else 0
        self._poll.modify(self._near, wanted)
        ready = dict(self._poll.poll(1000))
        if not ready:
            self._ring()
        if self._bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._bell, 4096)
        mask = ready.get(self._near.fileno(), 0)
        if mask & select.POLLHUP:
            return None
        if mask & select.POLLIN:
            self._stream.put(self._near.recv(_RECORD_BYTES))
            self._ring()
        while len(self._waiting) < _WAITING_BYTES and (payload := self._stream.take()) is not None:
            self._waiting += payload
            if self._stream.report():
                self._ring()
        if self._waiting:
            with contextlib.suppress(BlockingIOError):
                del self._waiting[: self._near.send(self._waiting)]
        return set(ready)

    def _ring(self) -> None:
        # If the line's buffer is full, the other end will look anyway.
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell, b"\1")
