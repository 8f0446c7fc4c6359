# SPDX-License-Identifier: GPL-2.0-or-later
"""Prefault the guests of avocado-vt's tests, and check the effect.

If a test sets ``prefault = yes``, this module loads the plugin with LD_PRELOAD into each QEMU that
the test starts. After the start, the module checks that QEMU has loaded the plugin. The
``prefault_options = KEY=VALUE,…`` parameter sets the plugin's options.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from virttest import env_process, utils_misc

from qemu_prefault.agents.plugin import Control, find_control_socket, plugin_path
from qemu_prefault.host.procfs import Process

# The provider is used inside a checkout, so it can import the project's shared test modules.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from support import health
from support.tool import Tool

LOG = logging.getLogger("avocado." + __name__)
Params = MutableMapping[str, str]

TOOL_SECONDS = 900.0
HEALTH_SECONDS = 900.0


def enable(params: Params) -> None:
    """If ``prefault = yes`` is set, make the test start each QEMU with the plugin."""
    if params.get("prefault", "no") != "yes":
        env_process.preprocess_vm_on_hook = env_process.postprocess_vm_on_hook = None
        return
    prefix = [f"LD_PRELOAD={plugin_path()}"]
    if options := params.get("prefault_options"):
        prefix.append(f"QEMU_PREFAULT_OPTIONS={options}")
    if before := params.get("qemu_command_prefix"):
        prefix.append(before)
    params["qemu_command_prefix"] = " ".join(prefix)
    env_process.preprocess_vm_on_hook = _check
    env_process.postprocess_vm_on_hook = _check


def _check(test: Any, params: Params, env: Any) -> None:
    """Check that every QEMU has loaded the plugin, and log all counters."""
    for vm in env.get_all_vms():
        if vm.is_alive():
            counters = plugin_status(test, vm)["counters"]
            LOG.info("prefault: %s: plugin: %s", vm.name, json.dumps(counters))
            LOG.info("prefault: %s: KVM: %s", vm.name, json.dumps(faults(vm)))
            note(test, "since its start", None, memory_faults(vm))


def note(test: Any, event: str, without: int | None, with_: int) -> None:
    """Write the numbers of faults without and with prefaulting to the whiteboard."""
    test.whiteboard = json.dumps([{"moment": event, "without": without, "with": with_}])


def plugin_status(test: Any, vm: Any) -> dict[str, Any]:
    """Return the plugin's status, or fail the test if QEMU has no plugin."""
    process = Process.find(vm.get_pid())
    path = find_control_socket(process)
    if path is None:
        test.error(f"prefault = yes is set, but {vm.name}'s QEMU has not loaded the plugin")
    assert path is not None  # error() raises an exception

    async def ask(path: Path) -> dict[str, Any]:
        async with Control.open(path, process.pid) as control:
            return await control.ask("status")

    return asyncio.run(ask(path))


def faults(vm: Any) -> dict[str, int]:
    """Return KVM's fault counters, each summed over the VM's vCPUs."""
    found = {"pf_taken": 0, "pf_emulate": 0}
    for vcpu in vm.monitor.cmd("query-stats", {"target": "vcpu"}):
        for stat in vcpu["stats"]:
            name = stat["name"].replace("-", "_")
            if name in found:
                found[name] += stat["value"]
    return found


def memory_faults(vm: Any) -> int:
    """Return the number of the VM's faults, without those on device registers."""
    counters = faults(vm)
    return counters["pf_taken"] - counters["pf_emulate"]


def start_tool(vm: Any, *arguments: str) -> Tool:
    """Start ``qemu-prefault`` with the VM's monitor that avocado-vt does not use."""
    return Tool(["--json", "--qmp", monitor_of(vm), *arguments], fork=False)


def finish_tool(test: Any, tool: Tool) -> dict[str, Any]:
    """Wait for the tool, check the byte counts in its report, and return the report."""
    report: dict[str, Any] = {}
    with failing(test):
        result = tool.finish(TOOL_SECONDS)
        LOG.info("qemu-prefault: %s%s", result.stdout, result.stderr)
        report = result.complete()
    return report


