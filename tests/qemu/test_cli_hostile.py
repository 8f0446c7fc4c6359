# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the command line with servers that are not QEMU or that falsify replies.

The tool must exit within seconds, with a status, a cause and a remedy. The tool must neither print
a traceback nor harm a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.process import leftovers
from support.qemu import MIB, QemuVm, StartQemu, start_vm
from support.tool import Result, Tool

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, '
    b'"capabilities": []}}\r\n'
)
Talk = Callable[[socket.socket], None]
#: A function that gets a command, its arguments and the true reply, and returns a false reply.
Lie = Callable[[str, dict[str, Any], Any], Any]


@contextlib.contextmanager
def serve(path: Path, talk: Talk) -> Iterator[str]:
    """Listen on a socket, and pass one client after another to ``talk`` in a thread."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4)

    def main() -> None:
        with contextlib.suppress(OSError):  # accept() fails when the listener is shut down
            while True:
                client = listener.accept()[0]
                with client, contextlib.suppress(OSError):  # the client disconnected, as expected
                    client.settimeout(20)
                    talk(client)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    try:
        yield str(path)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)
        assert not thread.is_alive()


def tool(*arguments: str) -> Result:
    """Run the tool, and check that it prints no traceback or internal error."""
    return Tool([*arguments, "--json"]).finish(20)


# --- servers that are not QEMU ---


def say(data: bytes, wait: bool = True) -> Talk:
    def talk(client: socket.socket) -> None:
        client.sendall(data)
        while wait and client.recv(4096):
            pass

    return talk


def never_greet(client: socket.socket) -> None:
    assert client.recv(1) == b"", "something was sent before the greeting"


def greet_for_ever(client: socket.socket) -> None:
    client.sendall(b'{"QMP": "')
    for _ in range(100):
        client.sendall(b"x" * MIB)


def answer_nothing_but_the_handshake(client: socket.socket) -> None:
    client.sendall(GREETING)
    request = json.loads(client.recv(65536).split(b"\n")[0])
    client.sendall(json.dumps({"return": {}, "id": request.get("id")}).encode() + b"\n")
    client.recv(65536)  # close the connection at the first query


SERVERS: dict[str, tuple[Talk, float]] = {
    "never greets": (never_greet, 4),
    "closes at once": (lambda client: None, 2),
    "garbage": (say(bytes(range(256)) * 16), 2),
    "a web server": (say(b"HTTP/1.1 400 Bad Request\r\n\r\n", wait=False), 2),
    "a human monitor": (say(b"QEMU 10.0.0 monitor - type 'help'\r\n(qemu) "), 2),
    "endless greeting": (greet_for_ever, 10),
    "JSON without a greeting": (say(b'{"return": {}}\n'), 2),
    "closes at the first query": (answer_nothing_but_the_handshake, 2),
}


@pytest.mark.parametrize("name", SERVERS)
def test_non_qemu_server_fails_fast(tmp_path: Path, name: str) -> None:
    talk, seconds = SERVERS[name]
    with serve(tmp_path / "socket", talk) as path:
        started = time.monotonic()
        result = tool("--qmp", path)
        took = time.monotonic() - started
    assert result.status == 1, result.stderr
    assert result.error["code"].startswith("monitor")
    assert took < seconds + 1


@pytest.mark.parametrize("command", ["map", "stats", "probe"])
def test_non_qemu_server_fails_other_commands(tmp_path: Path, command: str) -> None:
    with serve(tmp_path / "socket", say(b"hello\n")) as path:
        result = tool(command, "--qmp", path)
    assert result.status == 1
    assert result.error["code"].startswith("monitor")


# --- a real QEMU behind a falsifying proxy ---


def requests_of(client: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield the client's requests. qemu.qmp sends no line ends between them."""
    text = ""
    while data := client.recv(65536):
        text += data.decode()
        while text.strip():
            try:
                request, end = json.JSONDecoder().raw_decode(text.lstrip())
            except ValueError:
                break
            text = text.lstrip()[end:]
            yield request


