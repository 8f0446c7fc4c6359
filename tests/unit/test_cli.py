# SPDX-License-Identifier: GPL-2.0-or-later
"""Test ``qemu-prefault`` as a process with real streams."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from qemu_prefault import __version__
from qemu_prefault.cli.options import index_list_type, range_type, size_type
from qemu_prefault.text import printable

TOOL = [sys.executable, "-m", "qemu_prefault"]
MIB, GIB = 1 << 20, 1 << 30
DEMOTE = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def spawn(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, timeout=60, check=False, **options)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the tool and check that its output contains no traceback."""
    done = spawn([*TOOL, *arguments], **options)
    if "--debug" not in arguments:
        assert "Traceback" not in (done.stderr or ""), done.stderr
        assert "internal error" not in (done.stderr or ""), done.stderr
    return done


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which ``$tool`` is the tool's command."""
    return spawn(["bash", "-c", script], env=os.environ | {"tool": " ".join(TOOL)})


# --- imports ---


def test_help_imports_no_heavy_modules() -> None:
    program = (
        "import sys; sys.argv = ['qemu-prefault', '--help']\n"
        "from qemu_prefault.cli.main import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = spawn([sys.executable, "-c", program])
    assert done.returncode == 0
    heavy = {"asyncio", "cffi", "_cffi_backend", "qemu.qmp", "ctypes", "multiprocessing"}
    assert heavy & set(done.stderr.split()) == set()
    ours = {name for name in done.stderr.split() if name.startswith("qemu_prefault.")}
    assert not any(
        name.startswith(f"qemu_prefault.{layer}")
        for name in ours
        for layer in ("api", "engine", "agents", "qemu", "host", "libvirt.", "conformance.")
    )


# --- help, version, completion ---


def test_runs_as_module_and_command() -> None:
    as_module = run("--version")
    command = Path(sys.executable).with_name("qemu-prefault")
    if not command.exists():
        pytest.skip("the package is not installed in this environment")
    as_command = spawn([command, "--version"])
    assert as_module.stdout == as_command.stdout == f"qemu-prefault, version {__version__}\n"


def test_help_documents_the_contract() -> None:
    done = run("--help")
    assert done.returncode == 0
    contract = ["--qmp", "--pid", "--agent", "--populate", "--range", "--json", "--dry-run"]
    for word in [*contract, "--cont", "--max-bytes", "--vcpus", "--chunk", "--debug"]:
        assert word in done.stdout, word
    for number, meaning in enumerate(["verified", "failed", "usage", "partial", "not supported"]):
        assert re.search(rf"\b{number} .*{meaning}", done.stdout), meaning
    for command in ("probe", "map", "stats", "demo"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE), command


def test_no_arguments_prints_usage() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout.startswith("Usage:")


def test_completion_line_in_help_works() -> None:
    (line,) = [line for line in run("--help").stdout.splitlines() if "bash_source" in line]
    assert line.strip().startswith("eval ") and line.strip().endswith('"')
    command = Path(sys.executable).parent
    script = f"PATH={command}:$PATH; {line.strip()}; complete -p qemu-prefault"
    done = shell(script)
    assert done.returncode == 0, done.stderr
    assert "_qemu_prefault_completion" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--qmp", "/x", "--domain", "a"], "either --qmp SOCK or --domain NAME"),
        (["probe", "--qmp", "/x", "--domain", "a"], "either --qmp SOCK or --domain NAME"),
        (["--domain", "a", "--incoming"], "qemu-prefault libvirt migrate"),
        (["--domain", "a", "map"], "after the command"),
        (["map"], "--domain NAME"),
    ],
)
def test_domain_names_a_monitor(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and says in done.stderr


# --- parsing values ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("010", 10),
        ("0x1000", 4096),
        ("0XFF", 255),
        ("64k", 64 << 10),
        ("64K", 64 << 10),
        ("512M", 512 * MIB),
        ("512MB", 512 * MIB),
        ("2GiB", 2 * GIB),
        (" 2g ", 2 * GIB),
        ("1T", 1 << 40),
        ("0x10M", 16 * MIB),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size_type(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1.5G", "1P", "0x", "1e9", "M", "1 000", "\u0663", "1" * 5000, "0x" + "f" * 99],
)
def test_invalid_size_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"such as .*512M"):
        size_type(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0x100000+4096", (MIB, 4096)),
        ("4G+1G", (4 * GIB, GIB)),
        ("0+1", (0, 1)),
        ("1M + 1M", (MIB, MIB)),
    ],
)
def test_ranges(text: str, value: tuple[int, int]) -> None:
    assert range_type(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "1M", "1M+", "+1M", "1M+0", "1M-2M", "1M+1M+1M", "4096T+1", "0+4097T", "a+b", "-1+2"],
)
def test_invalid_range_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"for example .*4G\+1G"):
        range_type(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", (0,)),
        ("0,2-3", (0, 2, 3)),
        ("3,1", (3, 1)),
        ("1,1-2,2", (1, 2)),
        ("0-0", (0,)),
        (" 1 , 2 ", (1, 2)),
    ],
)
def test_vcpu_lists(text: str, value: tuple[int, ...]) -> None:
    assert index_list_type(text) == value


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1-2-3", "1000000", "\u0663"])
def test_invalid_vcpu_list_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match="such as 0,2-3"):
        index_list_type(text)


