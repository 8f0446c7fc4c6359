# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the agent and its parser with a plugin that lies, floods or is silent."""

from __future__ import annotations

import asyncio
import json
import os
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents import plugin, plugin_control
from qemu_prefault.agents.base import BatchResult, Kind, Range, VcpuThread
from qemu_prefault.agents.plugin import Control, PluginAgent
from qemu_prefault.agents.plugin_protocol import (
    MAX_BYTES,
    MAX_VALUES,
    parse_answer,
    parse_done,
    parse_event,
    parse_status,
)
from qemu_prefault.errors import AgentError, FailedError, QemuPrefaultError
from qemu_prefault.host.procfs import Process

MIB = 1 << 20
STATUS = {"plugin": 1, "pre_fault_memory": True, "keeping": True, "quirk": "disabled",
          "held": None, "vcpus": [{"id": 0}], "prefault_vcpus": [{"id": 1}],
          "no_prefault_vcpus": None, "pending": 0,
          "counters": {"prefaulted": 0, "again": 0, "errors": 0}}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\n",
        b"[1]",
        b"7",
        b'{"error":7}',
        b'{"error":"x","code":7}',
        b'{"a":' + b"[" * 60000 + b"]" * 60000 + b"}",
        b"[" * 60000,
        b'{"a":"' + b"x" * MAX_BYTES + b'"}',
        b'{"a":[' + b"[]," * MAX_VALUES + b"0]}",
        b'{"a":[' + b"1.5," * (MAX_BYTES // 4 - 10) + b"0]}",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"\\ud800"}',
    ],
    ids=lambda line: line[:12].decode(errors="replace"),
)
def test_malformed_answer_is_one_error(line: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AgentError) as caught:
            parse_answer(line, 7)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert caught.value.code == "agent"
    assert len(caught.value.cause) < 300


def test_brackets_in_a_text_are_no_nesting() -> None:
    assert parse_answer(b'{"a":"' + b'[\\"' * 1000 + b'"}', 7)["a"] == '["' * 1000


def test_large_answers_of_the_plugin_are_accepted() -> None:
    """Check a batch of 4096 ranges, and the status of a guest with 4096 vCPUs and 4096 slots."""
    done = {"done": [[(1 << 64) - 1, 133]] * 4096, "seconds": 1.5}
    assert len(parse_done(parse_answer(json.dumps(done).encode(), 7), 4096, 7)[0]) == 4096
    slot = {"slot": 65535, "as": 65535, "gpa": 1 << 52, "size": 1 << 40, "hva": 1 << 47,
            "flags": 4294967295, "state": "skipped", "resident_only": False,
            "prefaulted": 1 << 40, "why": "the memory is absent"}  # fmt: skip
    vcpu = {"id": 4096, "fd": 100000, "tid": 4194304, "running": False}
    status = STATUS | {"vcpus": [vcpu] * 4096, "slots": [slot] * 4096}
    assert parse_status(parse_answer(json.dumps(status).encode(), 7), 7) == status


