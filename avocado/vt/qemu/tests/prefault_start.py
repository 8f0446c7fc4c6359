# SPDX-License-Identifier: GPL-2.0-or-later
"""Test prefaulting before the guest's first instruction."""

from typing import Any

import prefault_vt


def run(test: Any, params: prefault_vt.Params, env: Any) -> None:
    """Prefault a guest that has not run yet, and boot it.

    1) Start the VM paused (paused_after_start_vm), with a monitor for the tool
    2) Prefault and start the guest with qemu-prefault --cont
    3) Log in and check the system's health

    The firmware makes KVM drop part of the stage-2 tables, so the guest takes some faults. This
    test does not count these faults. With prefault = yes, the plugin fills the tables again.
    """
    vm = env.get_vm(params["main_vm"])
    report = prefault_vt.finish_tool(test, prefault_vt.start_tool(vm, "--cont"))
    if report["bytes"]["remaining"] or not sum(report["stage2"]["after"].values()):
        test.fail(f"not prefaulted: {report}")
    session = prefault_vt.log_in(params, vm)
    prefault_vt.check_health(test, session)
    session.close()
