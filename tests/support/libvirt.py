# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of libvirt share; not on a developer's host, whose libvirt they would rewrite."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path

import pytest

from qemu_prefault_lab.libvirtd import Domain

if not Path("/lab/agent.py").exists() or not Path("/usr/sbin/libvirtd").exists():
    pytest.skip("only in the lab's variant libvirt", allow_module_level=True)

WORKLOAD_MIB = 64
PAGES = WORKLOAD_MIB * 256
#: What device registers and the firmware's odd corners cost whatever is done.
FEW = 60
#: Where a daemon is told to listen, and its unit has it listen by itself.
METRICS_ADDRESS = "127.0.0.1:9469"


def run_tool(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line; nothing it does may show a user a traceback."""
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


def tool(*arguments: str, timeout: float = 300) -> str:
    """Run it to success; its stdout."""
    done = run_tool(*arguments, timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def label(of: Domain) -> str:
    """What AppArmor confines its QEMU by."""
    return Path(f"/proc/{of.process.pid}/attr/current").read_text().strip("\0\n")


def metrics() -> str:
    """What the daemon tells Prometheus; nothing if it does not listen."""
    try:
        with urllib.request.urlopen(f"http://{METRICS_ADDRESS}/metrics", timeout=30) as page:
            text: str = page.read().decode()
    except OSError:
        return ""
    return text