@contextlib.contextmanager
def failing(test: Any) -> Iterator[None]:
    """Report an AssertionError from tests/support as a test failure, not as an error."""
    try:
        yield
    except AssertionError as error:
        test.fail(str(error))


def monitor_of(vm: Any) -> str:
    """Return the path of the tool's monitor, which ``extra_params`` adds to the VM."""
    found = re.search(r"-qmp unix:([^,]+),", vm.params["extra_params"])
    assert found is not None, vm.params["extra_params"]
    return found[1]


def give_monitor(vm: Any) -> None:
    """Add a monitor for the tool to a VM that has not been created yet."""
    # The tests run on development machines, without other users.
    path = os.path.join("/var/tmp", f"prefault-{vm.instance}.qmp")  # nosec B108
    extra = re.sub(r"-qmp unix:\S+", "", vm.params.get("extra_params", ""))
    vm.params["extra_params"] = f"{extra} -qmp unix:{path},server=on,wait=off"


def log_in(params: Params, vm: Any) -> Any:
    """Log in as root on the serial console, and return the session."""
    timeout = float(params.get("login_timeout", 360))
    return with_plain_output(vm.wait_for_serial_login(timeout=timeout))


def reboot(params: Params, vm: Any, session: Any) -> Any:
    """Reboot with ``reboot_method`` and return a new session on the serial console."""
    timeout = float(params["login_timeout"])
    return with_plain_output(vm.reboot(session, params["reboot_method"], 0, timeout, serial=True))


def with_plain_output(session: Any) -> Any:
    """Keep bash from printing escape sequences between a command and its output."""
    session.cmd_output("bind 'set enable-bracketed-paste off'", timeout=300)
    return session


def check_health(test: Any, session: Any) -> None:
    """Check that the guest's system is up, without failed units or kernel errors."""
    with failing(test):
        health.check_health(
            lambda command: str(session.cmd_output(command, timeout=HEALTH_SECONDS)),
            # Print only warnings and errors: avocado-vt sends the job a message for each line.
            dmesg="dmesg --level=emerg,alert,crit,err,warn",
        )


def fill(session: Any, name: str, mib: int) -> str:
    """Write a file with distinct pages to guest memory, and return its checksum."""
    size = mib << 20
    session.cmd(f"seq 10000001 {10000001 + size // 9} | head -c {size} >/dev/shm/{name}",
                timeout=900)  # fmt: skip
    return checksum(session, name)


def checksum(session: Any, name: str) -> str:
    """Read the whole file that :func:`fill` wrote, and return its checksum."""
    return str(session.cmd(f"sha256sum </dev/shm/{name}", timeout=900)).split()[0]


def compare(test: Any, what: str, without: int, with_: int, least: int) -> None:
    """Check that prefaulting avoids 99 % of the faults.

    :param least: The minimum number of faults that the guest must take without prefaulting.
    """
    LOG.info("prefault: %s: %d faults without prefaulting, %d with it", what, without, with_)
    note(test, what, without, with_)
    if without < least:
        test.fail(f"only {without} faults without prefaulting, but the test needs {least}")
    if with_ > without / 100:
        test.fail(f"prefaulting left {with_} of {without} faults, more than 1 %")


def wait_running(test: Any, vm: Any) -> None:
    """Wait until an incoming guest runs."""
    if not utils_misc.wait_for(lambda: vm.monitor.verify_status("running"), 900, step=0.5):
        test.fail(f"{vm.name} does not run")


def read_back(test: Any, params: Params, vm: Any, wanted: str) -> int:
    """Check the file that :func:`fill` wrote, and return the VM's faults so far."""
    session = log_in(params, vm)
    if checksum(session, "file") != wanted:
        test.fail("the file in the guest's memory has changed")
    taken = memory_faults(vm)
    check_health(test, session)
    session.close()
    return taken
