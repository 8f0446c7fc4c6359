# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin's control socket sends a code with every refusal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import BUSY, Control
from qemu_prefault.agents.plugin_protocol import NO_THREAD
from qemu_prefault.errors import RefusedError
from support.native import NATIVE, link_with_plugin

ERRORS = (NATIVE / "plugin/errors.h").read_text()
CODES = set(re.findall(r"X\(\w+, \"([a-z-]+)\"", ERRORS))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plugin_socket.c")
    return link_with_plugin(source, tmp_path_factory.mktemp("socket") / "serve")


class Server:
    """The running test program, its socket's path, and the address of its memory."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        assert process.stdout
        self.pid = process.pid
        self.path = path
        self.memory = int(process.stdout.readline())

    def ask(self, *lines: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(self.path))
            client.sendall("".join(f"{line}\n" for line in lines).encode())
            client.shutdown(socket.SHUT_WR)
            answer: dict[str, Any] = json.loads(client.makefile().readline())
            return answer


@pytest.fixture
def server(program: Path, tmp_path: Path) -> Iterator[Server]:
    path = tmp_path / "control"
    with subprocess.Popen(
        [program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process, path)
        process.kill()


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("unknown-request", ("hello",)),
        ("unknown-request", ("populate some",)),
        ("unknown-request", (f"work {2 << 20} 4096",)),
        ("bad-range", ("work 1 4096", "0 0 1 4096")),
        ("bad-range", ("work 1 4096", "1 0 4096 4096")),
        ("bad-range", ("work 2 4096", "nonsense", "0 0 4096 4096")),
        ("bad-chunk", ("work 0 100",)),
        ("incomplete", ("work 2 4096", "0 0 4096 4096")),
    ],
)
def test_refusal_carries_a_code(server: Server, code: str, lines: tuple[str, ...]) -> None:
    assert code in CODES
    answer = server.ask(*lines)
    assert answer["code"] == code
    assert set(answer) == {"error", "code"} and answer["error"]


def test_second_batch_is_refused_as_busy(server: Server) -> None:
    assert BUSY in CODES
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(server.path))
        many = [f"0 0 {server.memory} {64 << 20}"] * 20000
        client.sendall("\n".join([f"work {len(many)} 4096", *many, ""]).encode())
        assert json.loads(client.makefile().readline())["ok"]
        assert server.ask("work 0 4096")["code"] == BUSY

        async def refused() -> None:
            async with Control.open(server.path, server.pid) as control:
                with pytest.raises(RefusedError) as caught:
                    await control.ask("work 0 4096")
                assert caught.value.code == "busy-agent"

        asyncio.run(refused())


def test_valid_requests_have_no_code(server: Server) -> None:
    assert server.ask("status")["plugin"] == 1
    assert server.ask("populate resident") == {"ok": True}
    assert server.ask("work 0 4096") == {"ok": True}


def limit_descriptors(server: Server, left: int) -> int:
    """Limit the server's descriptors so that a client's connection leaves this number."""
    limit = max(map(int, os.listdir(f"/proc/{server.pid}/fd"))) + 2 + left
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def test_client_without_thread_gets_an_error(server: Server) -> None:
    limit = limit_descriptors(server, 3)
    answer = server.ask("status")
    assert answer["code"] == NO_THREAD and NO_THREAD in CODES
    assert f"RLIMIT_NOFILE (ulimit -n) is {limit}, of which" in answer["error"]

    async def refused() -> None:
        with pytest.raises(RefusedError) as caught:
            async with Control.open(server.path, server.pid) as control:
                await control.ask("status")
        assert caught.value.code == "no-tasks" and str(limit) in caught.value.cause

    asyncio.run(refused())
    limit_descriptors(server, 4)
    assert server.ask("status")["plugin"] == 1
