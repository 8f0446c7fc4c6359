# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the resume guard resumes the guest if the pausing process is killed.

These tests run only the resume guard, with a real QEMU. The tests in tests/nested kill whole runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault.agents.base import OrphanCleanup
from qemu_prefault.engine.resume_guard import ResumeGuard
from qemu_prefault.errors import MonitorError
from qemu_prefault.qemu.monitor import Monitor
from qemu_prefault_lab.wait import wait_for
from support.qemu import QemuVm, StartQemu, start_vm

Body = Callable[[socket.socket], None]
NOTHING_LEFT = OrphanCleanup(lambda: None, lambda: True, 20.0)


@pytest.fixture
def vm(start_qemu: StartQemu, tmp_path: Path, accel: str) -> QemuVm:
    return start_vm(start_qemu, tmp_path, "-m", "64M", accel=accel, paused=False)


class Holder:
    """A process that starts a resume guard, pauses a guest, and waits to be killed."""

    def __init__(
        self,
        vm: QemuVm,
        before_waiting: bytes = b"",
        *,
        orders: OrphanCleanup = NOTHING_LEFT,
    ) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)

            async def hold() -> None:
                async with Monitor.connect(vm.qemu.qmp) as monitor:
                    guard = ResumeGuard(monitor.fileno(), orders)
                    with guard:
                        await monitor.execute("stop")
                        if before_waiting:
                            os.write(monitor.fileno(), before_waiting)
                        os.write(write_end, b"x")
                        signal.pause()

            try:
                asyncio.run(hold())
            finally:
                os._exit(1)
        os.close(write_end)
        assert os.read(read_end, 1) == b"x", "the holder failed"
        os.close(read_end)
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        (self.guard,) = (int(child) for child in children)
        self._guard_fd = os.pidfd_open(self.guard)

    def kill(self, number: int = signal.SIGKILL, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)
        if number == signal.SIGKILL:
            os.waitpid(self.pid, 0)

    def guard_gone(self, timeout: float) -> bool:
        return bool(select.select([self._guard_fd], [], [], timeout)[0])

    def close(self) -> None:
        for pid in (self.pid, self.guard):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._guard_fd)


@pytest.fixture
def hold(vm: QemuVm) -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def make(*arguments: bytes, **options: object) -> Holder:
        holders.append(Holder(vm, *arguments, **options))  # type: ignore[arg-type]
        assert vm.qmp.status() == "paused"
        return holders[-1]

    yield make
    for holder in holders:
        holder.close()


def check_resumed(vm: QemuVm, holder: Holder) -> None:
    vm.qmp.wait_event("RESUME")
    assert vm.qmp.status() == "running"
    assert holder.guard_gone(10), "the resume guard did not exit"


def test_guest_is_resumed_if_holder_is_killed(vm: QemuVm, hold: Callable[..., Holder]) -> None:
    holder = hold()
    holder.kill()
    check_resumed(vm, holder)
    # The resume guard must have disconnected, so that the monitor accepts the next client.
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(vm.qemu.qmp)
        assert b"QMP" in client.recv(4096)


HALVES = {
    "half a command": b'{"execute": "query-sta',
    "incomplete string with a brace": b'{"execute": "a}{',
    "an escape": b'{"execute": "\\',
    "incomplete nested object": b'{"execute": "query-status", "arguments": {"a": [[{"b": [1, 2',
    "a whole command": b'{"execute": "query-status"}\n',
    "a second stop": b'{"execute": "stop"}\n',
    "many commands without reading answers": b'{"execute": "query-qmp-schema"}\n' * 20,
    "an incomplete last command": b'{"execute": "query-version"}\n' * 7 + b'{"execute": "human-mon',
}


@pytest.mark.parametrize("accel", ["tcg"])
@pytest.mark.parametrize("name", HALVES)
def test_holder_killed_in_mid_message(vm: QemuVm, hold: Callable[..., Holder], name: str) -> None:
    holder = hold(HALVES[name])
    holder.kill()
    check_resumed(vm, holder)