def liar(real: str, lie: Lie) -> Talk:
    """Return a proxy that replaces each reply with the result of ``lie``."""

    def talk(client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(real)
            requests: dict[str, dict[str, Any]] = {}

            def downwards() -> None:
                with contextlib.suppress(OSError):
                    for line in upstream.makefile("rb"):
                        message = json.loads(line)
                        request = requests.get(message.get("id", ""))
                        if request is not None and "return" in message:
                            told = lie(
                                request["execute"], request.get("arguments", {}), message["return"]
                            )
                            if isinstance(told, Error):
                                error = {"class": "GenericError", "desc": str(told)}
                                message = {"error": error, "id": message["id"]}
                            else:
                                message["return"] = told
                        client.sendall(json.dumps(message).encode() + b"\n")

            reader = threading.Thread(target=downwards, daemon=True)
            reader.start()
            with contextlib.suppress(OSError):
                for request in requests_of(client):
                    requests[request.get("id", "")] = request
                    upstream.sendall(json.dumps(request).encode() + b"\n")
            upstream.shutdown(socket.SHUT_RDWR)
            reader.join(20)

    return talk


class Error(str):
    """A false reply that the proxy sends as a QMP error with this text."""


@pytest.fixture
def vm(start_qemu: StartQemu, tmp_path: Path) -> QemuVm:
    return start_vm(start_qemu, tmp_path, "-m", "64M", "-smp", "2")


@pytest.fixture
def through(vm: QemuVm, tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs the tool through the proxy, and then checks QEMU."""

    def run(lie: Lie, *arguments: str, pid: bool = True) -> Result:
        with serve(tmp_path / "liar", liar(vm.qemu.qmp, lie)) as path:
            known = ["--pid", str(vm.pid)] if pid else []
            command = [arguments[0]] if arguments[:1] in (("map",), ("probe",)) else []
            rest = arguments[len(command) :] or (() if command else ("--populate-only",))
            result = tool(*command, "--qmp", path, *known, *rest)
        (tmp_path / "liar").unlink()
        assert "did not finish the QMP greeting" not in result.stderr, "the proxy is broken"
        assert vm.qmp.status() == "prelaunch"
        assert leftovers(vm.pid) == []
        return result

    return run


Through = Callable[..., Result]


def honest(command: str, arguments: dict[str, Any], answer: Any) -> Any:
    return answer


def instead(wanted: str, change: Callable[[Any], Any]) -> Lie:
    """Return a function that changes the replies to one command.

    :param wanted: The QMP command, or the beginning of a human monitor command.
    """

    def lie(command: str, arguments: dict[str, Any], answer: Any) -> Any:
        name = arguments.get("command-line", command)
        return change(answer) if name.startswith(wanted) else answer

    return lie


def test_proxy_is_refused_without_pid(through: Through, vm: QemuVm) -> None:
    result = through(honest, pid=False)
    assert result.status == 5
    assert result.error["code"] == "proxy"
    assert "--pid" in result.error["remedy"]
    assert through(honest).status == 0


def threads_of(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def with_threads(threads: list[int]) -> Lie:
    def change(cpus: Any) -> Any:
        return [cpu | {"thread-id": tid} for cpu, tid in zip(cpus, threads * 2, strict=False)]

    return instead("query-cpus-fast", change)


FOREIGN: dict[str, Callable[[], list[int]]] = {
    "of init": lambda: [1],
    "of the tool": lambda: [os.getpid()],
    "of the kernel": lambda: [2],
    "of no process": lambda: [4_000_000],
}


@pytest.mark.parametrize(
    ("whose", "pid"),
    [
        *((whose, True) for whose in FOREIGN),
        # Without --pid, the tool accepts the server's own threads. A server can harm only itself.
        *((whose, False) for whose in FOREIGN if whose != "of the tool"),
    ],
)
def test_foreign_threads_are_never_touched(through: Through, whose: str, pid: bool) -> None:
    """Check that a server cannot make the tool inject code into another process."""
    foreign = FOREIGN[whose]()
    result = through(with_threads(foreign), pid=pid)
    assert result.status in (4, 5), result.stderr
    assert result.error["code"] in ("proxy", "pid-namespace")
    assert leftovers(os.getpid()) == []


def test_foreign_pid_is_refused(vm: QemuVm) -> None:
    for pid in (1, os.getpid()):
        result = tool("--qmp", vm.qemu.qmp, "--pid", str(pid), "--populate-only")
        assert result.status in (4, 5)
        assert result.error["code"] == "proxy"


def test_main_thread_as_vcpu_is_harmless(through: Through, vm: QemuVm) -> None:
    """Check that QEMU survives if the proxy reports QEMU's main thread as a vCPU.

    A paused vCPU's thread waits for a futex (qemu_wait_io_event() in system/cpus.c), but the main
    thread waits in ppoll().
    """
    through(with_threads([vm.pid]))
    assert vm.qmp.execute("query-version")


@pytest.mark.parametrize("names", [[], [{}], "x", None, {"a": 1}, [{"cpu-index": -1}]])
def test_invalid_vcpus(through: Through, names: Any) -> None:
    result = through(instead("query-cpus-fast", lambda cpus: names))
    assert result.status == 1, result.stderr


def move_ram(target: int) -> Lie:
    """Return a function that changes replies to report guest RAM at another address."""

    def lie(command: str, arguments: dict[str, Any], answer: Any) -> Any:
        line = arguments.get("command-line", "")
        if line.startswith("gpa2hva"):
            where = target + int(line.split()[1], 16)
            return re.sub(r"is 0x[0-9a-f]+", f"is {where:#x}", answer)
        if line == "info ramblock":  # since QEMU 8.1, this command also prints the address
            return "\n".join(
                re.sub(r"0x[0-9a-f]{12,}\s+(?=r[wo])", f"{target:#018x} ", row)
                if " pc.ram " in f" {row.strip()} "
                else row
                for row in answer.split("\n")
            )
        return answer

    return lie


def mapping(pid: int, pattern: str) -> int:
    """Return the start of the first mapping whose line in /proc/PID/maps matches.

    :param pattern: A regular expression.
    """
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if re.search(pattern, line):
            return int(line.split("-")[0], 16)
    raise AssertionError(f"no mapping matches {pattern}")


ELSEWHERE: dict[str, Callable[[int], int]] = {
    "nowhere": lambda pid: 0x1234_5000,
    "the heap": lambda pid: mapping(pid, r"\[heap\]"),
    "QEMU's text": lambda pid: mapping(pid, r"r-xp .*qemu-system"),
    "read-only data of libc": lambda pid: mapping(pid, r"r--p .*libc\.so"),
    "the main stack": lambda pid: mapping(pid, r"\[stack\]"),
    "the vDSO": lambda pid: mapping(pid, r"\[vdso\]"),
    "the end of user space": lambda pid: 0x7FFF_FFFF_F000 - 64 * MIB,
    "beyond user space": lambda pid: 0xFFFF_8000_0000_0000,
    "an odd address": lambda pid: 0x7000_0000_0001,
}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("command", ["run", "map"])
def test_ram_at_a_wrong_address(through: Through, vm: QemuVm, where: str, command: str) -> None:
    lie = move_ram(ELSEWHERE[where](vm.pid))
    result = through(lie, *([] if command == "run" else ["map"]))
    assert result.status == 1, (result.stdout, result.stderr)
    assert vm.qmp.execute("query-version")
    vm.qmp.execute("cont")
    assert vm.qmp.status() == "running"
    vm.qmp.execute("stop")
    vm.qmp.execute("system_reset")  # restore the state that ``through`` expects
    assert "paused" in vm.qmp.status() or vm.qmp.status() == "prelaunch"


@pytest.mark.parametrize("where", ["the heap", "QEMU's text"])
def test_small_ram_at_a_wrong_address(through: Through, vm: QemuVm, where: str) -> None:
    """Check that QEMU survives if the proxy reports another mapping as guest RAM.

    This mapping is larger than the RAM section, so the tool may accept and populate it.
    """
    target = ELSEWHERE[where](vm.pid)

    def lie(command: str, arguments: dict[str, Any], answer: Any) -> Any:
        line = arguments.get("command-line", "")
        if line.startswith("gpa2hva") and int(line.split()[1], 16) < MIB:
            return move_ram(target)(command, arguments, answer)
        return answer

    result = through(lie)
    assert result.status in (0, 1, 3), result.stderr
    vm.qmp.execute("cont")
    assert vm.qmp.status() == "running"
    assert vm.qmp.execute("query-memory-size-summary")["base-memory"] == 64 * MIB


def test_overstated_ram_size(through: Through) -> None:
    """Check that the tool fails if a reported RAM range extends beyond its mapping."""
    result = through(
        instead("info mtree", lambda text: text.replace("0000000003ffffff", "0000000043ffffff"))
    )
    assert result.status == 1, result.stderr
    assert result.error["cause"]


STRANGE: dict[str, tuple[str, Any]] = {
    "numeric state": ("query-status", {"status": 7, "running": True}),
    "no state": ("query-status", {}),
    "no answer": ("query-kvm", None),
    "empty memory map": ("info mtree", ""),
    "garbage memory map": ("info mtree", "\x00\x1b[2J" * 1000),
    "no RAM blocks": ("info ramblock", ""),
    "backends of another type": ("query-memdev", 7),
    "unknown device": ("query-memory-devices", [{"type": "wormhole", "data": {}}]),
    "oversized balloon": ("query-balloon", {"actual": 1 << 80}),
    "migration is a list": ("query-migrate", []),
}


@pytest.mark.parametrize("name", STRANGE)
def test_malformed_answers(through: Through, name: str) -> None:
    command, answer = STRANGE[name]

    def lie(asked: str, arguments: dict[str, Any], truth: Any) -> Any:
        return answer if arguments.get("command-line", asked).startswith(command) else truth

    result = through(lie)
    assert result.status == 1 or name == "oversized balloon", result.stdout


@pytest.mark.parametrize("command", ["query-status", "query-cpus-fast", "human-monitor-command"])
def test_escape_sequences_in_qemu_errors_are_removed(through: Through, command: str) -> None:
    words = Error("\x1b]0;owned\x07\x1b[2Jno\nnever")
    result = through(lambda asked, arguments, truth: words if asked == command else truth)
    assert result.status == 1
    assert "\x1b" not in result.stderr + result.stdout
    assert "never" in result.stderr


def test_escape_sequences_in_names_are_removed(vm: QemuVm, tmp_path: Path) -> None:
    def lie(command: str, arguments: dict[str, Any], answer: Any) -> Any:
        text = json.dumps(answer).replace("pc.ram", "p\\u001b[7mm")
        return json.loads(text)

    with serve(tmp_path / "liar", liar(vm.qemu.qmp, lie)) as path:
        result = Tool(["map", "--qmp", path, "--pid", str(vm.pid)]).finish(20)
    assert result.status == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert r"p\x1b[7mm" in result.stdout
