# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz the plugin's C parsers with the compiler's sanitizers."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.fuzz import Target
from support.native import SANITIZE, link_with_plugin

Check = Callable[[Target], None]

HERE = Path(__file__).parent
#: The maximum size of an input in bytes. A batch takes at least 5 ms, so a longer input, which can
#: contain more batches, would take minutes.
LONGEST_REQUEST = 2048
#: The plugin's files that contain these parsers, and the files on which they depend.
PARTS = ("guest_ranges", "host_ranges", "options", "os")
#: The wall-clock limit for a reply in seconds. The program itself limits its CPU time.
ANSWER_SECONDS = 120

CGROUP = b"12:memory,hugetlb:/machine/a b\n4:cpu:/x\n0::/machine.slice/vm.scope\n"
MOUNTINFO = b"""\
22 25 0:21 / /proc rw,nosuid shared:5 - proc proc rw
30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw
31 25 0:27 /machine /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory,hugetlb
"""
SMAPS = b"""\
7f0000000000-7f0008000000 rw-s 00000000 00:01 5                          /memfd:ram (deleted)
Size:             131072 kB
KernelPageSize:     2048 kB
VmFlags: rd wr sh mr mw me ms ht dc nr
7f0010000000-7f0020000000 rw-p 10000000 00:1a 9 /dev/shm/a b
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me dc
"""
INPUTS: dict[str, list[bytes]] = {
    "c-meminfo": [b"MemTotal:       16 kB\nMemAvailable:    1000 kB\nBuffers: 3 kB\n"],
    "c-groups": [CGROUP + b"--\n" + MOUNTINFO, b"0::/a/b/c\n--\n" + MOUNTINFO],
    "c-group-files": [b"--\n".join([b"500\n", b"max\n", b"300\n",
                                    b"anon 1\ninactive_file 50\n", b"8388608\n", b"4096\n"])],
    "c-nodes": [b"0-2,5\n", b"63-65,1023"],
    "c-pools": [b"--\n".join([b"Node 1 MemFree:  1 kB\nNode 1 Inactive(file):  2 kB\n",
                              b"7\n", b"9\n", b"3\n", b"5\n", b"2\n"])],
    "c-smaps": [SMAPS],
    "c-options": [b"keep=off,populate=all,hold=2.5,socket=~/x.sock,log=on", b"quirk=keep"],
}  # fmt: skip


class CrashError(Exception):
    """The program exited or did not reply."""


class Program:
    """The native_parsers.c program, which is restarted after a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - stop() closes it
        before = resource.getrlimit(resource.RLIMIT_AS)
        # The address sanitizer reserves terabytes of addresses.
        resource.setrlimit(resource.RLIMIT_AS, (before[1], before[1]))
        try:
            return subprocess.Popen(
                [self._path, self._directory.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def feed(self, number: int, data: bytes) -> None:
        """Feed an input to a parser.

        :raises CrashError: If the program exits.
        """
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(struct.pack("<2I", number, len(data)) + data)
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        if not ready or self._process.stdout.read(1) != b".":
            status = self.stop()
            raise CrashError(f"status {status}\n{self._message}")

    def stop(self) -> int | None:
        """Stop the program, and return its exit status."""
        if self._process is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=ANSWER_SECONDS)
        status = self._process.returncode
        self._errors.seek(0)
        self._message = self._errors.read()[-6000:].decode(errors="replace")
        self._errors.close()
        assert self._directory
        self._directory.cleanup()
        self._process = None
        return status


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    output = tmp_path_factory.mktemp("fuzz") / "parsers"
    flags = (*SANITIZE, "-Wl,--wrap=fopen")
    parts = ("common/*.c", *(f"plugin/{name}.c" for name in PARTS))
    running = Program(link_with_plugin(HERE / "native_parsers.c", output, *flags, parts=parts))
    yield running
    running.stop()


@pytest.mark.parametrize("name", INPUTS)
def test_parser(name: str, program: Program, check: Check) -> None:
    number = list(INPUTS).index(name)
    check(Target(name, lambda data: program.feed(number, data), INPUTS[name]))


# --- requests to the control socket ---

REQUESTS = (
    b"status\n",
    b"pause\nresume\npopulate resident\nprefault\nstatus\n",
    b"work 2 4096\n0 0 %d 8192\n0 1 4096 4096\nstatus\n",
    b"follow\n",
    b"lend\nwork 1 4096\n0 0 %d 4096\nstatus\n",
    b"work 1 33554432\n0 0 %d 1048576\nabort\n",
)


#: The plugin's files that parse and process requests, and the files on which they depend.
REQUEST_PARTS = (
    *("batch", "commands", "event_log", "firmware", "guest_ranges", "host_ranges", "limits"),
    *("messages", "options", "os", "pace", "prefault_vcpu", "queue", "quirk", "state", "status"),
)


def test_requests_with_sanitizers(tmp_path_factory: pytest.TempPathFactory, check: Check) -> None:
    """Check the memory accesses of the code that processes requests."""
    wrap = ",".join(f"--wrap=pf_batch_{name}" for name in ("start", "done", "end"))
    running = Program(
        link_with_plugin(
            HERE / "native_requests.c",
            tmp_path_factory.mktemp("fuzz") / "requests",
            *SANITIZE,
            f"-Wl,{wrap}",
            parts=("common/*.c", *(f"plugin/{name}.c" for name in REQUEST_PARTS)),
        )
    )
    seeds = [data.replace(b"%d", b"0") for data in REQUESTS]
    try:
        check(Target("c-requests", lambda data: running.feed(0, data[:LONGEST_REQUEST]), seeds))
    finally:
        running.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A request must not populate the address sanitizer's memory.
    source = HERE.parent / "unit" / "plugin_socket.c"
    output = tmp_path_factory.mktemp("fuzz") / "serve"
    flags = ("-g", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    return link_with_plugin(source, output, *flags)


def converse(client: socket.socket, data: bytes) -> bytes:
    """Send requests and read the replies concurrently, as the tool does."""
    client.setblocking(False)
    answers, part = b"", b"-"
    if not data:
        client.shutdown(socket.SHUT_WR)
    while part:
        readable, writable, _ = select.select(
            [client], [client] if data else [], [], ANSWER_SECONDS
        )
        if not readable and not writable:
            raise CrashError(f"no reply for {ANSWER_SECONDS} s")
        if writable:
            data = data[client.send(data) :]
            if not data:
                client.shutdown(socket.SHUT_WR)
        if readable:
            part = client.recv(1 << 16)
            answers += part
    return answers


def test_requests(server: Path, tmp_path: Path, check: Check) -> None:
    """Check that a client cannot crash or block the plugin, and that it gets JSON."""
    path = tmp_path / "control"
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        pytest.skip("prlimit is not installed")
    with subprocess.Popen(
        [prlimit, f"--as={1 << 30}", server, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout
        memory = int(process.stdout.readline())

        def parse(data: bytes) -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for line in converse(client, data[:LONGEST_REQUEST]).splitlines():
                        json.loads(line)

        seeds = [data.replace(b"%d", str(memory).encode()) for data in REQUESTS]
        try:
            check(Target("requests", parse, seeds, cost=4))
            assert process.poll() is None
        finally:
            process.kill()
