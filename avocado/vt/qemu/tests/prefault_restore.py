# SPDX-License-Identifier: GPL-2.0-or-later
"""Test prefaulting a restored guest before it resumes."""

import os
from typing import Any

import prefault_vt


def run(test: Any, params: prefault_vt.Params, env: Any) -> None:
    """Restore a guest twice, first without and then with qemu-prefault.

    1) Log in, write a file in the guest's memory and save the guest to a file
    2) Restore and resume the guest. Reading the file causes one fault per page
    3) Restore the guest, and run qemu-prefault --cont. Reading the file causes few faults
    """
    vm = env.get_vm(params["main_vm"])
    size = int(params["file_size_mib"])
    session = prefault_vt.log_in(params, vm)
    prefault_vt.check_health(test, session)
    wanted = prefault_vt.fill(session, "file", size)
    session.cmd("sync", timeout=300)
    session.close()
    state = os.path.join(test.workdir, "state")
    vm.pause()
    # Do not call VM.save_to_file(), which uses a command that QEMU has removed.
    vm.monitor.migrate(f"file:{state}")
    vm.wait_for_migration(900)
    if not vm.mig_succeeded():
        test.fail("the guest could not be saved")
    vm.destroy(gracefully=False, free_mac_addresses=False)
    taken = []
    for prefault in (False, True):
        vm.restore_from_file(state)
        if prefault:
            prefault_vt.finish_tool(test, prefault_vt.start_tool(vm, "--cont"))
        else:
            vm.resume()
        prefault_vt.wait_running(test, vm)
        taken.append(prefault_vt.read_back(test, params, vm, wanted))
        vm.pause()
    os.remove(state)
    without, with_ = taken
    prefault_vt.compare(test, "restore", without, with_, size << 8)
