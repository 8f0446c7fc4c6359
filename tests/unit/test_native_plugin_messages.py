# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin does not wait for the reader of stderr."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from support.native import link_with_plugin

#: The number of lines that the plugin stores.
STORED = 256


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plugin_messages.c")
    return link_with_plugin(source, tmp_path_factory.mktemp("messages") / "print")


def fill(pipe: int) -> int:
    """Write to a pipe until it is full, and return the number of bytes."""
    size = 0
    with suppress(BlockingIOError):
        while True:
            size += os.write(pipe, b"x")
    return size


def start(program: Path, stderr: int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([program], stdin=pipe, stdout=pipe, stderr=stderr, text=True)


def queue(process: subprocess.Popen[str], lines: int) -> int:
    """Let the program queue lines, and return the number of lines it has lost."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{lines}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_lines_for_a_full_pipe_are_lost_and_counted(program: Path) -> None:
    ours, theirs = os.pipe()
    nonblocking = os.open(f"/proc/self/fd/{theirs}", os.O_WRONLY | os.O_NONBLOCK)
    filled = fill(nonblocking)
    os.close(nonblocking)
    with start(program, theirs) as process, open(ours) as reader:
        os.close(theirs)
        assert queue(process, STORED + 44) == 44
        assert reader.read(filled) == "x" * filled
        for number in range(STORED):
            assert reader.readline() == f"line {number}\n"
        assert queue(process, 1) == 44
        assert "44 messages were lost" in reader.readline()
        assert reader.readline() == f"line {STORED + 44}\n"
        process.communicate()
        assert process.returncode == 0


def test_exit_does_not_wait_for_a_full_pipe(program: Path) -> None:
    ours, theirs = os.pipe()
    nonblocking = os.open(f"/proc/self/fd/{theirs}", os.O_WRONLY | os.O_NONBLOCK)
    fill(nonblocking)
    with start(program, theirs) as process:
        queue(process, 1)
        process.communicate(timeout=60)
        assert process.returncode == 0
    for fd in (ours, theirs, nonblocking):
        os.close(fd)


def test_lines_are_written_before_exit(program: Path) -> None:
    ours, theirs = os.pipe()
    with start(program, theirs) as process, open(ours) as reader:
        os.close(theirs)
        process.communicate("3")
        assert reader.read() == "line 0\nline 1\nline 2\n"
