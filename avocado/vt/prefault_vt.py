# SPDX-License-Identifier: GPL-2.0-or-later
"""What avocado-vt's tests need to have their guests prefaulted, and to see that they are.

``prefault = yes`` puts the plugin into each QEMU that a test starts, by LD_PRELOAD, and checks
after the start that it is there. ``prefault_options = KEY=VALUE,…`` are the plugin's.
"""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys

from virttest import env_process, utils_misc

from qemu_prefault.agents.plugin import Control, find_control_socket, plugin_path
from qemu_prefault.host.procfs import Process

LOG = logging.getLogger("avocado." + __name__)

_TROUBLE = re.compile(r"cut here|BUG:|Oops:|Call Trace:|general protection fault|I/O error")


def enable(params):
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


def _check(test, params, env):
    """Raise unless the plugin is in every QEMU there is; log what it and KVM have counted."""
    for vm in env.get_all_vms():
        if vm.is_alive():
            counters = plugin_status(test, vm)["counters"]
            LOG.info("prefault: %s: plugin: %s", vm.name, json.dumps(counters))
            LOG.info("prefault: %s: KVM: %s", vm.name, json.dumps(faults(vm)))
            note(test, "since its start", None, memory_faults(vm))


def note(test, moment, without, with_):
    """Leave faults on memory, without prefault and with it, in the test's whiteboard."""
    test.whiteboard = json.dumps([{"moment": moment, "without": without, "with": with_}])


def plugin_status(test, vm):
    """What the plugin in this VM's QEMU says of itself; an error if there is none."""
    process = Process.find(vm.get_pid())
    path = find_control_socket(process)
    if path is None:
        test.error(f"prefault = yes, but the plugin is not in {vm.name}'s QEMU")

    async def ask():
        async with Control.open(path, process.pid) as control:
            return await control.ask("status")

    return asyncio.run(ask())


def faults(vm):
    """KVM's fault counters, summed up over the vCPUs."""
    found = {"pf_taken": 0, "pf_emulate": 0}
    for vcpu in vm.monitor.cmd("query-stats", {"target": "vcpu"}):
        for stat in vcpu["stats"]:
            name = stat["name"].replace("-", "_")
            if name in found:
                found[name] += stat["value"]
    return found


def memory_faults(vm):
    """Faults on memory: without those that were accesses to device registers."""
    counters = faults(vm)
    return counters["pf_taken"] - counters["pf_emulate"]


class Tool:
    """A run of ``qemu-prefault`` on the monitor of a VM that the tests leave alone."""

    def __init__(self, test, vm, *arguments):
        self.test = test
        self.socket = monitor_of(vm)
        command = [sys.executable, "-m", "qemu_prefault", "--json", "--qmp", self.socket]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self):
        """Wait until it awaits an incoming guest."""
        for line in self.process.stderr:
            if "ready" in line:
                return
        self.test.fail("qemu-prefault has ended before the guest came")

    def finish(self):
        """Wait for its end; give its report, in which every byte is accounted for."""
        stdout, stderr = self.process.communicate(timeout=900)
        LOG.info("qemu-prefault: %s%s", stdout, stderr)
        if self.process.returncode:
            self.test.fail(f"qemu-prefault ended with {self.process.returncode}: {stderr}")
        return json.loads(stdout)


def monitor_of(vm):
    """The path of the monitor that ``extra_params`` gives a VM for the tool."""
    return re.search(r"-qmp unix:([^,]+),", vm.params["extra_params"]).group(1)


def give_monitor(vm):
    """Let a VM that is yet to be created have a monitor of its own."""
    path = os.path.join("/var/tmp", f"prefault-{vm.instance}.qmp")
    extra = re.sub(r"-qmp unix:\S+", "", vm.params.get("extra_params", ""))
    vm.params["extra_params"] = f"{extra} -qmp unix:{path},server=on,wait=off"


def log_in(params, vm):
    """A session as root at the serial console."""
    session = vm.wait_for_serial_login(timeout=float(params.get("login_timeout", 360)))
    # Else bash puts escape sequences between a command and its output.
    session.cmd_output("bind 'set enable-bracketed-paste off'", timeout=300)
    return session


def check_health(test, session):
    """The system has come up, no unit has failed, and the kernel does not complain."""
    state = session.cmd_output("systemctl is-system-running --wait", timeout=900).strip()
    failed = session.cmd_output("systemctl --failed --no-legend --plain", timeout=300).strip()
    if not state.endswith("running") or failed:
        test.fail(f"systemd is {state!r}: {failed}")
    # Not all of it: avocado-vt makes a message to its job of each line that a guest prints.
    log = session.cmd_output("dmesg --level=emerg,alert,crit,err,warn", timeout=300)
    if bad := [line for line in log.splitlines() if _TROUBLE.search(line)]:
        test.fail(f"the kernel complains: {bad}")


def fill(session, name, mib):
    """Write a file in the guest's memory, no two pages of it the same; give its checksum."""
    size = mib << 20
    session.cmd(f"seq 10000001 {10000001 + size // 9} | head -c {size} >/dev/shm/{name}",
                timeout=900)  # fmt: skip
    return checksum(session, name)


def checksum(session, name):
    """Read all of a file of :func:`fill`; give its checksum."""
    return session.cmd(f"sha256sum </dev/shm/{name}", timeout=900).split()[0]


def compare(test, what, without, with_, least):
    """There was something to win, and at most a hundredth of it was lost."""
    LOG.info("prefault: %s: faults on memory: %d without, %d with", what, without, with_)
    note(test, what, without, with_)
    if without < least:
        test.fail(f"{without} faults without prefault; at least {least} were to be spared")
    if with_ > without / 100:
        test.fail(f"{with_} faults with prefault, {without} without")


def wait_running(test, vm):
    """Wait until an incoming guest runs."""
    if not utils_misc.wait_for(lambda: vm.monitor.verify_status("running"), 900, step=0.5):
        test.fail(f"{vm.name} does not run")


def read_back(test, params, vm, wanted):
    """Read the file of :func:`fill` where the guest is now; give the faults on memory so far."""
    session = log_in(params, vm)
    if checksum(session, "file") != wanted:
        test.fail("the file in the guest's memory has changed")
    taken = memory_faults(vm)
    check_health(test, session)
    session.close()
    return taken
