# SPDX-License-Identifier: GPL-2.0-or-later
"""Prefault before the guest's first instruction."""

from typing import Any

import prefault_vt


def run(test: Any, params: prefault_vt.Params, env: Any) -> None:
    """
    1) Start the VM paused (paused_after_start_vm), with a monitor for the tool
    2) Prefault and start it: qemu-prefault --cont
    3) Log in and check the system's health

    The firmware drops part of the prefaulted memory. This test does not count those faults;
    prefault = yes avoids them.
    """
    vm = env.get_vm(params["main_vm"])
    report = prefault_vt.finish_tool(test, prefault_vt.start_tool(vm, "--cont"))
    if report["bytes"]["remaining"] or not sum(report["stage2"]["after"].values()):
        test.fail(f"not prefaulted: {report}")
    session = prefault_vt.log_in(params, vm)
    prefault_vt.check_health(test, session)
    session.close()
