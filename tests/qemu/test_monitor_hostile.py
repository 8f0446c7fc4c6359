# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the QMP client with servers that are not QEMU or that send false replies.

The client must fail within seconds and use little memory. The servers are threads with plain
sockets, so that the tests control every byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.errors import MonitorError, QemuPrefaultError
from qemu_prefault.qemu.kvm_stats import read_stage2, read_vcpu_stats
from qemu_prefault.qemu.monitor import Monitor
from qemu_prefault.qemu.queries import VmState, read_vm_state

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, '
    b'"capabilities": []}}\r\n'
)
MIB = 1 << 20


@contextlib.contextmanager
def serve(path: Path, talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Accept one client at ``path`` and pass it to ``talk`` in a thread."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4)

    def main() -> None:
        try:
            client, _ = listener.accept()
            with client:
                client.settimeout(20)
                talk(client)
        except OSError:
            return  # the client disconnected, as expected

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    try:
        yield str(path)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def memory_growth_below(limit: int) -> Iterator[None]:
    """Check that resident memory grows by less than ``limit`` bytes within the block.

    The check does not use ru_maxrss, because that value includes the peak of earlier tests.
    """
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        (line,) = [line for line in status.read_text().split("\n") if line.startswith(name)]
        return int(line.split()[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
    before = field("VmRSS")
    yield
    assert field("VmHWM") - before < limit


def flood(start: bytes, byte: bytes, end: bytes = b"") -> Callable[[socket.socket], None]:
    """Send 100 MB of ``byte`` between ``start`` and ``end``."""

    def talk(client: socket.socket) -> None:
        client.sendall(start)
        chunk = byte * (MIB // len(byte))
        for _ in range(100):
            client.sendall(chunk)
        client.sendall(end)
        client.recv(1)

    return talk


def say(data: bytes, wait: bool = True) -> Callable[[socket.socket], None]:
    def talk(client: socket.socket) -> None:
        client.sendall(data)
        while wait and client.recv(4096):
            pass

    return talk


def silent_then_check(client: socket.socket) -> None:
    """Check that the client sends nothing to a server that sends nothing."""
    assert client.recv(1) == b""


def drip(client: socket.socket) -> None:
    for byte in GREETING:
        client.sendall(bytes([byte]))
        time.sleep(0.2)


BAD_GREETINGS: dict[str, tuple[Callable[[socket.socket], None], str, float]] = {
    "never greets": (silent_then_check, "sent no QMP greeting", 3),
    "closes at once": (lambda client: None, "closed the connection before", 1),
    "closes in the middle": (say(GREETING[:20], wait=False), "", 1),
    "drips": (drip, "did not finish", 3),
    "text": (say(b"hello\n"), "first bytes are not JSON", 1),
    "HMP": (say(b"QEMU 10.0.0 monitor - type 'help'\r\n(qemu) "), "human monitor", 1),
    "telnet": (say(b"\xff\xfb\x01\xff\xfb\x03"), "telnet", 1),
    "binary": (say(bytes(range(256)) * 9), "is not a QMP server", 1),
    "blank, then nothing": (say(b"\n"), "is not a QMP server", 1),
    "no JSON": (say(b"{QMP}\n"), "is not a QMP server", 1),
    "array": (say(b" [1]\n"), "is not a QMP server", 1),
    "another object": (say(b'{"return": {}}\n'), "is not a QMP server", 1),
    "QMP is a number": (say(b'{"QMP": 1}\n'), "is not a QMP server", 1),
    "no version": (say(b'{"QMP": {"version": {}, "capabilities": []}}\n{"return": {}}\n'),
                   "version", 1),
    "version is text": (say(GREETING.replace(b"10}", b'"x"}') + b'{"return": {}}\n'),
                        "version", 1),
    "version is huge": (say(GREETING.replace(b"10}", b"9" * 4000 + b"}") + b'{"return": {}}\n'),
                        "version", 1),
    "number too long": (say(b'{"QMP": ' + b"9" * 10000 + b"}\n"), "is not a QMP server", 1),
    "deep nesting": (say(b'{"QMP": ' + b"[" * 1_000_000 + b"\n"), "is not a QMP server", 2),
    "deep objects": (say(b'{"QMP": ' + b'{"a":' * 500_000 + b"\n"), "is not a QMP server", 2),
    "bad UTF-8": (say(b'{"QMP": "\xff\xfe"}\n'), "is not a QMP server", 1),
    "refuses capabilities": (say(GREETING + b'{"error": {}}\n'), "is not a QMP server", 1),
    "capabilities unanswered": (say(GREETING), "did not finish", 3),
    "100 MB without newline": (flood(b'{"QMP": "', b"x"), "more than 4 MiB", 4),
    "100 MB with newline": (flood(b'{"QMP": "', b"x", b'"}\n'), "more than 4 MiB", 4),
    "100 MB of newlines": (flood(GREETING, b"\n"), "is not a QMP server", 4),
    "100 MB of zeros": (flood(b"", b"\0"), "is not a QMP server", 4),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GREETINGS)
def test_bad_greetings(case: str, tmp_path: Path) -> None:
    talk, cause, limit = BAD_GREETINGS[case]

    async def main(path: str) -> None:
        async with Monitor.connect(path, connect_timeout=2.5):
            raise AssertionError("connected")

    with serve(tmp_path / "s", talk) as path, memory_growth_below(48 * MIB):
        start = time.monotonic()
        with pytest.raises(QemuPrefaultError) as caught:
            asyncio.run(main(path))
        assert time.monotonic() - start < limit + 1
    assert cause in caught.value.cause
    assert caught.value.remedy
    assert len(str(caught.value)) < 1000


# --- a server that sends a valid greeting and then false replies ---

MTREE = (
    'FlatView #0\r\n AS "memory", root: system\r\n Root memory region: system\r\n'
    "  0000000000000000-000000000fffffff (prio 0, ram): pc.ram\r\n\r\n"
)
RAMBLOCK = (
    "              Block Name    PSize              Offset               Used       Total\r\n"
    "                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000  0x10000000\r\n"
)
HMP: dict[str, object] = {
    "info mtree -f": MTREE,
    "info ramblock": RAMBLOCK,
    "info numa": "0 nodes\r\n",
    "gpa2hva 0x0": "Host virtual address for 0x0 (pc.ram) is 0x7f0000000000\r\n",
    "gpa2hva 0xffff000": "Host virtual address for 0xffff000 (pc.ram) is 0x7f000ffff000\r\n",
}
CPU = {"cpu-index": 0, "thread-id": 77, "qom-path": "/machine/cpu", "props": {"node-id": 0}}
HONEST: dict[str, object] = {
    "query-status": {"status": "prelaunch", "running": False},
    "query-kvm": {"enabled": False, "present": False},
    "query-cpus-fast": [CPU],
    "query-memdev": [{"id": "pc.ram", "size": 256 * MIB, "host-nodes": []}],
    "query-memory-devices": [],
    "query-memory-size-summary": {"base-memory": 256 * MIB, "plugged-memory": 0},
    "query-balloon": {"actual": 128 * MIB},
    "query-migrate": {},
    "query-dirty-rate": {"status": "unstarted"},
    "qom-get": "pc-machine",
    "query-stats": [
        {
            "provider": "kvm",
            "qom-path": "/machine/cpu",
            "stats": [{"name": f"pages_{size}", "value": 1} for size in ("4k", "2m", "1g")],
        }
    ],
}


def qmp_server(lies: Mapping[str, object]) -> Callable[[socket.socket], None]:
    """Return a server that replies like QEMU, except for certain false replies.

    :param lies: The false reply to each command. A reply of type bytes is sent without encoding.
    """

    def answer(request: dict[str, Any]) -> bytes:
        name, arguments = request["execute"], request.get("arguments", {})
        value = {**HONEST, "qmp_capabilities": {}, **lies}.get(name)
        if name == "human-monitor-command":
            line = arguments["command-line"]
            value = lies.get(name, {**HMP, **lies}.get(line, "unknown command"))
        if isinstance(value, bytes):
            return value.replace(b"$ID", json.dumps(request.get("id")).encode())
        return json.dumps({"return": value, "id": request.get("id")}).encode() + b"\r\n"

    def talk(client: socket.socket) -> None:
        client.sendall(GREETING)
        decoder, text = json.JSONDecoder(), ""
        while data := client.recv(65536):
            text += data.decode()
            while text:
                try:
                    request, end = decoder.raw_decode(text)
                except ValueError:
                    break
                text = text[end:]
                client.sendall(answer(request))

    return talk


def ask(tmp_path: Path, lies: Mapping[str, object]) -> VmState:
    async def main(path: str) -> VmState:
        async with Monitor.connect(path, command_timeout=3) as monitor:
            machine = await read_vm_state(monitor)
            await read_stage2(monitor)
            await read_vcpu_stats(monitor, ["pages_4k"])
            return machine

    with serve(tmp_path / "s", qmp_server(lies)) as path:
        return asyncio.run(main(path))


def test_honest_server_works(tmp_path: Path) -> None:
    machine = ask(tmp_path, {})
    (section,) = machine.sections
    assert (section.hva, section.size, section.skipped) == (0x7F0000000000, 256 * MIB, None)
    assert machine.balloon is not None
    assert (machine.balloon.actual, machine.balloon.total) == (128 * MIB, 256 * MIB)
    assert (machine.version, machine.machine_type) == ("10.0.0", "pc-machine")
    assert machine.private_memory is None


def test_unknown_confidential_guest_has_private_memory(tmp_path: Path) -> None:
    assert ask(tmp_path, {"qom-get": "/objects/future0"}).private_memory == "/objects/future0"


NONSENSE: list[object] = [None, 7, -1, 1.5, "x", True, [], {}, [[]], [{}], {"return": 1}, [None]]
#: Valid replies to these commands, in addition to those in HONEST.
LEGAL: dict[str, list[object]] = {
    "query-memory-devices": [[]],
    "query-balloon": [None],  # null means that the device is absent
    "query-migrate": [None, {}, {"return": 1}],
    "query-dirty-rate": [None, {}, {"return": 1}],
    "query-stats": [[], [{}]],  # no statistics, or those of another provider
    "query-memdev": [[], [{}]],  # no known RAM, which does not contradict other replies
    "info numa": ["x"],
    "qom-get": NONSENSE,
}


@pytest.mark.parametrize("command", [*HONEST, *HMP])
def test_answers_of_the_wrong_type(command: str, tmp_path: Path) -> None:
    for number, value in enumerate(NONSENSE):
        path = tmp_path / str(number)
        path.mkdir()
        legal = any(value == good and type(value) is type(good) for good in LEGAL.get(command, []))
        with contextlib.nullcontext() if legal else pytest.raises(QemuPrefaultError):
            ask(path, {command: value})


def cpus(**changes: object) -> list[dict[str, object]]:
    return [{**CPU, **changes}]


LIES: dict[str, dict[str, object]] = {
    "thread id is a string": {"query-cpus-fast": cpus(**{"thread-id": "77"})},
    "thread id is negative": {"query-cpus-fast": cpus(**{"thread-id": -1})},
    "thread id is zero": {"query-cpus-fast": cpus(**{"thread-id": 0})},
    "thread id is huge": {"query-cpus-fast": cpus(**{"thread-id": 1 << 40})},
    "thread id is true": {"query-cpus-fast": cpus(**{"thread-id": True})},
    "props is a list": {"query-cpus-fast": cpus(props=[])},
    "a vCPU twice": {"query-cpus-fast": [CPU, CPU]},
    "balloon is text": {"query-balloon": {"actual": "much"}},
    "balloon is a list": {"query-balloon": []},
    "map is empty": {"info mtree -f": ""},
    "map is an error": {"info mtree -f": "unknown command: 'info'\r\n"},
    "map overlaps": {"info mtree -f": MTREE.replace("\r\n\r\n", "\r\n") + MTREE[-59:]},
    "map is beyond the block": {"info mtree -f": MTREE.replace("00fffffff", "ffffffffe")},
    "map has 100,000 ranges": {
        "info mtree -f": MTREE[:67]
        + "".join(f"  {i:015x}0-{i:015x}f (prio 0, ram): a\r\n" for i in range(50_000))
    },
    "no address": {"gpa2hva 0x0": "No memory is mapped at address 0x0\r\n"},
    "address of another region": {
        "gpa2hva 0x0": "Host virtual address for 0x0 (vga) is 0x7f0000000000\r\n"
    },
    "address of nothing": {"gpa2hva 0x0": "Host virtual address for 0x0 (pc.ram) is 0x1\r\n"},
    "two pieces": {
        "gpa2hva 0xffff000": "Host virtual address for 0x0 (pc.ram) is 0x7f0010000000\r\n"
    },
    "kernel address": {
        "gpa2hva 0x0": "Host virtual address for 0x0 (pc.ram) is 0xffff888000000000\r\n",
        "gpa2hva 0xffff000": "Host virtual address for 0x0 (pc.ram) is 0xffff88800ffff000\r\n",
    },
    "unaligned": {
        "gpa2hva 0x0": "Host virtual address for 0x0 (pc.ram) is 0x7f0000000001\r\n",
        "gpa2hva 0xffff000": "Host virtual address for 0x0 (pc.ram) is 0x7f000ffff001\r\n",
    },
    "same memdev twice": {"query-memdev": [{"id": "a", "size": 1}] * 2},
    "counter is negative": {
        "query-stats": [{"provider": "kvm", "qom-path": "x",
                         "stats": [{"name": "pages_4k", "value": -1}]}]
    },
    "reply without id": {"query-kvm": b'{"return": {}}\n'},
    "reply with another id": {"query-kvm": b'{"return": {}, "id": "other"}\n'},
    "id is a list": {"query-kvm": b'{"return": {}, "id": []}\n'},
    "error without id": {"query-kvm": b'{"error": {"class": "x", "desc": "y"}}\n'},
    "error is a number": {"query-kvm": b'{"error": 1, "id": $ID}\n'},
    "error has numbers": {"query-kvm": b'{"error": {"class": 1, "desc": 2}, "id": $ID}\n'},
    "neither return nor error": {"query-kvm": b'{"id": $ID}\n'},
    "garbage": {"query-kvm": b"garbage\n"},
    "binary": {"query-kvm": bytes(range(256)) + b"\n"},
    "event is a list": {"query-kvm": b'{"event": []}\n{"return": {}, "id": $ID}\n'},
    "deep nesting": {"query-kvm": b'{"return": ' + b"[" * 1_000_000 + b"\n"},
    "legal deep nesting": {
        "query-kvm": b'{"return": ' + b"[" * 900 + b"]" * 900 + b', "id": $ID}\n'
    },
    "8 MB reply": {"query-kvm": b'{"return": "' + b"x" * (8 * MIB) + b'", "id": $ID}\n'},
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_inconsistent_answers(case: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with memory_growth_below(100 * MIB), pytest.raises(QemuPrefaultError) as caught:
        ask(tmp_path, LIES[case])
    assert time.monotonic() - start < 6
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ("garbage", "during query-kvm it sent Failed to deserialize"),
        ("8 MB reply", "during query-kvm it sent a message of more than 4 MiB"),
        ("error without id", "during query-kvm it sent Server sent an error"),
    ],
)
def test_protocol_error_is_not_reported_as_exit(case: str, cause: str, tmp_path: Path) -> None:
    async def main(path: str) -> None:
        async with Monitor.connect(path) as monitor:
            await monitor.execute("query-kvm")

    with (
        serve(tmp_path / "s", qmp_server(LIES[case])) as path,
        pytest.raises(MonitorError) as caught,
    ):
        asyncio.run(main(path))
    assert cause in caught.value.cause
    assert caught.value.code == "monitor-not-qmp"


def test_duplicate_replies_are_harmless(tmp_path: Path) -> None:
    reply = b'{"return": {"enabled": false, "present": false}, "id": $ID}\n'
    assert ask(tmp_path, {"query-kvm": reply * 3}).sections


def test_malformed_events_are_ignored(tmp_path: Path) -> None:
    noise = b'{"event": 1}\n{"event": "X", "data": 1}\n{"event": "Y", "timestamp": "now"}\n'
    reply = b'{"return": {"enabled": false, "present": false}, "id": $ID}\n'
    assert ask(tmp_path, {"query-kvm": noise + reply}).sections


def test_event_flood_is_bounded(tmp_path: Path) -> None:
    """Send 100 MB of events while the caller reads no events."""
    event = b'{"event": "NOISE", "data": {"a": "%s"}}\n' % (b"x" * 1000)
    reply = b'{"return": {}, "id": "__qmp#00000"}\n'

    def talk(client: socket.socket) -> None:
        client.sendall(GREETING)
        client.recv(4096)
        client.sendall(b'{"return": {}}\n')
        client.recv(4096)
        for _ in range(1000):
            client.sendall(event * 100)
        client.sendall(reply)
        client.recv(4096)

    async def main(path: str) -> None:
        async with Monitor.connect(path, command_timeout=60) as monitor:
            with monitor.events("NOISE") as stream, monitor.events("OTHER") as other:
                await monitor.execute("query-kvm")
                assert stream.dropped == 100_000 - 1024
                assert other.dropped == 0

    with serve(tmp_path / "s", talk) as path, memory_growth_below(32 * MIB):
        asyncio.run(main(path))


@pytest.mark.parametrize("value", ["[]", '{"":{}}', '""'])
def test_wide_reply_is_an_error(tmp_path: Path, value: str) -> None:
    """Check the number of values, each of which takes 20 times as much memory as on the wire."""
    wide = ",".join([value] * (4 * MIB // (len(value) + 1) - 100))

    def talk(client: socket.socket) -> None:
        client.sendall(GREETING)
        client.recv(4096)
        client.sendall(b'{"return": {}}\n')
        client.recv(4096)
        client.sendall(f'{{"return": [{wide}]}}\n'.encode())
        client.recv(4096)

    async def main(path: str) -> None:
        async with Monitor.connect(path) as monitor:
            with pytest.raises(MonitorError, match="more than 131072 values"):
                await monitor.execute("query-kvm")

    with serve(tmp_path / "s", talk) as path, memory_growth_below(32 * MIB):
        asyncio.run(main(path))


def test_silent_qemu_delays_only_one_command(tmp_path: Path) -> None:
    def talk(client: socket.socket) -> None:
        client.sendall(GREETING)
        client.recv(4096)
        client.sendall(b'{"return": {}}\n')
        while client.recv(4096):
            pass

    async def main(path: str) -> None:
        async with Monitor.connect(path, command_timeout=2) as monitor:
            for _ in range(3):
                with pytest.raises(MonitorError, match="did not reply to query-kvm within"):
                    await monitor.execute("query-kvm")

    began = time.monotonic()
    with serve(tmp_path / "s", talk) as path:
        asyncio.run(main(path))
    assert time.monotonic() - began < 5


def test_unterminated_strings_are_an_error_in_time(tmp_path: Path) -> None:
    text = b'{"return": [' + b"1," * 100 + b'"' + b'\\"' * MIB + b"\n"

    async def main(path: str) -> None:
        async with Monitor.connect(path) as monitor:
            with pytest.raises(MonitorError, match="QMP"):
                await monitor.execute("query-kvm")

    before = time.process_time()
    with serve(tmp_path / "s", qmp_server({"query-kvm": text})) as path:
        asyncio.run(main(path))
    assert time.process_time() - before < 2


def test_replies_to_concurrent_commands_are_limited_together(tmp_path: Path) -> None:
    """Check 100 replies of 1 MiB, one at a time and all at once."""
    text = "x" * MIB

    async def main(path: str) -> None:
        async with Monitor.connect(path) as monitor:
            for _ in range(100):
                assert await monitor.execute("query-kvm") == text
            commands = [monitor.execute("query-kvm") for _ in range(100)]
            results = await asyncio.gather(*commands, return_exceptions=True)
            assert any("more than 4 MiB" in str(result) for result in results)

    talk = qmp_server({"query-kvm": text})
    with serve(tmp_path / "s", talk) as path, memory_growth_below(32 * MIB):
        asyncio.run(main(path))


def test_large_events_are_ignored(tmp_path: Path) -> None:
    """Check that unread events take little memory, although each of them is small enough."""

    def event(length: int) -> bytes:
        message = {"event": "NOISE", "timestamp": {}, "data": {"text": "x" * length}}
        return json.dumps(message).encode() + b"\n"

    def talk(client: socket.socket) -> None:
        client.sendall(GREETING)
        client.recv(4096)
        client.sendall(b'{"return": {}}\n')
        identity = json.loads(client.recv(4096))["id"]
        client.sendall(event(100_000) + event(3000) * 1024 + event(5000) * 100 + event(10))
        client.sendall(json.dumps({"return": {}, "id": identity}).encode() + b"\n")
        client.recv(4096)

    async def main(path: str) -> None:
        async with Monitor.connect(path) as monitor:
            with monitor.events("NOISE") as stream:
                await monitor.execute("query-kvm")
                assert stream.dropped == 1
                lengths = [len(str((await anext(stream)).data["text"])) for _ in range(1024)]
                assert lengths == [3000] * 1023 + [10]

    with serve(tmp_path / "s", talk) as path, memory_growth_below(32 * MIB):
        asyncio.run(main(path))


def test_unstable_map_fails(tmp_path: Path) -> None:
    calls = 0

    def talk(client: socket.socket) -> None:
        nonlocal calls
        other = MTREE.replace("00fffffff", "00ffff000")
        lies: dict[str, object] = {}
        inner = qmp_server(lies)

        class Tap:
            """A connection that changes the memory map after each query."""

            def sendall(self, data: bytes) -> None:
                nonlocal calls
                if b"FlatView" in data:
                    calls += 1
                    lies["info mtree -f"] = other if calls % 2 else MTREE
                client.sendall(data)

            def recv(self, size: int) -> bytes:
                return client.recv(size)

        inner(Tap())  # type: ignore[arg-type]

    async def main(path: str) -> None:
        async with Monitor.connect(path) as monitor:
            await read_vm_state(monitor)

    with serve(tmp_path / "s", talk) as path, pytest.raises(MonitorError) as caught:
        asyncio.run(main(path))
    assert caught.value.code == "layout-unstable"
    assert calls == 20
