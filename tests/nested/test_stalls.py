# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a run does not stall a guest under any scheduling policy for vCPUs.

Each test compares a guest with a control guest that has the same scheduling. Only the guest is
prefaulted. Each guest measures the longest time between two passes over its memory. A guest's clock
excludes the pauses that the tool reports. tests/qemu/test_stalls.py measures every interval
in which a vCPU does not run, but without the ioctl.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from support.guest import MakeGuest, check_memory, prefault
from support.process import wait_clean
from support.scheduling import scheduling, vcpu_threads

#: The maximum time in seconds by which the guest's longest stall may exceed the control's.
STALL = 0.1
#: Milliseconds of sleep between two passes. The busy guests together use about half of the CPU.
SLEEP = {"busy": 3, "idle": 50}
# On the lab's only CPU, a busy control with real-time priority would delay even QEMU's main thread.
CASES = [(policy, "busy") for policy in ("other", "quota", "pinned")]
CASES += [(policy, "idle") for policy in ("other", "quota", "pinned", "fifo", "rr")]


@pytest.mark.full
@pytest.mark.any_agent
@pytest.mark.parametrize(("policy", "load"), CASES)
def test_guest_does_not_stall(make_restored_guest: MakeGuest, policy: str, load: str) -> None:
    with ExitStack() as stack:
        vcpus = stack.enter_context(scheduling(policy))
        guests = {}
        for name in ("guest", "control"):
            guest = guests[name] = make_restored_guest(wrapper=vcpus.prefix)
            stack.callback(guest.kill)
            guest.qmp("cont")
            check_memory(guest)
            for tid in vcpu_threads(guest):
                vcpus.apply(tid, name)
        for guest in guests.values():
            guest.command(f"run {SLEEP[load]}")
        result = prefault(guests["guest"], "--max-downtime", "0.05")
        answers = {name: guest.command("stop") for name, guest in guests.items()}
        for name, guest in guests.items():
            assert answers[name]["bad"] == 0, answers
            assert guest.status() == "running"
            wait_clean(guest.pid)
        # A run that cannot complete must report the reason.
        assert result.status == 0 or result.warnings or "error" in result.report, result
        control = float(answers["control"]["longest"])
        assert float(answers["guest"]["longest"]) <= control + STALL, (answers, result.report)
