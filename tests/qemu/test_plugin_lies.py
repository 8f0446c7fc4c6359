# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the tool on a real QEMU whose plugin lies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_prefault.host.procfs import Process
from qemu_prefault_lab.wait import wait_for
from support import capable_kvm
from support.hostile_run import false_qemu, process_not_to_touch, run_program
from support.qemu import StartQemu, kvm_usable, start_vm

pytestmark = [
    pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="cc is not installed"),
]
#: If root runs the tests, QEMU runs as another user, who can open all files.
OTHER_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
              "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]  # fmt: skip


@pytest.mark.parametrize(
    ("lie", "options"),
    [
        ("plugin: nothing prefaulted", []),
        ("plugin: always aborted", ["--max-downtime", "0.2"]),
        ("query-stats: always in guest mode", []),
        ("query-stats: always in guest mode", ["--max-downtime", "0.5"]),
        ("qom-list: 20,000 devices while the guest is paused", []),
    ],
)
def test_paused_guest_runs_again(lie: str, options: list[str]) -> None:
    with process_not_to_touch() as bystander, false_qemu(lie, bystander) as path:
        words = [*capable_kvm.prefix(), sys.executable, "-m", "qemu_prefault"]
        run = run_program(*words, "--qmp", str(path), *options)

        def runs_again() -> bool:
            commands = path.with_name("qmp.commands").read_text().split()
            return [c for c in commands if c in ("stop", "cont")][-1:] == ["cont"]

        # If QEMU replied too slowly, the resume guard resumes the guest after the tool's exit.
        wait_for(runs_again, f"the guest runs again: {run}")
    run.assert_orderly()


@pytest.mark.parametrize("thread", [False, True])
def test_guest_runs_after_a_batch_that_never_ends(
    start_qemu: StartQemu, tmp_path: Path, thread: bool
) -> None:
    """Check that the tool aborts the batch, and resumes the guest that it has paused."""
    library = tmp_path / "lying.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-pthread", Path(__file__).with_name("lying_plugin.c"),
         "-o", library],
        check=True,
    )  # fmt: skip
    prefix = OTHER_USER if os.geteuid() == 0 else []
    prefix = [*prefix, "env", f"LD_PRELOAD={library}", f"LYING_SOCKET={tmp_path}/control"]
    prefix += ["LYING_THREAD=1"] if thread else []
    vm = start_vm(start_qemu, tmp_path, "-m", "64M", accel="kvm", paused=False, prefix=prefix)
    tool = subprocess.run(
        [*capable_kvm.prefix(), sys.executable, "-m", "qemu_prefault", "--qmp", vm.qemu.qmp,
         "--json", "--agent", "plugin"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert tool.returncode == 1, (tool.stdout, tool.stderr)
    error = json.loads(tool.stdout)["error"]
    assert error["code"] == "agent"
    assert "no progress" in error["cause"] or thread
    assert vm.qmp.status() == "running"
    assert Process.find(vm.pid).status().uids[0] == (os.geteuid() or 65534)