USAGE = {
    "a bad size": (["--max-bytes", "much"], "512M"),
    "a bad range": (["--range", "1M"], "4G+1G"),
    "bad vCPUs": (["--vcpus", "3-1"], "0,2-3"),
    "unaligned chunk": (["--chunk", "5000"], "multiple of 4096"),
    "empty chunk": (["--chunk", "0"], "multiple of 4096"),
    "budget below a page": (["--max-bytes", "1K"], "at least one page"),
    "unknown policy": (["--populate", "some"], "resident"),
    "unknown agent": (["--agent", "telepathy"], "attach"),
    "pid zero": (["--pid", "0"], "x>=1"),
    "unknown option": (["--fast"], "--fast"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_error_exits_2_with_a_correction(name: str) -> None:
    arguments, words = USAGE[name]
    done = run("--qmp", "/nowhere", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr


def test_option_before_a_command_is_rejected() -> None:
    done = run("--qmp", "/nowhere", "map")
    assert done.returncode == 2
    assert "qemu-prefault map --qmp" in done.stderr


@pytest.mark.parametrize("command", [["--dry-run"], ["map"], ["stats"], ["probe"]])
def test_missing_socket_option_is_a_usage_error(command: list[str]) -> None:
    done = run(*command)
    assert done.returncode == 2
    assert "--qmp SOCK" in done.stderr


# --- failures ---


@pytest.fixture
def foreign_socket(tmp_path: Path) -> Path:
    """Return the path of a listening socket to which only root may connect."""
    path = tmp_path / "private"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    path.chmod(0o600)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.owner() == path.owner() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    return path


@pytest.mark.parametrize("command", [[], ["map"], ["stats"], ["probe"]])
def test_absent_socket(command: list[str]) -> None:
    done = run(*command, "--qmp", "/nowhere/qmp")
    assert done.returncode == 2
    assert "the socket /nowhere/qmp does not exist" in done.stderr
    assert "-qmp unix:PATH" in done.stderr


def test_directory_and_regular_file_are_not_sockets(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", Path("/dev/null")):
        done = run("--qmp", str(path))
        assert done.returncode in (1, 2)
        assert "not a socket" in done.stderr


def test_socket_without_listener(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    done = run("--qmp", str(path))
    assert done.returncode in (1, 2)
    assert str(path) in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_socket_without_permission(foreign_socket: Path) -> None:
    readable = spawn([*DEMOTE, *TOOL, "--version"])
    if readable.returncode != 0:
        pytest.skip("an unprivileged user cannot run this Python")
    done = spawn([*DEMOTE, *TOOL, "--json", "--qmp", str(foreign_socket)])
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert "ermission" in error["cause"]
    assert error["remedy"]


@pytest.mark.parametrize("number", [999_999_999, 4_000_000])
def test_absent_pid(number: int) -> None:
    done = run("probe", "--pid", str(number))
    assert done.returncode == 1
    assert f"process {number} has exited" in done.stderr


def test_control_bytes_in_paths_are_escaped(tmp_path: Path) -> None:
    for name in ("\x1b[31mred\n", "\udcff", "x" * 300):
        done = run("--qmp", f"{tmp_path}/{name}")
        assert done.returncode in (1, 2)
        assert "\x1b" not in done.stderr


def test_debug_prints_traceback() -> None:
    done = run("--qmp", "/nowhere", "--debug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "InputError: the socket /nowhere does not exist" in done.stderr


def test_peer_text_is_escaped() -> None:
    assert printable("a\x1b[2Jb\r\x9b\u202e") == r"a\x1b[2Jb\r\x9b\u202e"
    assert printable("größer … 2 MiB → gut") == "größer … 2 MiB → gut"


# --- JSON ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["--qmp", "/nowhere"],
        ["probe", "--pid", "999999999"],
        ["--qmp", "127.0.0.1:1"],
        [],
        ["--qmp", "/nowhere", "--range", "x"],
        ["map"],
        ["--frobnicate"],
        ["frobnicate"],
    ],
    ids=" ".join,
)
def test_json_error_is_one_object(arguments: list[str]) -> None:
    done = run(*arguments, "--json")
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    assert answer["exit"] == done.returncode > 0
    assert set(answer["error"]) == {"code", "cause", "remedy"}
    assert all(answer["error"].values())
    assert answer["error"]["cause"] in done.stderr  # stderr contains the cause as text


def test_probe_pid_prints_json() -> None:
    done = run("probe", "--pid", str(os.getpid()), "--json")
    answer = json.loads(done.stdout)
    assert answer["pid"] == os.getpid()
    assert answer["exit"] == done.returncode
    assert {"kernel", "kvm", "attach"} <= {finding["check"] for finding in answer["findings"]}
    for finding in answer["findings"]:
        assert finding["verdict"] in ("ok", "no", "note")
        assert finding["verdict"] == "ok" or finding["remedy"] or finding["check"] == "kvm"


# --- broken streams ---

PROBE = f"$tool probe --pid {os.getpid()}"
FAILING = "$tool --qmp /nowhere"


@pytest.mark.parametrize("command", [PROBE, f"{FAILING} --json", "$tool --help"])
@pytest.mark.parametrize("stream", ["| head -0", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams_print_no_traceback(command: str, stream: str) -> None:
    done = shell(f"{command} {stream}")
    for words in ("Traceback", "Exception ignored", "internal error"):
        assert words not in done.stderr, done.stderr


@pytest.mark.parametrize("command", [FAILING, "$tool --no-such-option"])
@pytest.mark.parametrize("stream", [">&-", "2>&-", "2>/dev/full"])
def test_closed_streams_keep_the_exit_status(command: str, stream: str) -> None:
    assert shell(f"{command} {stream}").returncode == 2


@pytest.mark.parametrize("command", [PROBE, f"{PROBE} --json", "$tool --help"])
def test_unwritable_result_fails(command: str) -> None:
    done = shell(f"{command} >/dev/full")
    assert done.returncode == 1
    assert "could not be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_ascii_locale_is_supported() -> None:
    done = run("probe", "--pid", str(os.getpid()), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout


def test_stdout_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        done = run("--qmp", "/nowhere", stdout=theirs, stderr=theirs)
    finally:
        os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 2
    assert "does not exist" in shown
    assert "Traceback" not in shown
