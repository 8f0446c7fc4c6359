# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin where the ioctl is real: prefaulted before the first instruction, and kept so.

Faults are KVM's ``pf_taken`` from the first instruction until the guest has booted and
written 256 MiB. A few are accesses to device registers (``pf_emulate``), which no table can
spare.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault_lab.guest import Guest, thp

WORKLOAD_MIB = 256
MIB = 1 << 20
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@pytest.fixture
def pages() -> Iterator[Callable[[str], str]]:
    """Sets transparent huge pages, for the test only."""
    before = thp("never")
    yield thp
    thp(before)


class Kept:
    """A guest with the plugin in its QEMU, and the plugin's control socket."""

    def __init__(self, directory: Path, *options: str, **arguments: Any) -> None:
        self.path = directory / "control"
        plugin = ",".join([str(plugin_path()), f"socket={self.path}", *options])
        arguments["args"] = ["-plugin", plugin, *arguments.get("args", ())]
        arguments.setdefault("workload_mib", WORKLOAD_MIB)
        self.guest = Guest(**arguments)

    def ask(self, request: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(self.path))
            client.sendall(request.encode() + b"\n")
            answer: dict[str, Any] = json.loads(client.makefile().readline())
        return answer

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def settled(self) -> dict[str, Any]:
        """The status once nothing is left to do."""
        deadline = time.monotonic() + 60
        while (status := self.status())["pending"]:
            assert time.monotonic() < deadline, status
            self.guest.command("echo idle")
        return status


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    with contextlib.ExitStack() as stack:

        def start(*options: str, **arguments: Any) -> Kept:
            found = Kept(tmp_path, *options, **arguments)
            stack.enter_context(found.guest)
            return found

        yield start


# What a guest that writes so much takes at the very least without the plugin, on 4K pages.
WITHOUT = WORKLOAD_MIB * 256
full = pytest.mark.full  # only in make test-full


def check_memory(guest: Guest) -> None:
    """The guest answers, and finds in its memory what it wrote there."""
    assert guest.command("pass")["bad"] == 0


def ram_slots(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [slot for slot in status["slots"] if slot["as"] == 0 and not slot["flags"] & 2]


# -- a boot --------------------------------------------------------------------------------


def check_kept(found: Kept) -> dict[str, Any]:
    status = found.settled()
    assert status["quirk"] == "disabled"
    assert (status["counters"]["errors"], status["counters"]["stuck"]) == (0, 0)
    assert all(slot["state"] == "done" for slot in ram_slots(status))
    check_memory(found.guest)
    return status


@pytest.mark.every_kernel
@pytest.mark.parametrize("machine", ["pc", pytest.param("q35", marks=full), "microvm"])
def test_a_boot_takes_next_to_no_faults(kept, pages, machine):
    found = kept(machine=machine)
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] <= 0.0005 * WITHOUT
    check_kept(found)


@full
@pytest.mark.parametrize(
    "machine", ["pc", pytest.param("q35", marks=full), pytest.param("microvm", marks=full)]
)
def test_a_boot_on_huge_pages(kept, pages, machine):
    pages("always")
    with Guest(machine=machine, workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        without = guest.stats()["pf_taken"]
    found = kept(machine=machine)
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] <= 0.03 * without
    check_kept(found)


def test_the_second_boot_too(kept, pages):
    """Firmware runs again after a reset, and drops low RAM's tables again."""
    found = kept(machine="q35", args=["-action", "reboot=reset"])
    found.guest.wait_ready()
    before = found.guest.stats()["pf_taken"]
    found.guest.qmp("system_reset")
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] - before <= 0.0005 * WITHOUT
    status = check_kept(found)
    # What firmware threw away again was not much.
    assert status["counters"]["again"] <= 2.5 * sum(slot["size"] for slot in ram_slots(status))


@pytest.mark.every_kernel
def test_with_the_quirk_it_does_not_hang(kept, pages):
    """Each slot's end drops every table then, and 6.12's livelock is near (stale roots)."""
    found = kept("quirk=keep", machine="pc", args=["-action", "reboot=reset"])
    found.guest.wait_ready()
    found.guest.qmp("system_reset")
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] <= 0.02 * WITHOUT
    status = found.settled()
    assert status["quirk"] == "kept" and status["counters"]["stuck"] == 0
    check_memory(found.guest)


