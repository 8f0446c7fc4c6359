# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the lab in Bochs: its commands, files and snapshots, and its detection of a lost L1.

The tests also check what each patch in patches/bochs fixes. They need the lab's build tools and a
C++ compiler, but not KVM.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault.errors import InputError
from qemu_prefault_lab import BochsLab, LabLostError, RemoteCommandError, RemoteTimeoutError, cache
from qemu_prefault_lab.image import compile_static
from qemu_prefault_lab.launch import start_lab

pytestmark = pytest.mark.lab

ASK_CAPABILITY = "import fcntl, os; print(fcntl.ioctl(os.open('/dev/kvm', os.O_RDWR), 0xAE03, 236))"
VMX_GUEST = Path(__file__).with_name("vmx_guest.c")


@pytest.fixture(scope="module")
def lab() -> Iterator[BochsLab]:
    with BochsLab.start() as lab:
        yield lab


class TestRun:
    def test_output_and_exit_status(self, lab: BochsLab) -> None:
        result = lab.run(["sh", "-c", "echo out; echo err >&2; exit 7"], check=False)
        assert (result.returncode, result.stdout, result.stderr) == (7, b"out\n", b"err\n")

    def test_signal_gives_negative_status(self, lab: BochsLab) -> None:
        result = lab.run(["sh", "-c", "kill -9 $$"], check=False)
        assert result.returncode == -signal.SIGKILL

    def test_absent_command(self, lab: BochsLab) -> None:
        with pytest.raises(RemoteCommandError, match="/does/not/exist"):
            lab.run(["/does/not/exist"])

    def test_stdin_is_binary(self, lab: BochsLab) -> None:
        data = os.urandom(3 << 20)
        assert lab.run(["cat"], stdin=data).stdout == data

    def test_large_output(self, lab: BochsLab) -> None:
        result = lab.run(["sh", "-c", "head -c 10000000 /dev/urandom | tee /tmp/big"])
        there = lab.run(["sha256sum", "/tmp/big"]).text.split()[0]
        lab.run(["rm", "/tmp/big"])
        assert len(result.stdout) == 10_000_000
        assert hashlib.sha256(result.stdout).hexdigest() == there

    def test_concurrent_commands(self, lab: BochsLab) -> None:
        # The first command waits for the second one, so the lab must run them concurrently.
        lab.run(["mkfifo", "/tmp/fifo"])
        results: dict[str, bytes] = {}

        def reader() -> None:
            results["reader"] = lab.run(["cat", "/tmp/fifo"], timeout=600).stdout

        thread = threading.Thread(target=reader)
        thread.start()
        lab.run(["sh", "-c", "echo across >/tmp/fifo"], timeout=600)
        thread.join()
        assert results == {"reader": b"across\n"}

    def test_timeout_kills_command_and_children(self, lab: BochsLab) -> None:
        script = "echo begun; sleep 4321 & sleep 4321"
        with pytest.raises(RemoteTimeoutError) as caught:
            lab.run(["sh", "-c", script], timeout=2)
        assert caught.value.stdout == b"begun\n"
        assert lab.run(["pgrep", "-f", "sleep 4321"], check=False).stdout == b""


class TestFiles:
    def test_file_round_trip(self, lab: BochsLab, tmp_path: Path) -> None:
        source, back = tmp_path / "source", tmp_path / "back"
        source.write_bytes(os.urandom(5_000_001))
        source.chmod(0o750)
        lab.put(source, "/tmp/round/file")
        assert lab.run(["stat", "-c", "%a", "/tmp/round/file"]).text == "750\n"
        lab.get("/tmp/round/file", back)
        assert back.read_bytes() == source.read_bytes()

    def test_directory_round_trip(self, lab: BochsLab, tmp_path: Path) -> None:
        source, back = tmp_path / "source", tmp_path / "back"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "name with blank").write_bytes(b"\0\xff")
        (source / "link").symlink_to("sub")
        lab.put(source, "/tmp/tree")
        lab.get("/tmp/tree", back)
        assert (back / "sub" / "name with blank").read_bytes() == b"\0\xff"
        assert (back / "link").readlink() == Path("sub")

    def test_installed_source_runs(self, lab: BochsLab) -> None:
        lab.install_source()
        assert lab.run(["python3", "-c", "import qemu_prefault, qemu_prefault_lab"]).stdout == b""


