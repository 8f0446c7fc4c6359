# SPDX-License-Identifier: GPL-2.0-or-later
"""Test prefaulting a migrated guest before it resumes on its destination."""

from typing import Any

import prefault_vt


def run(test: Any, params: prefault_vt.Params, env: Any) -> None:
    """Migrate a guest twice, first without and then with qemu-prefault.

    1) Log in and write a file in the guest's memory
    2) Migrate to a second QEMU without qemu-prefault. Reading the file causes one fault per page
    3) Migrate to a third QEMU with qemu-prefault --incoming. Reading the file causes few faults
    """
    vm = env.get_vm(params["main_vm"])
    size = int(params["file_size_mib"])
    session = prefault_vt.log_in(params, vm)
    prefault_vt.check_health(test, session)
    wanted = prefault_vt.fill(session, "file", size)
    session.close()
    taken = []
    for prefault in (False, True):
        migrate(test, params, vm, prefault)
        taken.append(prefault_vt.read_back(test, params, vm, wanted))
    without, with_ = taken
    prefault_vt.compare(test, "migrate", without, with_, size << 8)


def migrate(test: Any, params: prefault_vt.Params, vm: Any, prefault: bool) -> None:
    """Migrate as VM.migrate() does, and make ``vm`` represent the destination."""
    protocol = params["migration_protocol"]
    target = vm.clone(copy_state=False)
    prefault_vt.give_monitor(target)
    target.create(migration_mode=protocol, mac_source=vm)
    try:
        tool = prefault_vt.start_tool(target, "--incoming", "--cont") if prefault else None
        if tool:
            with prefault_vt.failing(test):
                tool.wait_ready()
        if protocol == "tcp":
            uri = f"tcp:localhost:{target.migration_port}"
        else:
            uri = f"unix:{target.migration_file}"
        if target.deferral_incoming:
            target.monitor.migrate_incoming(uri)
        vm.monitor.migrate(uri)
        vm.wait_for_migration(900)
        if not vm.mig_succeeded():
            test.fail("the migration failed")
        if tool:
            prefault_vt.finish_tool(test, tool)
        else:
            target.resume()
        prefault_vt.wait_running(test, target)
    except BaseException:
        target.destroy(gracefully=False)
        raise
    source = vm.clone(copy_state=True)
    source.destroy(gracefully=False)
    vm.__dict__ = target.__dict__
