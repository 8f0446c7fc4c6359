# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the tool with a process that plays QEMU, and that lies while its guest is paused.

tests/qemu/test_hostile_qemu.py has all lies, but only for runs that do not call the ioctl.
"""

from __future__ import annotations

import pytest

from qemu_prefault_lab.wait import wait_for
from support.hostile_run import false_qemu, process_not_to_touch, run_tool

#: The maximum time of a run in seconds. In the lab, an honest run takes up to 40 s.
SECONDS = 180

pytestmark = pytest.mark.full


@pytest.mark.parametrize(
    "lie",
    [
        "honest",
        "stop: late",
        "stop: silence",
        "stop: keeps running",
        "stop: descriptors",
        "cont: silence",
        "query-status: changes",
        "query-cpus-fast: another process",
        "RAM: libc's text",
        "process: exits while it is attached",
        "process: stops itself",
        "descriptors: second VM",
        "descriptors: many vCPUs",
        "helper: tid of another process",
        "helper: never ready",
        "helper: ready with garbage",
        "helper: batch never done",
        "helper: batch done at once",
        "helper: random control page",
        "helper: every number is the largest",
        "helper: unmapped",
        "helper: a page more each time",
        "helper: busy without progress",
        "plugin: silent about a batch",
        "plugin: a byte more each time",
        "job: no progress",
        "job: endless events",
    ],
)
def test_paused_guest_runs_again(lie: str) -> None:
    with process_not_to_touch() as bystander, false_qemu(lie, bystander) as path:

        def changes() -> list[str]:
            """Return the commands that QEMU has received and that change the run state."""
            commands = path.with_name("qmp.commands").read_text().split()
            return [command for command in commands if command in ("stop", "cont")]

        run = run_tool("--qmp", str(path), seconds=SECONDS)
        if lie in ("stop: late", "stop: descriptors"):  # the resume guard resumes the guest
            wait_for(lambda: changes() == ["stop", "cont"], "the guest is resumed", 60)
        run.assert_orderly()
        if lie not in ("stop: silence", "process: exits while it is attached"):
            assert changes()[-1:] != ["stop"], run
        if lie == "honest":
            assert run.status == 0, run
            assert changes() == ["stop", "cont"]
