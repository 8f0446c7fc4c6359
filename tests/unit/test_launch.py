# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the ``run`` and ``plugin-path`` commands, and detection of the plugin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault.agents.plugin_socket import bound_paths
from qemu_prefault.cli.format import event_line
from qemu_prefault.host.executable import is_static, script_interpreter

TABLE = b"""\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 21345 /run/vm.qmp
0000000000000000: 00000003 00000000 00000000 0001 03 21346
0000000000000000: 00000002 00000000 00010000 0001 01   991 /run/with a space.sock
0000000000000000: 00000002 00000000 00010000 0001 01 9911 @abstract
0000000000000000: 00000002 00000000 00010000 0001 01 77 /tmp/caf\xe9
0 0 0 0 0 0 991 /tmp/not-a-line
0000000000000000: 00000002 00000000 00010000 0001 01 991 /tmp/forged
"""


@pytest.mark.parametrize(
    "inode, paths",
    [
        (21345, [b"/run/vm.qmp"]),
        (991, [b"/run/with a space.sock", b"/tmp/forged"]),
        (77, [b"/tmp/caf\xe9"]),
        (21346, []),
        (9911, []),
        (99, []),
    ],
)
def test_bound_paths_of_a_socket(inode: int, paths: list[bytes]) -> None:
    assert bound_paths(TABLE, inode) == paths


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
    """Check the command's process id, arguments, environment and exit status."""
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
        (
            ["-o", "colour=red", "--", "true"],
            "keep, populate, vcpu, start, rate, quirk, hold, socket, log",
        ),
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
        pytest.skip("only root can make a set-user-ID program of another user")
    result = run("--", str(program))
    assert result.returncode == 4
    assert "-plugin" in result.stderr


# --- programs that do not load the plugin ---


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with programs that are linked in several ways."""
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    directory = tmp_path_factory.mktemp("programs")
    source = directory / "main.c"
    source.write_text("int main(void) { return 0; }\n")
    for name, flags in (
        ("qemu-static", ["-static"]),
        ("qemu-static-pie", ["-static-pie"]),
        ("qemu-dynamic", []),
        ("qemu-fixed", ["-no-pie"]),
    ):
        subprocess.run(["cc", *flags, source, "-o", directory / name], check=True)
    script = directory / "script"
    script.write_text(f"#!{directory}/qemu-static\n")
    second = directory / "second-script"
    second.write_text(f"#! {script} -x\n")
    for path in (script, second):
        path.chmod(0o755)
    return directory


@pytest.mark.parametrize("wrapper", [(), ("nice", "-n", "5"), ("env", "A=b")])
@pytest.mark.parametrize("name", ["qemu-static", "qemu-static-pie"])
def test_static_program_is_refused(programs: Path, name: str, wrapper: tuple[str, ...]) -> None:
    result = run("--", *wrapper, str(programs / name))
    assert result.returncode == 4
    assert f"{programs / name} is statically linked" in result.stderr
    assert "qemu-prefault --qmp" in result.stderr


@pytest.mark.parametrize("name", ["qemu-dynamic", "qemu-fixed"])
@pytest.mark.parametrize("wrapper", [(), ("nice",), ("env", "-u", "A", "B=c"), ("timeout", "9")])
def test_dynamic_program_is_run(programs: Path, name: str, wrapper: tuple[str, ...]) -> None:
    result = run("--", *wrapper, str(programs / name))
    assert (result.returncode, result.stderr) == (0, "")


def test_dynamic_linker_is_run(programs: Path) -> None:
    """Run the dynamic linker, which reads LD_PRELOAD although it has no interpreter."""
    linker = Path("/lib64/ld-linux-x86-64.so.2")
    if not linker.exists():
        pytest.skip("no glibc")
    assert run("--", str(linker), str(programs / "qemu-dynamic")).returncode == 0


def test_other_files_are_not_static(tmp_path: Path) -> None:
    file = tmp_path / "file"
    whole = Path("/bin/true").read_bytes()
    for content in (b"", b"\x7fELF", whole[:40], whole[:64], b"#!/bin/sh\n", bytes(64)):
        file.write_bytes(content)
        assert not is_static(str(file))
    assert not is_static(str(tmp_path)) and not is_static("/nonexistent")


@pytest.mark.parametrize("name", ["script", "second-script"])
def test_static_script_interpreter_causes_warning(programs: Path, name: str) -> None:
    """Check that a script with a static interpreter runs, with a warning.

    The interpreter does not load the plugin, but the programs that it starts can.
    """
    result = run("--", str(programs / name))
    assert result.returncode == 0
    cause = f"{programs / name} is a script"
    assert f"QEMU might start without the plugin, because {cause}" in result.stderr
    assert result.stderr.endswith(", which is statically linked\n")


def test_script_interpreter_loop_ends(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{script}\n")
    assert script_interpreter(str(script)) == str(script)


@pytest.mark.parametrize(
    ("command", "warned"),
    [
        ("env -i {qemu}", True),
        ("env - {qemu}", True),
        ("env -u LD_PRELOAD {qemu}", True),
        ("env --unset=LD_PRELOAD {qemu}", True),
        ("env LD_PRELOAD= {qemu}", True),
        ("nice env -i {qemu}", True),
        ("nice -n 1 env A=b {qemu}", False),
        ("env {qemu} -i", False),
        ("{qemu} -name sudo", False),
        ("sh -c true sudo", False),
    ],
)
def test_wrapper_that_clears_environment_causes_warning(
    programs: Path, command: str, warned: bool
) -> None:
    result = run("--", *command.format(qemu=programs / "qemu-dynamic").split())
    assert result.returncode == 0
    assert ("QEMU might start without the plugin" in result.stderr) == warned
    assert result.stderr.count("\n") == warned


@pytest.mark.parametrize("name", ["sudo", "systemd-run", "ssh"])
def test_wrapper_that_may_drop_preload_causes_warning(tmp_path: Path, name: str) -> None:
    wrapper = tmp_path / name
    wrapper.symlink_to("/bin/true")
    result = run("--", str(wrapper), "qemu-system-x86_64")
    assert f"{name} might start QEMU without LD_PRELOAD" in result.stderr


def test_plugin_path_is_loadable() -> None:
    command = [sys.executable, "-m", "qemu_prefault", "plugin-path"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert path.read_bytes()[:4] == b"\x7fELF"
