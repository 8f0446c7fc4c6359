# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the lab's commands, files and snapshots, and its detection of a lost L1.

The tests need the lab's build tools (mmdebstrap, mke2fs, a C compiler) but not KVM. The first run
of the tests builds the images, as ``python -m qemu_prefault_lab build`` does.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_prefault_lab import (
    Lab,
    LabLostError,
    LocalMachine,
    Machine,
    RemoteCommandError,
    RemoteTimeoutError,
    cache,
)
from qemu_prefault_lab.machine import kvm_can_prefault

pytestmark = pytest.mark.lab

# Query KVM_CAP_PRE_FAULT_MEMORY without this project's code.
ASK_CAPABILITY = "import fcntl, os; print(fcntl.ioctl(os.open('/dev/kvm', os.O_RDWR), 0xAE03, 236))"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.start("trixie") as lab:
        yield lab


@pytest.fixture(params=["nested", "local"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Yield L1 or this host, because the tests must pass on both kinds of machine."""
    if request.param == "nested":
        yield request.getfixturevalue("lab")
    elif not kvm_can_prefault():
        pytest.skip("this host's own KVM cannot prefault")
    else:
        with LocalMachine() as local:
            yield local


class TestRun:
    def test_output_and_exit_status(self, machine: Machine) -> None:
        result = machine.run(["sh", "-c", "echo out; echo err >&2; exit 7"], check=False)
        assert (result.returncode, result.stdout, result.stderr) == (7, b"out\n", b"err\n")

    def test_failure_raises_with_stderr(self, machine: Machine) -> None:
        with pytest.raises(RemoteCommandError, match="no such thing") as caught:
            machine.run(["sh", "-c", "echo no such thing >&2; exit 1"])
        assert caught.value.stderr == b"no such thing\n"

    def test_signal_gives_negative_status(self, machine: Machine) -> None:
        result = machine.run(["sh", "-c", "kill -9 $$"], check=False)
        assert result.returncode == -signal.SIGKILL

    def test_absent_command(self, machine: Machine) -> None:
        with pytest.raises(RemoteCommandError, match="/does/not/exist"):
            machine.run(["/does/not/exist"])

    def test_stdin_is_binary(self, machine: Machine) -> None:
        data = os.urandom(3 << 20)
        assert machine.run(["cat"], stdin=data).stdout == data

    def test_unread_stdin(self, machine: Machine) -> None:
        assert machine.run(["echo", "done"], stdin=bytes(1 << 20)).stdout == b"done\n"

    def test_environment_and_directory(self, machine: Machine) -> None:
        result = machine.run(
            ["sh", "-c", "echo $GREETING; pwd"], env={"GREETING": "hi"}, cwd="/usr"
        )
        assert result.text == "hi\n/usr\n"

    def test_output_is_streamed(self, machine: Machine) -> None:
        seen: list[tuple[int, bytes]] = []
        machine.run(["sh", "-c", "echo one; echo two >&2"], on_output=lambda *a: seen.append(a))
        assert sorted(seen) == [(1, b"one\n"), (2, b"two\n")]

    def test_large_output(self, lab: Lab) -> None:
        result = lab.run(["sh", "-c", "head -c 50000000 /dev/urandom | tee /tmp/big; rm -f /tmp/x"])
        there = lab.run(["sha256sum", "/tmp/big"]).text.split()[0]
        lab.run(["rm", "/tmp/big"])
        assert len(result.stdout) == 50_000_000
        assert hashlib.sha256(result.stdout).hexdigest() == there

    def test_daemon_does_not_block_its_command(self, lab: Lab) -> None:
        result = lab.run(["sh", "-c", "sleep 1000 & echo $!"], timeout=60)
        lab.run(["kill", result.text.strip()])

    def test_concurrent_commands(self, lab: Lab) -> None:
        # The first command waits for the second one, so the lab must run them concurrently.
        lab.run(["mkfifo", "/tmp/fifo"])
        results: dict[str, bytes] = {}

        def reader() -> None:
            results["reader"] = lab.run(["cat", "/tmp/fifo"], timeout=120).stdout

        thread = threading.Thread(target=reader)
        thread.start()
        lab.run(["sh", "-c", "echo across >/tmp/fifo"], timeout=120)
        thread.join()
        assert results == {"reader": b"across\n"}

    def test_timeout_kills_command_and_children(self, lab: Lab) -> None:
        script = "echo begun; sleep 4321 & sleep 4321"
        with pytest.raises(RemoteTimeoutError) as caught:
            lab.run(["sh", "-c", script], timeout=2)
        assert caught.value.stdout == b"begun\n"
        assert lab.run(["pgrep", "-f", "sleep 4321"], check=False).stdout == b""

    def test_timeout_kills_a_command_that_ignores_sigterm(self, lab: Lab) -> None:
        with pytest.raises(RemoteTimeoutError):
            lab.run(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], timeout=1)


class TestFiles:
    def test_file_round_trip(self, machine: Machine, tmp_path: Path) -> None:
        source, back = tmp_path / "source", tmp_path / "back"
        source.write_bytes(os.urandom(5_000_001))
        source.chmod(0o750)
        machine.put(source, f"/tmp/qemu-prefault-{os.getpid()}/file")
        mode = machine.run(["stat", "-c", "%a", f"/tmp/qemu-prefault-{os.getpid()}/file"]).text
        machine.get(f"/tmp/qemu-prefault-{os.getpid()}/file", back)
        machine.run(["rm", "-r", f"/tmp/qemu-prefault-{os.getpid()}"])
        assert mode == "750\n"
        assert back.read_bytes() == source.read_bytes()

    def test_directory_round_trip(self, machine: Machine, tmp_path: Path) -> None:
        source, back = tmp_path / "source", tmp_path / "back"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "name with blank").write_bytes(b"\0\xff")
        (source / "link").symlink_to("sub")
        machine.put(source, f"/tmp/qemu-prefault-{os.getpid()}")
        machine.get(f"/tmp/qemu-prefault-{os.getpid()}", back)
        machine.run(["rm", "-r", f"/tmp/qemu-prefault-{os.getpid()}"])
        assert (back / "sub" / "name with blank").read_bytes() == b"\0\xff"
        assert (back / "link").readlink() == Path("sub")

    def test_get_absent_file(self, machine: Machine, tmp_path: Path) -> None:
        with pytest.raises(RemoteCommandError, match="No such file"):
            machine.get("/nowhere/file", tmp_path / "file")

    def test_installed_wheel_has_its_commands(self, machine: Machine, tmp_path: Path) -> None:
        wheel = tmp_path / "greeting-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("greeting.py", "def main():\n    print('installed')\n    return 3\n")
            archive.writestr(
                "greeting-1.dist-info/entry_points.txt",
                "[console_scripts]\ngreet = greeting:main\n",
            )
        machine.install([wheel])
        result = machine.run(["greet"], check=False)
        assert (result.returncode, result.text) == (3, "installed\n")


class TestLost:
    """Tests that lose L1.

    The tests' commands never exit on their own, so the lab must detect the loss.
    """

    def test_kernel_panic_is_reported_with_the_console(self) -> None:
        with Lab.start("trixie") as lab, pytest.raises(LabLostError) as caught:
            lab.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"])
        assert "sysrq triggered crash" in str(caught.value)

    def test_silent_command_server(self) -> None:
        with Lab.start("trixie", heartbeat_limit=5) as lab, pytest.raises(LabLostError) as caught:
            lab.run(["sh", "-c", "kill -STOP $PPID; sleep 1000"])
        assert "no message from L1's command server" in caught.value.cause

    def test_killed_qemu(self) -> None:
        with Lab.start("trixie") as lab, pytest.raises(LabLostError) as caught:
            os.kill(lab.emulator_pid, signal.SIGKILL)
            lab.run(["sleep", "1000"])
        assert "QEMU exited with status -9" in caught.value.cause
        assert caught.value.emulator_status == -signal.SIGKILL

    def test_commands_after_a_loss_fail_fast(self) -> None:
        with Lab.start("trixie") as lab:
            for _ in range(2):
                with pytest.raises(LabLostError):
                    lab.run(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 1000"])

    def test_killed_parent_leaves_no_qemu(self) -> None:
        program = (
            "import sys, time\n"
            "from qemu_prefault_lab import Lab\n"
            "lab = Lab.start('trixie')\n"
            "print(lab.emulator_pid, flush=True)\n"
            "lab.run(['sleep', '1000'])\n"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
            assert parent.stdout
            qemu = os.pidfd_open(int(parent.stdout.readline()))
            parent.kill()
        ended, _, _ = select.select([qemu], [], [], 30)
        os.close(qemu)
        assert ended


class TestSnapshot:
    def test_every_lab_starts_from_the_same_snapshot(self) -> None:
        identities = []
        for _ in range(2):
            with Lab.start("trixie") as lab:
                identities.append(lab.run(["cat", "/proc/sys/kernel/random/boot_id"]).text)
                assert lab.run(["test", "-e", "/root/mark"], check=False).returncode == 1
                lab.run(["touch", "/root/mark"])
        assert identities[0] == identities[1]

    def test_clock_is_right_after_a_restore(self, lab: Lab) -> None:
        before = time.time()
        there = float(lab.run(["date", "+%s.%N"]).text)
        assert before - 2 < there < time.time() + 2

    def test_broken_snapshot_is_discarded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with tempfile.TemporaryDirectory(dir=cache.subdirectory("scratch")) as name:
            copy = Path(name)
            for entry in cache.cache_dir().iterdir():
                if entry.name.startswith(("bin-", "files-", "image-trixie-", "l2-", "tcg-host-")):
                    # The cache accepts no links to other directories.
                    shutil.copytree(entry, copy / entry.name, True, copy_function=os.link)
            monkeypatch.setenv("QEMU_PREFAULT_CACHE", name)
            with Lab.start("trixie") as lab:
                lab.run(["true"])
            (saved,) = copy.glob("snapshot-*")
            state = saved / "state"
            state.write_bytes(state.read_bytes()[:1000])
            with Lab.start("trixie") as lab:
                assert lab.run(["echo", "booted"]).text == "booted\n"
            assert not list(copy.glob("snapshot-*"))


@pytest.mark.parametrize(
    ("variant", "npt", "capability"),
    [
        ("trixie", True, 1),
        ("trixie", False, 0),  # shadow paging, but the ioctl needs the TDP MMU
        ("bookworm", True, 0),  # Linux before 6.11
        ("sid", True, 1),
    ],
)
def test_kvm_capability_of_each_variant(variant: str, npt: bool, capability: int) -> None:
    with Lab.start(variant, npt=npt) as lab:
        parameter = lab.run(["cat", "/sys/module/kvm_amd/parameters/npt"]).text.strip()
        assert parameter == ("Y" if npt else "N")
        assert int(lab.run(["python3", "-c", ASK_CAPABILITY]).text) == capability