@pytest.mark.parametrize(
    "change",
    [
        {"vcpus": None}, {"vcpus": [7]}, {"vcpus": [{"id": -1}]}, {"vcpus": [{}]},
        {"keeping": 1}, {"held": 7}, {"pending": -1}, {"pending": 1 << 64}, {"pending": 1.0},
        {"counters": []}, {"counters": {"prefaulted": "1", "again": 0, "errors": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_status_is_one_error(change: dict[str, Any]) -> None:
    with pytest.raises(AgentError, match="malformed"):
        parse_status(STATUS | change, 7)
    with pytest.raises(AgentError, match="malformed"):
        parse_status({"plugin": 1}, 7)


@pytest.mark.parametrize(
    "answer",
    [{"done": 7}, {"done": [7]}, {"done": [[0]], "seconds": 1}, {"done": [[0, 0]]},
     {"done": [[0, 0], [0, 0]], "seconds": 1}, {"done": [[0, 5000]], "seconds": 1},
     {"done": [[0, 0]], "seconds": 1 << 40}],
    ids=str,
)  # fmt: skip
def test_malformed_result_is_one_error(answer: dict[str, Any]) -> None:
    with pytest.raises(AgentError, match="malformed"):
        parse_done(answer, 1, 7)


def test_malformed_event_is_one_error() -> None:
    for event in ({}, {"event": 7}, {"event": "x", "time": -1}, {"event": "x", "bytes": "1"}):
        with pytest.raises(AgentError, match="malformed"):
            parse_event(event, 7)


# --- time limits ---

Answer = Callable[[str, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def lying_plugin(path: Path, answer: Answer) -> AsyncIterator[list[str]]:
    """Serve the control socket in this process. The block gets the list of received requests."""
    requests: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).decode().strip():
            requests.append(line)
            try:
                await answer(line, writer)
            except ConnectionError:
                break
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield requests
    finally:
        server.close()


def say(writer: asyncio.StreamWriter, document: object) -> None:
    writer.write(json.dumps(document).encode() + b"\n")


async def run_batch(path: Path, answer: Answer) -> tuple[BatchResult, list[str]]:
    agent = PluginAgent(Process.find(os.getpid()), path, [VcpuThread(8, 9, 0)])
    async with lying_plugin(path, answer) as requests:
        try:
            await agent.start()
            return await agent.run({0: [Range(Kind.STAGE2, 0, 64 * MIB)]}, lambda _: None), requests
        finally:
            await agent.close()


@pytest.mark.parametrize("way", ["silent", "zero", "drip", "garbage", "part", "backwards"])
def test_batch_without_progress_is_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(plugin_control, "STALLED_SECONDS", 0.5)

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        if line == "status":
            say(writer, STATUS)
        elif line.startswith("work"):
            number = 0
            if way == "part":
                writer.write(b'{"done":')
            while way not in ("silent", "part"):
                number += 1
                say(writer, {
                    "zero": {"progress": 0}, "drip": {"progress": number}, "garbage": {"x": []},
                    "backwards": {"progress": (64 - number) * MIB if number < 64 else 0},
                }[way])  # fmt: skip
                await writer.drain()
                await asyncio.sleep(0.001)

    before = time.process_time()
    with pytest.raises(AgentError, match="made no progress") as caught:
        asyncio.run(asyncio.wait_for(run_batch(tmp_path / "control", answer), 60))
    assert caught.value.code == "agent"
    assert time.process_time() - before < 10


def test_slow_batch_with_progress_is_not_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_control, "STALLED_SECONDS", 2.0)

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        if line == "status":
            say(writer, STATUS)
        elif line.startswith("work"):
            say(writer, {"ok": True})
            for number in range(16):  # longer than STALLED_SECONDS
                say(writer, {"progress": 4 * number * MIB})
                await asyncio.sleep(0.2)
            say(writer, {"done": [[64 * MIB, 0]], "seconds": 3.2})

    result, requests = asyncio.run(run_batch(tmp_path / "control", answer))
    assert result.outcomes[0][0].done == 64 * MIB
    assert "abort" not in requests


def test_late_replies_have_a_limit_together(tmp_path: Path) -> None:
    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2.5)
        say(writer, STATUS)

    async def ask(path: Path) -> int:
        replies = 0
        async with lying_plugin(path, answer):
            with pytest.raises(FailedError, match="did not reply within"):
                async with Control.open(path, os.getpid()) as control:
                    while replies < 10:
                        await control.status()
                        replies += 1
        return replies

    assert asyncio.run(ask(tmp_path / "control")) <= 1


def test_replies_have_no_limit_together_if_requests_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_control, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(plugin_control, "LATE_ANSWER_SECONDS", 0.0)

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        say(writer, STATUS)

    async def ask(path: Path) -> None:
        async with lying_plugin(path, answer), Control.open(path, os.getpid()) as control:
            for _ in range(6):
                await control.status()
                await asyncio.sleep(0.5)

    asyncio.run(ask(tmp_path / "control"))


def test_plugin_without_a_reply_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_control, "ANSWER_SECONDS", 0.2)

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"plugin"')

    with pytest.raises(FailedError, match="did not reply") as caught:
        asyncio.run(run_batch(tmp_path / "control", answer))
    assert caught.value.code == "control-socket"


def test_endless_line_is_an_error(tmp_path: Path) -> None:
    """Check that the tool does not collect more than the limit."""

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        for _ in range(64):
            writer.write(b"[" * MIB)
            await writer.drain()

    async def ask() -> None:
        async with lying_plugin(tmp_path / "control", answer):
            await Control.connect(tmp_path / "control", os.getpid())

    tracemalloc.start()
    try:
        with pytest.raises(QemuPrefaultError, match="malformed"):
            asyncio.run(ask())
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()


def test_threads_that_never_end_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that close() raises an error of this package, after which a run resumes the guest."""
    monkeypatch.setattr(plugin, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(plugin, "BATCH_THREAD", Process.find(os.getpid()).name)

    async def answer(line: str, writer: asyncio.StreamWriter) -> None:
        say(writer, STATUS)

    async def run() -> None:
        agent = PluginAgent(Process.find(os.getpid()), tmp_path / "control", [VcpuThread(8, 9, 0)])
        async with lying_plugin(tmp_path / "control", answer):
            await agent.start()
            with pytest.raises(AgentError, match="did not end its batch"):
                await agent.close()
            await agent.close()

    asyncio.run(run())
