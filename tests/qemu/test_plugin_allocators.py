# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin with allocators whose libc calls pass through its hooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import plugin_path
from support.qemu import QEMU, connect_monitor, kvm_usable

HERE = Path(__file__).parent
needs_kvm = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")


@dataclass(frozen=True)
class Allocator:
    """An allocator's library and Debian package, and an environment variable for it.

    :ivar linked: True to link the program with the library, false to use LD_PRELOAD.
    """

    name: str
    library: str = ""
    package: str = ""
    setting: str = ""
    linked: bool = False

    def path(self) -> Path:
        """Return the library's path, or skip the test if the library is not installed."""
        for directory in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"):
            if found := sorted(Path(directory).glob(self.library)):
                return found[0]
        pytest.skip(f"{self.library} is not installed (Debian: {self.package})")

    def environment(self, preload: str = "") -> dict[str, str]:
        """Return an environment that preloads ``preload`` and then the allocator."""
        names = [preload] if preload else []
        if self.library and not self.linked:
            names.append(str(self.path()))
        environment = {**os.environ}
        environment.pop("LD_PRELOAD", None)
        if names:
            environment["LD_PRELOAD"] = ":".join(names)
        key, equals, value = self.setting.partition("=")
        return {**environment, key: value} if equals else environment


JEMALLOC = ("libjemalloc.so.2", "libjemalloc2")
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc-minimal4")
MIMALLOC = ("libmimalloc.so.[0-9]", "libmimalloc2.0")
#: Each allocator with its defaults, and with settings that return memory as early as possible.
ALLOCATORS = (
    Allocator("glibc"),
    Allocator("jemalloc", *JEMALLOC),
    Allocator("jemalloc-decay", *JEMALLOC, "MALLOC_CONF=dirty_decay_ms:0,muzzy_decay_ms:0"),
    Allocator("jemalloc-threads", *JEMALLOC, "MALLOC_CONF=background_thread:true,tcache:false"),
    Allocator("tcmalloc", *TCMALLOC),
    Allocator("tcmalloc-decommit", *TCMALLOC, "TCMALLOC_AGGRESSIVE_DECOMMIT=t"),
    Allocator("mimalloc", *MIMALLOC),
    Allocator("mimalloc-purge", *MIMALLOC, "MIMALLOC_PAGE_RESET=1"),
    Allocator("jemalloc-linked", *JEMALLOC, linked=True),
    Allocator("tcmalloc-linked", *TCMALLOC, linked=True),
    Allocator("mimalloc-linked", *MIMALLOC, linked=True),
)


@pytest.fixture(params=ALLOCATORS, ids=lambda allocator: allocator.name)
def allocator(request: pytest.FixtureRequest) -> Allocator:
    assert isinstance(request.param, Allocator)
    return request.param


def linked_qemu(allocator: Allocator, directory: Path) -> list[str]:
    """Link a copy of QEMU with an allocator, and return the command that starts it."""
    if shutil.which("patchelf") is None:
        pytest.skip("patchelf is not installed")
    qemu = directory / "qemu-system-x86_64"
    shutil.copy(str(QEMU), qemu)
    subprocess.run(["patchelf", "--add-needed", str(allocator.path()), qemu], check=True)
    # QEMU searches for firmware relative to its own directory (get_relocated_path()).
    return [str(qemu), "-L", "/usr/share/qemu", "-L", "/usr/share/seabios"]


@pytest.fixture(params=["run", "plugin"])
def command(request: pytest.FixtureRequest, allocator: Allocator, tmp_path: Path) -> list[str]:
    """Return the first arguments of a command that starts QEMU with the plugin."""
    qemu = linked_qemu(allocator, tmp_path) if allocator.linked else [str(QEMU)]
    if request.param == "run":
        return [sys.executable, "-m", "qemu_prefault", "run", "-o", "socket=off", "--", *qemu]
    return [*qemu, "-plugin", f"{plugin_path()},socket=off"]


@needs_kvm
def test_qemu_starts_and_quits(allocator: Allocator, command: list[str], tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"
    arguments = ["-nodefaults", "-display", "none", "-accel", "kvm", "-m", "64M"]
    arguments += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    with subprocess.Popen(
        [*command, *arguments], env=allocator.environment(), stderr=subprocess.PIPE
    ) as qemu:
        try:
            monitor = connect_monitor(qmp, qemu)
            assert monitor.execute("query-status")["running"]
            if allocator.library:
                maps = Path(f"/proc/{qemu.pid}/maps").read_text()
                assert str(allocator.path().resolve()) in maps
            monitor.execute("quit")
            assert qemu.wait(20) == 0
        finally:
            qemu.kill()


@pytest.fixture
def stress(allocator: Allocator, tmp_path: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    program = tmp_path / "stress"
    command = ["cc", "-std=gnu11", "-O2", "-Wall", "-pthread", str(HERE / "allocator_stress.c")]
    command += [str(allocator.path())] if allocator.linked else []
    subprocess.run([*command, "-o", program], check=True)
    return program


@needs_kvm
def test_allocations_while_guest_memory_changes(
    allocator: Allocator, stress: Path, tmp_path: Path
) -> None:
    environment = allocator.environment(str(plugin_path()))
    environment["QEMU_PREFAULT_OPTIONS"] = f"socket={tmp_path}/control"
    done = subprocess.run(
        [stress, tmp_path / "control", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