class TestLost:
    """Tests that lose L1.

    The tests' commands never exit on their own, so the lab must detect the loss.
    """

    @pytest.mark.full
    def test_kernel_panic_is_reported_with_the_console(self) -> None:
        with BochsLab.start() as lab, pytest.raises(LabLostError) as caught:
            lab.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100000"], timeout=1e6)
        assert "sysrq triggered crash" in str(caught.value)

    @pytest.mark.full
    def test_silent_command_server(self) -> None:
        with BochsLab.start(heartbeat_limit=20) as lab, pytest.raises(LabLostError) as caught:
            lab.run(["sh", "-c", "kill -STOP $PPID; sleep 1000000"], timeout=1e6)
        assert "no message from L1's command server" in caught.value.cause

    def test_killed_bochs(self) -> None:
        with BochsLab.start() as lab, pytest.raises(LabLostError) as caught:
            os.kill(lab.emulator_pid, signal.SIGKILL)
            lab.run(["sleep", "1000000"], timeout=1e6)
        assert "Bochs exited with status -9" in caught.value.cause

    @pytest.mark.full
    def test_killed_parent_leaves_no_bochs(self) -> None:
        program = (
            "from qemu_prefault_lab import BochsLab\n"
            "lab = BochsLab.start()\n"
            "print(lab.emulator_pid, flush=True)\n"
            "lab.run(['sleep', '1000000'], timeout=1e6)\n"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
            assert parent.stdout
            bochs = os.pidfd_open(int(parent.stdout.readline()))
            parent.kill()
        ended, _, _ = select.select([bochs], [], [], 30)
        os.close(bochs)
        assert ended

    @pytest.mark.full
    def test_power_off(self) -> None:
        with BochsLab.start() as lab:
            lab.power_off()


class TestSnapshot:
    def test_every_lab_starts_from_the_same_snapshot(self) -> None:
        identities = []
        for _ in range(2):
            with BochsLab.start() as lab:
                identities.append(lab.run(["cat", "/proc/sys/kernel/random/boot_id"]).text)
                assert lab.run(["test", "-e", "/root/mark"], check=False).returncode == 1
                lab.run(["touch", "/root/mark"])
        assert identities[0] == identities[1]

    @pytest.mark.full
    def test_two_labs_run_at_once(self, lab: BochsLab) -> None:
        with BochsLab.start() as other:
            other.run(["touch", "/tmp/other"])
            assert lab.run(["test", "-e", "/tmp/other"], check=False).returncode == 1

    @pytest.mark.full
    def test_broken_snapshot_is_discarded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with tempfile.TemporaryDirectory(dir=cache.subdirectory("scratch")) as name:
            copy = Path(name)
            used = ("bin-", "bochs-", "files-ept-", "image-ept-", "l2-ept-", "l2-kernel-ept-")
            for entry in cache.cache_dir().iterdir():
                if entry.name.startswith((*used, "snapshot-ept-")):
                    # The cache accepts no links to other directories.
                    shutil.copytree(entry, copy / entry.name, True, copy_function=os.link)
            monkeypatch.setenv("QEMU_PREFAULT_CACHE", name)
            # The key contains the paths of the entries, so this cache has no snapshot of its own.
            with BochsLab.start() as lab:
                lab.run(["true"])
            saved = max(copy.glob("snapshot-ept-*"), key=lambda path: path.stat().st_mtime)
            configuration = saved / "saved" / "config"
            configuration.write_text("nonsense\n")
            with BochsLab.start() as lab:
                assert lab.run(["echo", "booted"]).text == "booted\n"
            assert not saved.exists()

    def test_scratch_directory_is_removed(self) -> None:
        scratch = cache.subdirectory("scratch")
        before = set(scratch.glob("bochs-*"))
        with BochsLab.start():
            assert len(set(scratch.glob("bochs-*")) - before) == 1
        assert set(scratch.glob("bochs-*")) <= before


@pytest.mark.parametrize(
    ("variant", "ept", "capability"),
    [
        ("ept", True, 1),
        pytest.param("ept", False, 0, marks=pytest.mark.full),
        pytest.param("ept-sid", True, 1, marks=pytest.mark.full),
    ],
)
def test_kvm_capability_of_each_variant(variant: str, ept: bool, capability: int) -> None:
    with start_lab(variant, npt=ept) as lab:
        parameter = lab.run(["cat", "/sys/module/kvm_intel/parameters/ept"]).text.strip()
        assert parameter == ("Y" if ept else "N")
        assert int(lab.run(["python3", "-c", ASK_CAPABILITY]).text) == capability


@pytest.mark.full
def test_module_parameters() -> None:
    with start_lab("ept", module_parameters=["kvm_intel.pml=0", "kvm_intel.eptad=0"]) as lab:
        for name in ("pml", "eptad"):
            assert lab.run(["cat", f"/sys/module/kvm_intel/parameters/{name}"]).text == "N\n"


def test_numa_is_refused() -> None:
    with pytest.raises(InputError, match="NUMA"):
        start_lab("ept", nodes_mib=(1024, 1024))


RunGuest = Callable[[str], str]


@pytest.fixture(scope="module")
def run_guest(lab: BochsLab) -> RunGuest:
    """Return a function that runs a small KVM guest and returns its output."""
    lab.put(compile_static(VMX_GUEST), "/root/vmx_guest")
    return lambda name: lab.run(["/root/vmx_guest", name], timeout=60).text


class TestPatches:
    """What the patches in patches/bochs fix."""

    def test_guest_without_interrupts_is_interrupted(self, run_guest: RunGuest) -> None:
        assert run_guest("busy") == "interrupted 1\n"

    def test_masked_virtual_interrupt_stays_pending(self, run_guest: RunGuest) -> None:
        assert run_guest("masked") == "delivered with IF=0: 0\n"

    def test_faulting_virtual_interrupt_is_delivered_again(self, run_guest: RunGuest) -> None:
        assert run_guest("faulting") == "interrupts: 1, breakpoints: 1\n"

    def test_posted_interrupt_descriptor_needs_no_page(self, run_guest: RunGuest) -> None:
        assert run_guest("irqchip") == "output 42\n"

    @pytest.mark.full
    def test_memory_above_two_gibibytes(self, lab: BochsLab) -> None:
        script = "head -c 2500M /dev/zero >/dev/shm/zero && stat -c %s /dev/shm/zero"
        with contextlib.suppress(RemoteCommandError):
            lab.run(["mount", "-o", "remount,size=3G", "/dev/shm"])
        assert lab.run(["sh", "-c", script]).text.strip() == str(2500 << 20)
        lab.run(["rm", "/dev/shm/zero"])

    @pytest.mark.full
    def test_idle_time_is_skipped(self, lab: BochsLab) -> None:
        """Compare the CPU time that Bochs uses for a sleep with that for a loop.

        For the sleep, Bochs needs a quarter of the time for the loop, and almost as much as for the
        loop without the patch.
        """
        start = _cpu_seconds(lab.emulator_pid)
        lab.run(["sleep", "60"], timeout=600)
        slept = _cpu_seconds(lab.emulator_pid)
        lab.run(["python3", "-c", "for _ in range(2_000_000): pass"], timeout=600)
        assert slept - start < (_cpu_seconds(lab.emulator_pid) - slept) / 2


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
