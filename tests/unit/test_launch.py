# SPDX-License-Identifier: GPL-2.0-or-later
"""Test ``run``, ``plugin-path`` and the parsing that finds the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import bound_path, plugin_path
from qemu_prefault.cli.format import event_line

TABLE = """\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 21345 /run/vm.qmp
0000000000000000: 00000003 00000000 00000000 0001 03 21346
0000000000000000: 00000002 00000000 00010000 0001 01 991 /run/with a space.sock
0000000000000000: 00000002 00000000 00010000 0001 01 9911 @abstract
"""


@pytest.mark.parametrize(
    "link, path",
    [
        ("socket:[21345]", "/run/vm.qmp"),
        ("socket:[991]", "/run/with a space.sock"),
        ("socket:[21346]", None),
        ("socket:[99]", None),
        ("/dev/kvm", None),
        ("", None),
    ],
)
def test_bound_path_of_a_socket(link: str, path: str | None) -> None:
    assert bound_path(TABLE, link) == path


def test_event_is_one_line() -> None:
    line = event_line(
        {"event": "prefaulted", "time": 0, "why": "new memory", "bytes": 3 << 20, "seconds": 0.25}
    )
    assert line.split(" ", 1)[1].split() == ["prefaulted", "3.0", "MiB", "in", "0.250", "s",
                                             "(new", "memory)"]  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qemu_prefault", "run", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_run_execs_the_command() -> None:
    """The command keeps the process id and its arguments, and its exit status is returned."""
    script = 'echo $$ "$@" "$LD_PRELOAD" "$QEMU_PREFAULT_OPTIONS"; exit 7'
    argv = [sys.executable, "-m", "qemu_prefault", "run", "-o", "hold=2", "-o", "log=on"]
    with subprocess.Popen(
        [*argv, "--", "sh", "-c", script, "sh", "-accel", "kvm", "--", "--help", "a b"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        line = process.stdout.read()
    assert process.returncode == 7
    assert line == f"{process.pid} -accel kvm -- --help a b {plugin_path()} hold=2,log=on\n"


def test_run_keeps_existing_ld_preload() -> None:
    result = run("--", "sh", "-c", 'echo "$LD_PRELOAD"', LD_PRELOAD="/nonexistent.so")
    assert result.stdout == f"{plugin_path()}:/nonexistent.so\n"


def test_signal_exit_status_is_the_commands() -> None:
    assert run("--", "sh", "-c", "kill -TERM $$").returncode == -15


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--", "no-such-qemu"], "no-such-qemu is not an executable program"),
        (["-o", "colour=red", "--", "true"], "keep, populate, quirk, hold, socket, log"),
        (["-o", "hold", "--", "true"], "KEY=VALUE"),
        (["-o", "hold=1,keep=off", "--", "true"], "KEY=VALUE"),
        ([], "Missing argument"),
    ],
)
def test_usage_errors_have_a_remedy(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_setuid_program_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o4755)
    if os.geteuid() == 0:
        os.chown(program, 65534, 65534)
        program.chmod(0o6755)
    else:
        pytest.skip("only root can make a program set-uid to another user")
    result = run("--", str(program))
    assert result.returncode == 4
    assert "-plugin" in result.stderr


def test_plugin_path_is_loadable() -> None:
    command = [sys.executable, "-m", "qemu_prefault", "plugin-path"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert path.read_bytes()[:4] == b"\x7fELF"