@full
@pytest.mark.parametrize("machine", [pytest.param("q35", marks=full), "microvm"])
def test_several_vcpus_share_the_work(kept, pages, machine):
    found = kept(machine=machine, smp=3)
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] <= 0.001 * WITHOUT
    assert len(check_kept(found)["vcpus"]) == 3


@full
@pytest.mark.parametrize("backing", [pytest.param("memfd", marks=full), "file-private"])
def test_other_backings(kept, pages, backing):
    found = kept(machine="microvm", backing=backing)
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] <= 0.0005 * WITHOUT
    check_kept(found)


def test_loaded_by_ld_preload(tmp_path, pages):
    wrapper = ["env", f"LD_PRELOAD={plugin_path()}"]
    with Guest(machine="microvm", workload_mib=64, wrapper=wrapper, paused=True) as guest:
        guest.qmp("cont")
        guest.wait_ready()
        assert guest.stats()["pf_taken"] <= 0.0005 * WITHOUT
        check_memory(guest)


@full
def test_off_it_changes_nothing(kept, pages):
    with Guest(machine="microvm", workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        without = guest.stats()["pf_taken"]
    found = kept("keep=off", machine="microvm")
    found.guest.wait_ready()
    assert abs(found.guest.stats()["pf_taken"] - without) <= 0.01 * without
    status = found.status()
    assert status["quirk"] == "undecided" and status["counters"]["populated"] == 0


@full
def test_after_a_restore(kept, pages, tmp_path):
    with Guest(workload_mib=64, memory_mib=160) as guest:
        guest.wait_ready()
        guest.save(tmp_path / "state")
    found = kept(incoming=tmp_path / "state", workload_mib=0, memory_mib=160)
    found.guest.wait_restored()
    before = found.guest.stats()["pf_taken"]
    found.guest.qmp("cont")
    assert found.guest.command("pass")["bad"] == 0
    assert found.guest.stats()["pf_taken"] - before <= 0.001 * 64 * 256


# -- memory that comes, and memory that is absent on purpose ----------------------------------


@pytest.mark.parametrize(("smp", "options"), [(1, []), pytest.param(2, ["quirk=keep"], marks=full)])
def test_a_plugged_dimm(kept, pages, smp, options):
    """Populated first, also where several vCPUs work at it and the ioctl had been put off."""
    found = kept(*options, machine="pc", smp=smp, memory="slots=2,maxmem=2G", workload_mib=32)
    found.guest.wait_ready()
    before = found.settled(), found.guest.stats()["pages_4k"]
    found.guest.qmp("object-add", **{"qom_type": "memory-backend-ram", "id": "d0",
                                     "size": 64 * MIB})  # fmt: skip
    found.guest.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="d0")
    status = found.settled()
    dimm = next(slot for slot in status["slots"] if slot["gpa"] == 4 << 30 and slot["as"] == 0)
    assert (dimm["state"], dimm["prefaulted"]) == ("done", 64 * MIB)
    assert found.guest.stats()["pages_4k"] - before[1] >= 64 * 256


@full
def test_virtio_mem_that_is_not_plugged_stays_absent(kept, pages):
    device = ["-object", "memory-backend-ram,id=vm0,size=512M",
              "-device", "virtio-mem-pci,id=vmem,memdev=vm0,requested-size=0"]  # fmt: skip
    found = kept(machine="q35", memory="maxmem=4G", workload_mib=32, args=device)
    found.guest.wait_ready()
    slot = next(s for s in found.settled()["slots"] if s["size"] == 512 * MIB and s["as"] == 0)
    assert slot["resident_only"] and slot["prefaulted"] == 0


def test_overcommitted_memory_is_not_touched(kept, pages):
    found = kept(machine="microvm", backing="ram,reserve=off", workload_mib=32, memory_mib=160)
    found.guest.wait_ready()
    status = found.settled()
    assert status["counters"]["populated"] < 2 * MIB
    assert all(slot["resident_only"] for slot in ram_slots(status) if slot["size"] > MIB)
    found.ask("populate all")
    found.ask("prefault")
    assert found.settled()["counters"]["populated"] > 150 * MIB
    check_memory(found.guest)


# -- moments to hold back ----------------------------------------------------------------------


