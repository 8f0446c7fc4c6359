# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a guest takes almost no faults if it boots with ``prefault = yes``."""

from typing import Any

import prefault_vt


def run(test: Any, params: prefault_vt.Params, env: Any) -> None:
    """Boot a guest with the plugin, and reset it if the variant sets reboot_method.

    1) Log in and check the system's health
    2) Write a file in the guest's memory and read it back
    3) If reboot_method is set, reset the guest and repeat the steps
    """
    vm = env.get_vm(params["main_vm"])
    size = int(params["file_size_mib"])
    most = int(params["most_faults"])
    before = 0
    session = prefault_vt.log_in(params, vm)
    for boot in range(1 + bool(params.get("reboot_method"))):
        if boot:
            before = prefault_vt.memory_faults(vm)
            session = prefault_vt.reboot(params, vm, session)
        prefault_vt.check_health(test, session)
        first = prefault_vt.fill(session, "file", size)
        if prefault_vt.checksum(session, "file") != first:
            test.fail("the file in the guest's memory has changed")
        taken = prefault_vt.memory_faults(vm) - before
        test.log.info("prefault: boot %d: %d faults on memory", boot + 1, taken)
        if taken > most:
            test.fail(f"boot {boot + 1} took {taken} faults on memory, more than {most}")
    session.close()
