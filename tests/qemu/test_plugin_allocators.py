# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin with allocators whose system calls pass through its hooks."""

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
    """An allocator's library and Debian package, and a variable that configures it."""

    name: str
    library: str = ""
    package: str = ""
    setting: str = ""

    def environment(self, preload: str = "") -> dict[str, str]:
        """Return an environment whose LD_PRELOAD has ``preload`` and then the allocator.

        Skip the test if the allocator is not installed.
        """
        names = [preload] if preload else []
        if self.library:
            directories = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")
            found = [path for d in directories for path in sorted(Path(d).glob(self.library))]
            if not found:
                pytest.skip(f"{self.library} is not installed (Debian: {self.package})")
            names.append(str(found[0]))
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
)


@pytest.fixture(params=ALLOCATORS, ids=lambda allocator: allocator.name)
def allocator(request: pytest.FixtureRequest) -> Allocator:
    assert isinstance(request.param, Allocator)
    return request.param


@pytest.fixture(params=["run", "plugin"])
def command(request: pytest.FixtureRequest) -> list[str]:
    """Return the first arguments of a command that starts QEMU with the plugin."""
    if request.param == "run":
        return [sys.executable, "-m", "qemu_prefault", "run", "-o", "socket=off", "--", str(QEMU)]
    return [str(QEMU), "-plugin", f"{plugin_path()},socket=off"]


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
            monitor.execute("quit")
            assert qemu.wait(20) == 0
        finally:
            qemu.kill()


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    program = tmp_path_factory.mktemp("stress") / "stress"
    source = HERE / "allocator_stress.c"
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-Wall", "-pthread", source, "-o", program], check=True
    )
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