def test_dirty_logging_holds_it_back(kept, pages):
    found = kept(machine="pc", workload_mib=64)
    found.guest.wait_ready()
    done = found.settled()["counters"]["prefaulted"]
    found.guest.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    found.guest.qmp("migrate", uri="exec:cat >/dev/null")
    found.guest.wait_event("MIGRATION")
    while found.guest.qmp("query-migrate").get("status") != "active":
        pass
    status = found.status()
    assert {slot["why"] for slot in ram_slots(status)} == {"dirty logging"}
    found.ask("prefault")
    assert found.status()["counters"]["prefaulted"] == done
    found.guest.qmp("migrate_cancel")
    while found.guest.qmp("query-migrate")["status"] != "cancelled":
        pass
    status = found.settled()
    assert all(slot["state"] == "done" for slot in ram_slots(status))
    assert status["counters"]["prefaulted"] > done
    check_memory(found.guest)


def test_qemu_answers_and_ends_while_it_populates(kept, pages):
    """The vCPU thread at work is QEMU's, and gives way like a guest."""
    found = kept(machine="microvm", memory_mib=1536, paused=True)
    found.guest.qmp("cont")
    while not found.status()["counters"]["populated"]:
        pass
    found.guest.qmp("stop")
    assert found.guest.status() == "paused"
    assert found.status()["pending"]
    found.guest.qmp("cont")
    found.guest.qmp("quit")
    assert found.guest.wait_exit(30) == 0


def test_paused_by_the_operator(kept, pages):
    found = kept(machine="pc", paused=True, workload_mib=64, memory_mib=192)
    found.ask("pause")
    found.guest.qmp("cont")
    found.guest.wait_ready()
    assert found.status()["held"] == "paused"
    assert found.guest.stats()["pf_taken"] > 64 * 256
    found.ask("resume")
    status = found.settled()
    assert status["counters"]["prefaulted"] >= 190 * MIB
    check_memory(found.guest)


# -- how QEMU may be run ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["sandbox", pytest.param("user", marks=full), pytest.param("chroot", marks=full)]
)
def test_confined_qemus(kept, pages, way, tmp_path):
    os.chmod(tmp_path, 0o755)
    new = (
        "-run-with"
        in subprocess.run(
            ["qemu-system-x86_64", "-help"], capture_output=True, text=True, check=True
        ).stdout
    )
    arguments = {
        "sandbox": ["-sandbox", SANDBOX],
        "user": ["-run-with", "user=nobody"] if new else ["-runas", "nobody"],
        "chroot": ["-run-with", f"chroot={tmp_path}"] if new else ["-chroot", str(tmp_path)],
    }[way]
    found = kept(machine="microvm", workload_mib=64, args=arguments)
    found.guest.wait_ready()
    assert found.guest.stats()["pf_taken"] < 50
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
    assert found.settled()["pending"] == 0


@full
def test_daemonized(tmp_path, pages):
    """The thread, the socket and the pagemap must be those of the child that goes on."""
    path, pidfile, qmp = tmp_path / "control", tmp_path / "pid", tmp_path / "qmp"
    subprocess.run(
        ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "microvm",
         "-accel", "kvm", "-m", "128M", "-daemonize", "-pidfile", str(pidfile), "-S",
         "-plugin", f"{plugin_path()},socket={path}",
         "-qmp", f"unix:{qmp},server=on,wait=off"],
        check=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    pid = int(pidfile.read_text())
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            client.sendall(b"status\n")
            status = json.loads(client.makefile().readline())
        assert status["pid"] == pid and status["pre_fault_memory"]
    finally:
        pidfd = os.pidfd_open(pid)
        os.kill(pid, 9)
        os.close(pidfd)


# -- the tool and the plugin -------------------------------------------------------------------


def test_the_tool_works_through_it(kept, pages):
    from support.tool import Tool  # noqa: PLC0415

    found = kept("keep=off", machine="pc", workload_mib=64, memory_mib=192)
    found.guest.wait_ready()
    result = Tool(["--qmp", str(found.guest.qmp_path), "--json"]).finish()
    assert result.status == 0, result.stderr
    assert result.report["agent"] == "plugin"
    assert result.report["bytes"]["remaining"] == 0
    assert found.guest.stats()["pages_4k"] >= 190 * 256
    assert found.guest.status() == "running"
    check_memory(found.guest)
