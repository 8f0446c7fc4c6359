# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the tool for libvirt's domains, and read AppArmor labels and metrics.

The libvirt tests change the host's libvirt configuration, so they run only in the lab.
"""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import pytest

from qemu_prefault_lab.libvirtd import LabDomain

if not Path("/lab/command_server.py").exists() or not Path("/usr/sbin/libvirtd").exists():
    pytest.skip("these tests need the lab's libvirt variant", allow_module_level=True)

WORKLOAD_MIB = 64
PAGES = WORKLOAD_MIB * 256
#: The maximum number of faults that prefaulting cannot avoid: faults on device registers, and on
#: memory that the firmware uses.
MAX_RESIDUAL_FAULTS = 60
#: The address on which the daemon serves metrics, which is also the default in the daemon's unit.
METRICS_ADDRESS = "127.0.0.1:9469"

WriteHookConfig = Callable[[str], None]


class DomainOptions(TypedDict, total=False):
    """The keyword arguments of :class:`LabDomain`."""

    machine: str
    memory_mib: int
    workload_mib: int
    max_mib: int
    firmware_only: bool
    kernel_args: str
    metadata: str


class MakeDomain(Protocol):
    """A function that defines a domain, which the fixture destroys after the test."""

    def __call__(self, name: str, **options: Unpack[DomainOptions]) -> LabDomain: ...


def run_tool(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``qemu-prefault`` and check that the output contains no traceback."""
    done = subprocess.run(
        ["qemu-prefault", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "internal error" not in done.stderr, done.stderr
    return done


def tool_output(*arguments: str, timeout: float = 300) -> str:
    """Run ``qemu-prefault``, check that the run succeeds, and return its stdout."""
    done = run_tool(*arguments, timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def apparmor_label(domain: LabDomain) -> str:
    """Return the name and mode of the AppArmor profile of the domain's QEMU."""
    return Path(f"/proc/{domain.process.pid}/attr/current").read_text().strip("\0\n")


def read_metrics() -> str:
    """Return the daemon's metrics, or an empty string if the daemon does not listen."""
    try:
        with urllib.request.urlopen(f"http://{METRICS_ADDRESS}/metrics", timeout=30) as page:
            text: str = page.read().decode()
    except OSError:
        return ""
    return text
