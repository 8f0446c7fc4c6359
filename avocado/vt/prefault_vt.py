# SPDX-License-Identifier: GPL-2.0-or-later
"""What avocado-vt's tests need to have their guests prefaulted, and to see that they are.

``prefault = yes`` puts the plugin into each QEMU that a test starts, by LD_PRELOAD, and checks
after the start that it is there. ``prefault_options = KEY=VALUE,…`` are the plugin's.
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

# What the project's tests share: the provider is used where it lies, in a checkout.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from support import health
from support.tool import Tool

LOG = logging.getLogger("avocado." + __name__)
Params = MutableMapping[str, str]

TOOL_SECONDS = 900.0
HEALTH_SECONDS = 900.0


def enable(params: Params) -> None:
    """Do what ``prefault = yes`` asks for; called before a test's QEMUs are started."""
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
    """Raise unless the plugin is in every QEMU there is; log what it and KVM have counted."""
    for vm in env.get_all_vms():
        if vm.is_alive():
            counters = plugin_status(test, vm)["counters"]
            LOG.info("prefault: %s: plugin: %s", vm.name, json.dumps(counters))
            LOG.info("prefault: %s: KVM: %s", vm.name, json.dumps(faults(vm)))
            note(test, "since its start", None, memory_faults(vm))


def note(test: Any, moment: str, without: int | None, with_: int) -> None:
    """Leave faults on memory, without prefault and with it, in the test's whiteboard."""
    test.whiteboard = json.dumps([{"moment": moment, "without": without, "with": with_}])


def plugin_status(test: Any, vm: Any) -> dict[str, Any]:
    """What the plugin in this VM's QEMU says of itself; an error if there is none."""
    process = Process.find(vm.get_pid())
    path = find_control_socket(process)
    if path is None:
        test.error(f"prefault = yes, but the plugin is not in {vm.name}'s QEMU")
    assert path is not None  # error() has raised

    async def ask(path: Path) -> dict[str, Any]:
        async with Control.open(path, process.pid) as control:
            return await control.ask("status")

    return asyncio.run(ask(path))


def faults(vm: Any) -> dict[str, int]:
    """KVM's fault counters, summed up over the vCPUs."""
    found = {"pf_taken": 0, "pf_emulate": 0}
    for vcpu in vm.monitor.cmd("query-stats", {"target": "vcpu"}):
        for stat in vcpu["stats"]:
            name = stat["name"].replace("-", "_")
            if name in found:
                found[name] += stat["value"]
    return found


def memory_faults(vm: Any) -> int:
    """Faults on memory: without those that were accesses to device registers."""
    counters = faults(vm)
    return counters["pf_taken"] - counters["pf_emulate"]


def start_tool(vm: Any, *arguments: str) -> Tool:
    """Start ``qemu-prefault`` on the monitor of a VM that the tests leave alone."""
    return Tool(["--json", "--qmp", monitor_of(vm), *arguments], fork=False)


def finish_tool(test: Any, tool: Tool) -> dict[str, Any]:
    """Wait for its end; return its report, in which every byte is accounted for."""
    report: dict[str, Any] = {}
    with failing(test):
        result = tool.finish(TOOL_SECONDS)
        LOG.info("qemu-prefault: %s%s", result.stdout, result.stderr)
        report = result.complete()
    return report


@contextlib.contextmanager
def failing(test: Any) -> Iterator[None]:
    """Let the test fail if an assertion of tests/support does; it would end with an error."""
    try:
        yield
    except AssertionError as error:
        test.fail(str(error))


def monitor_of(vm: Any) -> str:
    """The path of the monitor that ``extra_params`` gives a VM for the tool."""
    found = re.search(r"-qmp unix:([^,]+),", vm.params["extra_params"])
    assert found is not None, vm.params["extra_params"]
    return found[1]


def give_monitor(vm: Any) -> None:
    """Let a VM that is yet to be created have a monitor of its own."""
    path = os.path.join("/var/tmp", f"prefault-{vm.instance}.qmp")
    extra = re.sub(r"-qmp unix:\S+", "", vm.params.get("extra_params", ""))
    vm.params["extra_params"] = f"{extra} -qmp unix:{path},server=on,wait=off"


def log_in(params: Params, vm: Any) -> Any:
    """A session as root at the serial console."""
    session = vm.wait_for_serial_login(timeout=float(params.get("login_timeout", 360)))
    # Else bash puts escape sequences between a command and its output.
    session.cmd_output("bind 'set enable-bracketed-paste off'", timeout=300)
    return session


def check_health(test: Any, session: Any) -> None:
    """Check that the system has come up, no unit has failed, and the kernel does not complain."""
    with failing(test):
        health.check_health(
            lambda command: str(session.cmd_output(command, timeout=HEALTH_SECONDS)),
            # Not all of it: avocado-vt makes a message to its job of each line a guest prints.
            dmesg="dmesg --level=emerg,alert,crit,err,warn",
        )


def fill(session: Any, name: str, mib: int) -> str:
    """Write a file in the guest's memory, no two pages of it the same; give its checksum."""
    size = mib << 20
    session.cmd(f"seq 10000001 {10000001 + size // 9} | head -c {size} >/dev/shm/{name}",
                timeout=900)  # fmt: skip
    return checksum(session, name)


def checksum(session: Any, name: str) -> str:
    """Read all of a file of :func:`fill`; give its checksum."""
    return str(session.cmd(f"sha256sum </dev/shm/{name}", timeout=900)).split()[0]


def compare(test: Any, what: str, without: int, with_: int, least: int) -> None:
    """There was something to win, and at most a hundredth of it was lost."""
    LOG.info("prefault: %s: faults on memory: %d without, %d with", what, without, with_)
    note(test, what, without, with_)
    if without < least:
        test.fail(f"{without} faults without prefault; at least {least} were to be spared")
    if with_ > without / 100:
        test.fail(f"{with_} faults with prefault, {without} without")


def wait_running(test: Any, vm: Any) -> None:
    """Wait until an incoming guest runs."""
    if not utils_misc.wait_for(lambda: vm.monitor.verify_status("running"), 900, step=0.5):
        test.fail(f"{vm.name} does not run")


def read_back(test: Any, params: Params, vm: Any, wanted: str) -> int:
    """Read the file of :func:`fill` where the guest is now; give the faults on memory so far."""
    session = log_in(params, vm)
    if checksum(session, "file") != wanted:
        test.fail("the file in the guest's memory has changed")
    taken = memory_faults(vm)
    check_health(test, session)
    session.close()
    return taken
