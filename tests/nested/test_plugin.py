# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the plugin keeps guests prefaulted with the real ioctl.

The number of faults is KVM's ``pf_taken``, counted from the first instruction until the guest has
booted and written 256 MiB. A few faults are accesses to device registers (``pf_emulate``).
Prefaulting cannot avoid these faults.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault_lab.guest import Guest
from support.guest import (
    MakePluginGuest,
    SetThp,
    check_memory,
    faults,
    plug_dimm,
    plugin_guests,
    prefault,
)

WORKLOAD_MIB = 256
MIB = 1 << 20
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@pytest.fixture
def make_plugin_guest() -> Iterator[MakePluginGuest]:
    """Return a function that starts a guest and passes options to the plugin."""
    with plugin_guests(WORKLOAD_MIB) as start:
        yield start


# Without the plugin, a guest with 4K pages takes at least this many faults to write its workload.
FAULTS_WITHOUT_PLUGIN = WORKLOAD_MIB * 256
full = pytest.mark.full  # runs only in make test-full


def ram_slots(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [slot for slot in status["slots"] if slot["as"] == 0 and not slot["flags"] & 2]


# --- boots ---


def check_kept(guest: Guest) -> dict[str, Any]:
    status = guest.wait_kept()
    assert status["quirk"] == "disabled"
    assert (status["counters"]["errors"], status["counters"]["stuck"]) == (0, 0)
    assert all(slot["state"] == "done" for slot in ram_slots(status))
    check_memory(guest)
    return status


@pytest.mark.every_kernel
@pytest.mark.parametrize(
    "machine", ["pc", pytest.param("q35", marks=full), pytest.param("microvm", marks=full)]
)
def test_boot_on_borrowed_vcpus(make_plugin_guest: MakePluginGuest, machine: str) -> None:
    guest = make_plugin_guest("vcpu=borrow", machine=machine)
    guest.wait_ready()
    assert faults(guest) <= 0.0005 * FAULTS_WITHOUT_PLUGIN
    check_kept(guest)


@full
@pytest.mark.parametrize(
    "machine", ["pc", pytest.param("q35", marks=full), pytest.param("microvm", marks=full)]
)
def test_boot_on_huge_pages(
    make_plugin_guest: MakePluginGuest, set_thp: SetThp, machine: str
) -> None:
    set_thp("always")
    with Guest(machine=machine, workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        without = faults(guest)
    guest = make_plugin_guest(machine=machine)
    guest.wait_ready()
    # Both counts are small: about 500 without the plugin, and 10 to 20 with it.
    assert faults(guest) <= 0.05 * without
    check_kept(guest)


def test_reset_takes_few_faults(make_plugin_guest: MakePluginGuest) -> None:
    """Check the faults after a reset, in which KVM drops the tables of low RAM again."""
    guest = make_plugin_guest(machine="q35", args=["-action", "reboot=reset"])
    guest.wait_ready()
    before = faults(guest)
    guest.qmp("system_reset")
    guest.wait_ready()
    assert faults(guest) - before <= 0.0005 * FAULTS_WITHOUT_PLUGIN
    status = check_kept(guest)
    # KVM dropped only a small part of the tables, so the plugin prefaulted little memory again.
    assert status["counters"]["again"] <= 2.5 * sum(slot["size"] for slot in ram_slots(status))


@pytest.mark.every_kernel
def test_no_hang_with_the_quirk(make_plugin_guest: MakePluginGuest) -> None:
    """Keep KVM_X86_QUIRK_SLOT_ZAP_ALL enabled.

    With this quirk, KVM drops all tables whenever QEMU deletes a memslot. On kernels without
    commit 20a6cff3b283 (Linux 6.15), the ioctl can then retry forever.
    """
    guest = make_plugin_guest("quirk=keep", machine="pc", args=["-action", "reboot=reset"])
    guest.wait_ready()
    guest.qmp("system_reset")
    guest.wait_ready()
    assert faults(guest) <= 0.02 * FAULTS_WITHOUT_PLUGIN
    status = guest.wait_kept()
    assert status["quirk"] == "kept" and status["counters"]["stuck"] == 0
    check_memory(guest)


@full
@pytest.mark.parametrize("machine", [pytest.param("q35", marks=full), "microvm"])
def test_vcpus_share_work(make_plugin_guest: MakePluginGuest, machine: str) -> None:
    guest = make_plugin_guest(machine=machine, smp=3)
    guest.wait_ready()
    assert faults(guest) <= 0.001 * FAULTS_WITHOUT_PLUGIN
    assert len(check_kept(guest)["vcpus"]) == 3


@full
@pytest.mark.parametrize("backing", [pytest.param("memfd", marks=full), "file-private"])
def test_other_backings(make_plugin_guest: MakePluginGuest, backing: str) -> None:
    # pytest keeps deleted files open on the file system with the guest's file. The plugin cannot
    # find these files, so with populate=auto it would not populate.
    guest = make_plugin_guest("populate=all", machine="microvm", backing=backing)
    guest.wait_ready()
    assert faults(guest) <= 0.0005 * FAULTS_WITHOUT_PLUGIN
    check_kept(guest)


def test_ld_preload() -> None:
    wrapper = ["env", f"LD_PRELOAD={plugin_path()}"]
    with Guest(machine="microvm", workload_mib=64, wrapper=wrapper, paused=True) as guest:
        guest.qmp("cont")
        guest.wait_ready()
        assert faults(guest) <= 0.0005 * FAULTS_WITHOUT_PLUGIN
        check_memory(guest)


@full
def test_keep_off_changes_nothing(make_plugin_guest: MakePluginGuest) -> None:
    with Guest(machine="microvm", workload_mib=WORKLOAD_MIB) as guest:
        guest.wait_ready()
        without = faults(guest)
    guest = make_plugin_guest("keep=off", machine="microvm")
    guest.wait_ready()
    assert abs(faults(guest) - without) <= 0.01 * without
    status = guest.control("status")
    assert status["quirk"] == "undecided" and status["counters"]["populated"] == 0


@full
def test_restored_guest_is_prefaulted(make_plugin_guest: MakePluginGuest, tmp_path: Path) -> None:
    with Guest(workload_mib=64, memory_mib=160) as guest:
        guest.wait_ready()
        guest.save(tmp_path / "state")
    guest = make_plugin_guest(incoming=tmp_path / "state", workload_mib=0, memory_mib=160)
    guest.wait_restored()
    before = faults(guest)
    guest.qmp("cont")
    check_memory(guest)
    assert faults(guest) - before <= 0.001 * 64 * 256


# --- hotplugged memory, and memory that must stay absent ---


@pytest.mark.parametrize(("smp", "options"), [(1, []), pytest.param(2, ["quirk=keep"], marks=full)])
def test_plugged_dimm_is_prefaulted(
    make_plugin_guest: MakePluginGuest, smp: int, options: list[str]
) -> None:
    """Plug a DIMM into a guest with one vCPU, or with two vCPUs that share the work."""
    guest = make_plugin_guest(
        *options, machine="pc", smp=smp, memory="slots=2,maxmem=2G", workload_mib=32
    )
    guest.wait_ready()
    guest.wait_kept()
    before = guest.stats()["pages_4k"]
    plug_dimm(guest, 64 * MIB)
    status = guest.wait_kept()
    dimm = next(slot for slot in status["slots"] if slot["gpa"] == 4 << 30 and slot["as"] == 0)
    assert (dimm["state"], dimm["prefaulted"]) == ("done", 64 * MIB)
    assert guest.stats()["pages_4k"] - before >= 64 * 256


@full
def test_unplugged_virtio_mem_stays_absent(make_plugin_guest: MakePluginGuest) -> None:
    device = ["-object", "memory-backend-ram,id=vm0,size=512M",
              "-device", "virtio-mem-pci,id=vmem,memdev=vm0,requested-size=0"]  # fmt: skip
    guest = make_plugin_guest(machine="q35", memory="maxmem=4G", workload_mib=32, args=device)
    guest.wait_ready()
    slot = next(s for s in guest.wait_kept()["slots"] if s["size"] == 512 * MIB and s["as"] == 0)
    assert slot["resident_only"] and slot["prefaulted"] == 0


def test_overcommitted_memory_is_not_populated(make_plugin_guest: MakePluginGuest) -> None:
    guest = make_plugin_guest(
        machine="microvm", backing="ram,reserve=off", workload_mib=32, memory_mib=160
    )
    guest.wait_ready()
    status = guest.wait_kept()
    assert status["counters"]["populated"] < 2 * MIB
    assert all(slot["resident_only"] for slot in ram_slots(status) if slot["size"] > MIB)
    guest.control("populate all")
    guest.control("prefault")
    assert guest.wait_kept()["counters"]["populated"] > 150 * MIB
    check_memory(guest)


@pytest.mark.parametrize(("tmpfs_mib", "populated"), [(256, True), (176, False)])
def test_tmpfs_keeps_space_for_other_files(
    make_plugin_guest: MakePluginGuest, tmp_path: Path, tmpfs_mib: int, populated: bool
) -> None:
    """Check that a guest is populated only if 32 MiB of its tmpfs remain free."""
    mount = tmp_path / "tmpfs"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={tmpfs_mib}M", "tmpfs", mount], check=True)
    try:
        other = mount / "other"
        other.touch()
        guest = make_plugin_guest(
            machine="microvm,memory-backend=shared",
            backing=None,
            args=(
                "-object",
                f"memory-backend-file,id=shared,size=160M,share=on,mem-path={mount}/ram",
            ),
            memory_mib=160,
            workload_mib=32,
        )
        guest.wait_ready()
        counters = guest.wait_kept()["counters"]
        assert (counters["populated"] > 150 * MIB) == populated
        assert counters["errors"] == 0
        with open(other, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 32 * MIB)
        check_memory(guest)
        guest.qmp("quit")
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


# --- deferred prefault ---


def test_dirty_logging_defers_prefault(make_plugin_guest: MakePluginGuest) -> None:
    guest = make_plugin_guest(machine="pc", workload_mib=64)
    guest.wait_ready()
    done = guest.wait_kept()["counters"]["prefaulted"]
    guest.qmp("migrate-set-parameters", max_bandwidth=1 << 16)
    guest.qmp("migrate", uri="exec:cat >/dev/null")
    guest.wait_event("MIGRATION")
    while guest.qmp("query-migrate").get("status") != "active":
        pass
    status = guest.control("status")
    assert {slot["why"] for slot in ram_slots(status)} == {"dirty logging"}
    guest.control("prefault")
    assert guest.control("status")["counters"]["prefaulted"] == done
    guest.qmp("migrate_cancel")
    while guest.qmp("query-migrate")["status"] != "cancelled":
        pass
    status = guest.wait_kept()
    assert all(slot["state"] == "done" for slot in ram_slots(status))
    assert status["counters"]["prefaulted"] > done
    check_memory(guest)


def test_qemu_responds_while_populating(make_plugin_guest: MakePluginGuest) -> None:
    """Check that QEMU executes ``stop`` and ``quit`` while a vCPU thread populates."""
    guest = make_plugin_guest(machine="microvm", memory_mib=1536, paused=True)
    guest.qmp("cont")
    while not guest.control("status")["counters"]["populated"]:
        pass
    guest.qmp("stop")
    assert guest.status() == "paused"
    assert guest.control("status")["pending"]
    guest.qmp("cont")
    guest.qmp("quit")
    assert guest.wait_exit(30) == 0


def test_pause_and_resume(make_plugin_guest: MakePluginGuest) -> None:
    guest = make_plugin_guest(machine="pc", paused=True, workload_mib=64, memory_mib=192)
    guest.control("pause")
    guest.qmp("cont")
    guest.wait_ready()
    assert guest.control("status")["held"] == "paused"
    assert faults(guest) > 64 * 256
    guest.control("resume")
    status = guest.wait_kept()
    assert status["counters"]["prefaulted"] >= 190 * MIB
    check_memory(guest)


# --- confined and daemonized QEMUs ---


@pytest.mark.parametrize(
    "way", ["sandbox", pytest.param("user", marks=full), pytest.param("chroot", marks=full)]
)
def test_confined_qemu(make_plugin_guest: MakePluginGuest, way: str, tmp_path: Path) -> None:
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
    guest = make_plugin_guest(machine="microvm", workload_mib=64, args=arguments)
    guest.wait_ready()
    assert faults(guest) < 50
    assert stat.S_IMODE(guest.control_path.stat().st_mode) == 0o600
    assert guest.wait_kept()["pending"] == 0


@full
def test_daemonized(tmp_path: Path) -> None:
    """Check that the plugin's thread and files belong to QEMU's daemon process."""
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


# --- the tool with the plugin ---


def test_tool_uses_plugin(make_plugin_guest: MakePluginGuest) -> None:
    guest = make_plugin_guest("keep=off", machine="pc", workload_mib=64, memory_mib=192)
    guest.wait_ready()
    result = prefault(guest)
    assert result.status == 0, result.stderr
    assert result.report["agent"] == "plugin"
    assert result.report["bytes"]["remaining"] == 0
    assert guest.stats()["pages_4k"] >= 190 * 256
    assert guest.status() == "running"
    check_memory(guest)
