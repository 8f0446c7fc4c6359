# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the scripts in qmp_scripts/ with a real QEMU, without the ioctl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.limits import ext4
from support.process import anonymous_bytes
from support.qemu import MIB, QemuVm, StartQemu, kvm_usable, start_vm

SCRIPTS = Path(__file__).parents[2] / "qmp_scripts"
NAMES = sorted(path.name for path in SCRIPTS.iterdir() if os.access(path, os.X_OK))
#: Arguments that a script needs in addition to its socket.
MORE_ARGUMENTS = {"prefault-incoming": ["tcp:127.0.0.1:0"], "prefault-restore": ["/no/state"]}
QMP_SHELL = shutil.which("qmp-shell", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

StartVm = Callable[..., QemuVm]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script and check that its output contains no traceback."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
    return done


@pytest.fixture
def vm_of(start_qemu: StartQemu, tmp_path: Path) -> StartVm:
    def start(*arguments: str, accel: str = "tcg", paused: bool = True) -> QemuVm:
        return start_vm(start_qemu, tmp_path, *arguments, accel=accel, paused=paused)

    return start


# --- all scripts ---


def test_scripts_are_listed_in_both_readmes() -> None:
    assert {"prefault-and-cont", "ram-map", "vcpu-fds", "watch-stage2"} <= set(NAMES)
    for readme in (SCRIPTS / "README.md", SCRIPTS.parent / "README.md"):
        assert [name for name in NAMES if f"qmp_scripts/{name}" not in readme.read_text()] == []


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [SCRIPTS / name, "--help"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"Example: qmp_scripts/{name}" in done.stdout
    assert "QMP socket" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_absent_socket_is_a_usage_error(name: str, tmp_path: Path) -> None:
    done = run(name, str(tmp_path / "nothing"), *MORE_ARGUMENTS.get(name, ()))
    assert done.returncode == 2
    cause, remedy = done.stderr.splitlines()
    assert cause.startswith(f"{name}: the socket {tmp_path / 'nothing'} does not exist")
    assert "-qmp unix:PATH" in remedy


@pytest.mark.parametrize("name", NAMES)
def test_busy_socket_is_refused_with_remedy(name: str, vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M")
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(vm.qemu.qmp)
        assert b"QMP" in other.recv(4096)
        done = run(name, vm.qemu.qmp, *MORE_ARGUMENTS.get(name, ()))
    assert done.returncode == 5
    cause, remedy = done.stderr.splitlines()
    assert cause.startswith(f"{name}: ") and "second -qmp" in remedy


# --- prefault-and-cont ---


def test_complete_prefault_starts_the_guest(vm_of: StartVm) -> None:
    vm = vm_of("-m", "128M")
    done = run("prefault-and-cont", "--populate-only", vm.qemu.qmp)
    assert done.returncode == 0, done.stderr
    assert "verified: all" in done.stdout
    assert anonymous_bytes(vm.pid) >= 128 * MIB
    assert vm.qmp.status() == "running"


def test_unsupported_guest_is_not_started(vm_of: StartVm) -> None:
    vm = vm_of("-m", "128M")
    done = run("prefault-and-cont", vm.qemu.qmp)
    assert done.returncode == 4
    assert "does not run under KVM" in done.stderr
    assert vm.qmp.status() == "prelaunch"


def test_partial_prefault_does_not_start_the_guest(vm_of: StartVm, tmp_path: Path) -> None:
    with ext4(tmp_path / "disk", 160) as disk:
        memory = disk / "memory"
        backend = f"memory-backend-file,id=ram,size=128M,share=on,mem-path={memory}"
        vm = vm_of("-m", "128M", "-machine", "pc,memory-backend=ram", "-object", backend)
        os.truncate(memory, 96 * MIB)
        done = run("prefault-and-cont", "--populate-only", "--populate", "all", vm.qemu.qmp)
    assert done.returncode == 3
    assert "PARTIAL: 32.0 MiB" in done.stdout
    assert "the guest was not started" in done.stderr
    assert vm.qmp.status() == "prelaunch"


def test_running_guest_is_refused(vm_of: StartVm) -> None:
    vm = vm_of("-m", "128M", paused=False)
    done = run("prefault-and-cont", "--populate-only", vm.qemu.qmp)
    assert done.returncode == 5
    assert f"qemu-prefault --qmp {vm.qemu.qmp}" in done.stderr
    assert anonymous_bytes(vm.pid) < 128 * MIB
    assert vm.qmp.status() == "running"


# --- ram-map ---


def test_ram_map_shows_resident_memory(vm_of: StartVm) -> None:
    vm = vm_of("-m", "128M")

    def low_ram() -> list[str]:
        done = run("ram-map", vm.qemu.qmp)
        assert done.returncode == 0, done.stderr
        assert f"pid {vm.pid}, prelaunch" in done.stdout
        return next(line.split() for line in done.stdout.splitlines() if " 0x100000 " in line)

    assert low_ram()[:4] == ["pc.ram", "0x100000", "127.0", "MiB"]
    assert "127.0" not in low_ram()[4:]
    vm.qmp.execute("qom-set", path="/objects/pc.ram", property="prealloc", value=True)
    assert low_ram()[6:10] == ["127.0", "MiB", "127.0", "MiB"]  # resident, writable


# --- vcpu-fds ---


@pytest.mark.parametrize("paused", [True, False], ids=["stopped", "running"])
def test_vcpu_fd_in_another_process_gives_eio(vm_of: StartVm, paused: bool) -> None:
    vm = vm_of("-m", "64M", "-smp", "2", accel="kvm", paused=paused)
    before = vm.qmp.status()
    done = run("vcpu-fds", vm.qemu.qmp)
    assert done.returncode == 0, done.stderr
    rows = [list(map(int, line.split())) for line in done.stdout.splitlines()[1:3]]
    for row, cpu in zip(rows, vm.qmp.execute("query-cpus-fast"), strict=True):
        index, thread, vcpu_id, fd = row
        assert (index, thread) == (cpu["cpu-index"], cpu["thread-id"])
        assert os.readlink(f"/proc/{vm.pid}/fd/{fd}") == f"anon_inode:kvm-vcpu:{vcpu_id}"
    assert "= EIO\n" in done.stdout and "kvm->mm" in done.stdout
    assert vm.qmp.status() == before


def test_no_kvm_has_no_vcpu_fds(vm_of: StartVm) -> None:
    done = run("vcpu-fds", vm_of("-m", "64M").qemu.qmp)
    assert done.returncode == 4
    assert done.stderr.splitlines()[1].strip() == "start QEMU with -accel kvm"


# --- watch-stage2 ---


Watch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Return a function that starts watch-stage2 and waits for the first values."""
    watching: list[subprocess.Popen[str]] = []

    def start(vm: QemuVm, *arguments: str) -> subprocess.Popen[str]:
        # If the tests run as a background job, SIGINT is ignored, and the child inherits this.
        command = ["env", "--default-signal=INT", sys.executable, str(SCRIPTS / "watch-stage2")]
        command += [*arguments, vm.qemu.qmp]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        watching.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().split()[:3] == ["pages_4k", "pages_2m", "pages_1g"]
        assert process.stdout.readline()
        return process

    yield start
    for process in watching:
        process.kill()
        process.communicate()


def test_watch_ends_after_count(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", accel="kvm")
    done = run("watch-stage2", "--count", "3", "--interval", "0.05", vm.qemu.qmp)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + 3


@pytest.mark.parametrize("how", ["kill", "quit"])
def test_watch_ends_with_qemu(vm_of: StartVm, watch: Watch, how: str) -> None:
    vm = vm_of("-m", "64M", accel="kvm")
    watching = watch(vm, "--interval", "600")
    if how == "kill":
        vm.qemu.kill()
    else:
        vm.qmp.execute("quit")
    stdout, stderr = watching.communicate(timeout=20)
    assert (watching.returncode, stderr) == (0, "")
    assert stdout.endswith("QEMU has exited\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_ends_quietly_on_signal(vm_of: StartVm, watch: Watch, number: int) -> None:
    vm = vm_of("-m", "64M", accel="kvm")
    watching = watch(vm, "--interval", "600")
    watching.send_signal(number)
    assert watching.communicate(timeout=20) == ("", "")
    assert watching.returncode == 0


def test_watch_needs_kvm(vm_of: StartVm) -> None:
    done = run("watch-stage2", vm_of("-m", "64M").qemu.qmp)
    assert done.returncode == 4
    assert "-accel kvm" in done.stderr


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon"])
def test_watch_rejects_invalid_interval(interval: str) -> None:
    done = run("watch-stage2", "--interval", interval, "socket")
    assert done.returncode == 2
    assert "--interval" in done.stderr.splitlines()[-1]


# --- qmp-shell ---


@pytest.mark.skipif(QMP_SHELL is None, reason="qmp-shell (qemu.qmp) is not installed")
@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_qmp_shell_accepts_every_line(vm_of: StartVm, tmp_path: Path, accel: str) -> None:
    if accel == "kvm" and not kvm_usable():
        pytest.skip("/dev/kvm is not usable")
    vm = vm_of("-m", "128M", accel=accel, paused=False)
    source = (SCRIPTS / "populate.qmp").read_text()
    done = subprocess.run(
        [QMP_SHELL or "", vm.qemu.qmp],
        input=source,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"HOME": str(tmp_path)},  # for qmp-shell's history file
    )
    assert (done.returncode, done.stderr) == (0, "")
    replies = [part.strip() for part in done.stdout.split("(QEMU) ")[1:]]
    answers = [json.loads(reply) for reply in replies if reply]
    assert len(answers) == len(source.splitlines())
    assert [answer for answer in answers if "return" not in answer] == []
    assert anonymous_bytes(vm.pid) >= 128 * MIB
    assert vm.qmp.status() == "running"
    vm.qmp.wait_event("STOP")
    counted = {stat["name"] for item in answers[4]["return"] for stat in item["stats"]}
    assert counted == ({"pages_4k", "pages_2m", "pages_1g"} if accel == "kvm" else set())