@pytest.mark.parametrize("accel", ["tcg"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_guard_survives_job_signals(vm: QemuVm, hold: Callable[..., Holder], number: int) -> None:
    """Send the signals that a terminal sends to the whole process group."""
    holder = hold()
    os.kill(holder.guard, number)
    assert not holder.guard_gone(0.2)
    holder.kill(signal.SIGKILL, group=True)
    check_resumed(vm, holder)


@pytest.mark.parametrize("accel", ["tcg"])
def test_migrated_guest_is_not_resumed(vm: QemuVm, hold: Callable[..., Holder]) -> None:
    """Check that a migrated guest stays stopped, because it runs on its destination."""
    holder = hold()
    vm.qmp.execute("migrate", uri="exec:cat >/dev/null")
    wait_for(lambda: vm.qmp.status() == "postmigrate", "the guest has migrated")
    holder.kill()
    assert holder.guard_gone(10), "the resume guard did not exit"
    assert vm.qmp.status() == "postmigrate"


@pytest.mark.parametrize("accel", ["tcg"])
def test_helpers_end_before_the_guest_resumes(
    vm: QemuVm, hold: Callable[..., Holder], tmp_path: Path
) -> None:
    told, gone = tmp_path / "told", tmp_path / "gone"
    holder = hold(orders=OrphanCleanup(told.touch, gone.exists, 20.0))
    holder.kill()
    wait_for(told.exists, "the cleanup was started")
    assert not holder.guard_gone(0.3)
    assert vm.qmp.status() == "paused"
    gone.touch()
    check_resumed(vm, holder)


@pytest.mark.parametrize("accel", ["tcg"])
def test_stuck_helpers_do_not_block_resume(vm: QemuVm, hold: Callable[..., Holder]) -> None:
    holder = hold(orders=OrphanCleanup(lambda: None, lambda: False, 0.5))
    started = time.monotonic()
    holder.kill()
    check_resumed(vm, holder)
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("accel", ["tcg"])
def test_guard_ends_with_qemu(vm: QemuVm, hold: Callable[..., Holder]) -> None:
    holder = hold()
    vm.qemu.kill()
    holder.kill()
    assert holder.guard_gone(10)


@pytest.mark.parametrize("accel", ["tcg"])
def test_stopped_qemu_is_resumed_once_continued(vm: QemuVm, hold: Callable[..., Holder]) -> None:
    holder = hold()
    vm.qemu.pause()
    holder.kill()
    assert not holder.guard_gone(0.3)
    vm.qemu.resume()
    check_resumed(vm, holder)


@pytest.mark.parametrize("accel", ["tcg"])
def test_guard_ends_after_a_normal_run(vm: QemuVm) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()

    async def pause() -> None:
        async with Monitor.connect(vm.qemu.qmp) as monitor:
            with ResumeGuard(monitor.fileno(), NOTHING_LEFT):
                await monitor.execute("stop")
                assert len(children.read_text().split()) == len(before) + 1
            assert children.read_text().split() == before  # also checks that no zombie remains
            assert await monitor.execute("query-version")

    fds = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        asyncio.run(pause())
        # The block exited normally, so the resume guard must not resume the guest.
        assert vm.qmp.status() == "paused"
    assert {event["event"] for event in vm.qmp.events} <= {"STOP"}
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("accel", ["tcg"])
def test_exception_does_not_trigger_guard(vm: QemuVm) -> None:
    """Check that the resume guard leaves the guest paused after an exception.

    In this case, the engine resumes the guest.
    """

    async def fail() -> None:
        async with Monitor.connect(vm.qemu.qmp) as monitor:
            with ResumeGuard(monitor.fileno(), NOTHING_LEFT):
                await monitor.execute("stop")
                raise LookupError

    with pytest.raises(LookupError):
        asyncio.run(fail())
    assert vm.qmp.status() == "paused"


@pytest.mark.parametrize("accel", ["tcg"])
@pytest.mark.parametrize("late", ["stop", "cont"])
def test_guest_is_resumed_if_reply_is_late(vm: QemuVm, late: str) -> None:
    """Check that the guest does not stay paused if QEMU executes a command after the time limit."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")

    async def pause() -> None:
        async with Monitor.connect(vm.qemu.qmp) as monitor:
            guard = ResumeGuard(monitor.fileno(), NOTHING_LEFT)
            with guard:
                async with guard.hand_over_on_failure(monitor):
                    if late == "cont":
                        await monitor.execute("stop")
                        guard.cont_sent = True
                    vm.qemu.pause()
                    await monitor.execute(late, timeout=0.3)

    before = children.read_text().split()
    with pytest.raises(MonitorError, match=f"did not reply to {late}") as caught:
        asyncio.run(pause())
    (guard,) = set(children.read_text().split()) - set(before)
    assert f"Process {guard} " in caught.value.remedy
    vm.qemu.resume()
    vm.qmp.wait_event("RESUME")
    wait_for(lambda: children.read_text().split() == before, "the resume guard exits")
    assert vm.qmp.status() == "running"
    assert "RESUME" not in [event["event"] for event in vm.qmp.events], "resumed twice"


@pytest.mark.parametrize("accel", ["tcg"])
def test_guest_is_resumed_if_a_message_is_malformed(vm: QemuVm, tmp_path: Path) -> None:
    """Check that the guest does not stay paused if the tool has to end the QMP session."""
    path = str(tmp_path / "proxy")

    async def pause() -> None:
        async with Monitor.connect(path) as monitor:
            guard = ResumeGuard(monitor.fileno(), NOTHING_LEFT)
            with guard:
                async with guard.hand_over_on_failure(monitor):
                    await monitor.execute("stop")
                    await monitor.execute("query-version")

    with inserting_proxy(vm.qemu.qmp, path, after=b'"STOP"', text=b"not JSON\n"):
        with pytest.raises(MonitorError, match="is not a QMP server"):
            asyncio.run(pause())
        vm.qmp.wait_event("RESUME")
    assert vm.qmp.status() == "running"


@contextlib.contextmanager
def inserting_proxy(server: str, path: str, *, after: bytes, text: bytes) -> Iterator[None]:
    """Listen on a path, connect a client to a QMP server, and insert a text into its messages.

    :param after: The text is inserted once, after the first message that contains these bytes.
    """

    def relay(listener: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            listener.accept()[0] as client,
            socket.socket(socket.AF_UNIX) as qemu,
        ):
            qemu.connect(server)
            inserted = False
            while True:
                for source in select.select([client, qemu], [], [])[0]:
                    if not (data := source.recv(1 << 16)):
                        return
                    if source is client:
                        qemu.sendall(data)
                        continue
                    client.sendall(data)
                    if after in data and not inserted:
                        inserted = True
                        client.sendall(text)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        thread = threading.Thread(target=relay, args=(listener,))
        thread.start()
        yield
        thread.join(20)
        assert not thread.is_alive()
