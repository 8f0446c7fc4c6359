# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the lab's stream of bytes through a disk (qemu_prefault_lab.disk_stream)."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault_lab.disk_stream import (
    DISK_SECTORS,
    L0,
    L1,
    RING_SECTORS,
    SECTOR,
    Bridge,
    DiskStream,
    create,
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    create(str(tmp_path / "disk"), os.urandom(16), DISK_SECTORS * SECTOR)
    fd = os.open(tmp_path / "disk", os.O_RDWR)
    yield fd
    os.close(fd)


def test_records_arrive_in_order(disk: int) -> None:
    near, far = DiskStream(disk, L0), DiskStream(disk, L1)
    payloads = [os.urandom(size) for size in (1, 487, 488, 489, 4096, 100_000)]
    for payload in payloads:
        near.put(payload)
    assert [far.take() for _ in payloads] == payloads
    assert far.take() is None
    assert near.take() is None


def test_records_wrap_at_the_end_of_the_ring(disk: int) -> None:
    near, far = DiskStream(disk, L1), DiskStream(disk, L0)
    sizes = random.Random(1)
    for _ in range(3 * RING_SECTORS // 100):
        payload = os.urandom(sizes.randrange(1, 131_000))
        assert near.has_room()
        near.put(payload)
        assert far.take() == payload
        far.report()


def test_full_ring_has_no_room_until_the_other_end_reports(disk: int) -> None:
    near, far = DiskStream(disk, L0), DiskStream(disk, L1)
    count = 0
    while near.has_room():
        near.put(b"%06d" % count + bytes(100_000))
        count += 1
    assert count > 30
    for number in range(count):
        payload = far.take()
        assert payload is not None
        assert payload.startswith(b"%06d" % number)
        far.report()
    assert near.has_room()


def test_incomplete_record_is_not_read(disk: int) -> None:
    near, far = DiskStream(disk, L0), DiskStream(disk, L1)
    near.put(os.urandom(10_000))
    offset = 64 * SECTOR + 5000
    written = os.pread(disk, 100, offset)
    os.pwrite(disk, bytes(100), offset)
    assert far.take() is None
    os.pwrite(disk, written, offset)
    assert far.take() is not None


def test_record_of_another_stream_is_not_read(disk: int) -> None:
    DiskStream(disk, L0).put(b"stale")
    os.pwrite(disk, os.urandom(16), 16)
    assert DiskStream(disk, L1).take() is None


def test_disk_without_a_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SECTOR))
    fd = os.open(tmp_path / "disk", os.O_RDWR)
    with pytest.raises(ValueError, match="no stream"):
        DiskStream(fd, L1)
    os.close(fd)


def test_resumed_end_continues(disk: int) -> None:
    near, far = DiskStream(disk, L0), DiskStream(disk, L1)
    near.put(b"before")
    far.put(b"answer")
    assert (far.take(), near.take()) == (b"before", b"answer")
    again = DiskStream(disk, L0)
    again.resume(near.state())
    again.put(b"after")
    far.put(b"answer 2")
    assert (far.take(), again.take()) == (b"after", b"answer 2")


class Ends:
    """Two bridges, each in a thread, and the sockets at their ends."""

    def __init__(self, disk: int, bells: tuple[int, int]) -> None:
        self.sockets: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        for end, bell in zip((L0, L1), bells, strict=True):
            os.set_blocking(bell, False)
            mine, other = socket.socketpair()
            mine.settimeout(60)
            self.sockets.append(mine)
            bridge = Bridge(other, DiskStream(disk, end), bell)
            self.threads.append(threading.Thread(target=self._run, args=(bridge,)))
            self.threads[-1].start()

    @staticmethod
    def _run(bridge: Bridge) -> None:
        while bridge.step() is not None:
            pass

    def close(self) -> None:
        for end in self.sockets:
            end.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def test_bridges_transfer_more_than_the_rings_hold(disk: int) -> None:
    bells = socket.socketpair()
    ends = Ends(disk, (bells[0].fileno(), bells[1].fileno()))
    data = [os.urandom(20_000_000), os.urandom(20_000_000)]
    received = [bytearray(), bytearray()]

    def receive(number: int) -> None:
        while len(received[number]) < len(data[1 - number]):
            received[number] += ends.sockets[number].recv(1 << 16)

    workers = [threading.Thread(target=receive, args=(n,)) for n in (0, 1)]
    workers += [threading.Thread(target=ends.sockets[n].sendall, args=(data[n],)) for n in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    ends.close()
    for bell in bells:
        bell.close()
    assert received == [data[1], data[0]]


def test_lost_doorbell_only_delays_the_data(disk: int) -> None:
    # The other ends of these two pairs are not connected, so no end hears the doorbell.
    bells = (*socket.socketpair(), *socket.socketpair())
    ends = Ends(disk, (bells[0].fileno(), bells[2].fileno()))
    ends.sockets[0].sendall(b"late")
    assert ends.sockets[1].recv(10) == b"late"
    ends.close()
    for bell in bells:
        bell.close()


def test_idle_end_rings(disk: int) -> None:
    """A lab that restores L1 waits for L1's first doorbell."""
    bell, heard = socket.socketpair()
    bell.setblocking(False)
    heard.settimeout(60)
    near, far = socket.socketpair()
    assert Bridge(far, DiskStream(disk, L1), bell.fileno()).step() == set()
    assert heard.recv(10) == b"\1"
    for end in (bell, heard, near, far):
        end.close()
