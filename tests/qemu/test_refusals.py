# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the tool refuses unsuitable guests and hosts, and reports the reason."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_prefault.host import kvm
from qemu_prefault_lab.wait import wait_for
from support.limits import out_of_memory_kills
from support.process import anonymous_bytes, leftovers
from support.qemu import MIB, QemuVm, StartQemu, run_tool, start_vm

StartVm = Callable[..., QemuVm]

COMMANDS = [("--populate-only",), ("--populate-only", "--dry-run")]


@pytest.fixture
def vm_of(start_qemu: StartQemu, tmp_path: Path) -> StartVm:
    def start(*arguments: str, accel: str = "tcg", paused: bool = True) -> QemuVm:
        return start_vm(start_qemu, tmp_path, *arguments, accel=accel, paused=paused)

    return start


@contextmanager
def untouched(vm: QemuVm) -> Iterator[None]:
    """Check that a block does not affect the guest and leaves no helpers in QEMU."""
    status, memory = vm.qmp.status(), anonymous_bytes(vm.pid)
    vm.qmp.events.clear()
    yield
    assert vm.qmp.status() == status
    assert anonymous_bytes(vm.pid) < memory + 8 * MIB
    assert {event["event"] for event in vm.qmp.events} & {"STOP", "RESUME"} == set()
    assert leftovers(vm.pid) == []


def check_refused(vm: QemuVm, code: str, *words: str) -> None:
    for command in COMMANDS:
        with untouched(vm):
            result = vm.prefault(*command)
        assert result.status == 5, result.stderr
        assert result.error["code"] == code
        for word in words:
            assert word in result.error["cause"] + result.error["remedy"]


# --- unsupported guests ---


def test_tcg_guest_has_no_stage2(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M")
    with untouched(vm):
        result = vm.prefault()
    assert result.status == 4
    assert result.error["code"] == "not-kvm"
    assert "--populate-only" in result.error["remedy"]


def test_unsupported_kernel_suggests_populate_only(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", accel="kvm", paused=False)
    if kvm.pre_fault_capability().available is not False:
        pytest.skip("this kernel's KVM has KVM_PRE_FAULT_MEMORY")
    with untouched(vm):
        result = vm.prefault()
    assert result.status == 4
    assert result.error["code"] == "no-capability"
    assert "--populate-only" in result.error["remedy"]


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_probe_of_an_unsupported_guest(vm_of: StartVm, accel: str) -> None:
    vm = vm_of("-m", "64M", accel=accel)
    if accel == "kvm" and kvm.pre_fault_capability().available is not False:
        pytest.skip("this kernel's KVM has KVM_PRE_FAULT_MEMORY")
    with untouched(vm):
        result = vm.command("probe")
    assert result.status == result.report["exit"] == 4
    findings = {finding["check"]: finding for finding in result.report["findings"]}
    assert findings["attach"]["verdict"] == "ok"
    assert findings["prefault"]["verdict"] == "no" and findings["prefault"]["remedy"]
    assert findings["populate"]["verdict"] == "ok"


# --- guest states ---


def test_precopy_source(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", paused=False)
    vm.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
    vm.qmp.execute("migrate", uri="exec:cat >/dev/null")
    check_refused(vm, "migration", "query-migrate", "destination")
    vm.qmp.execute("migrate_cancel")


def test_finished_migration_is_accepted(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", paused=False)
    vm.qmp.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
    )
    vm.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
    vm.qmp.execute("migrate", uri="exec:cat >/dev/null")
    vm.qmp.execute("migrate_cancel")
    vm.qmp.wait_migration("cancelled")
    assert vm.prefault("--populate-only").status == 0


def test_migrated_guest(vm_of: StartVm, tmp_path: Path) -> None:
    vm = vm_of("-m", "64M", paused=False)
    vm.qmp.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
    )
    vm.qmp.execute("migrate", uri=f"exec:cat >{tmp_path}/state")
    vm.qmp.wait_migration("completed")
    wait_for(lambda: vm.qmp.status() == "postmigrate", "the run state is postmigrate")
    check_refused(vm, "migration", "query-status: postmigrate", "destination")


def test_incoming_ram_not_loaded(vm_of: StartVm) -> None:
    check_refused(vm_of("-m", "64M", "-incoming", "defer"), "incoming", "inmigrate", "-S")


def test_incoming_ram_while_loading(vm_of: StartVm, tmp_path: Path) -> None:
    """Check that a destination is refused while its RAM is loaded from a slow source."""
    source = vm_of("-m", "64M", paused=False)
    target = vm_of("-m", "64M", "-incoming", f"unix:{tmp_path}/migration")
    source.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
    source.qmp.execute("migrate", uri=f"unix:{tmp_path}/migration")
    check_refused(target, "incoming", "not loaded")
    check_refused(source, "migration")


def test_postcopy(vm_of: StartVm, tmp_path: Path) -> None:
    """Check that postcopy is refused, because the destination still lacks pages."""
    source = vm_of("-m", "64M", paused=False)
    target = vm_of("-m", "64M", "-incoming", "defer")
    capabilities = [{"capability": name, "state": True} for name in ("postcopy-ram", "events")]
    for vm in (target, source):
        vm.qmp.execute("migrate-set-capabilities", capabilities=capabilities)
    target.qmp.execute("migrate-incoming", uri=f"unix:{tmp_path}/migration")
    source.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
    source.qmp.execute("migrate-set-parameters", max_postcopy_bandwidth=4096)
    source.qmp.execute("migrate", uri=f"unix:{tmp_path}/migration")
    source.qmp.wait_migration("active")
    source.qmp.execute("migrate-start-postcopy")
    source.qmp.wait_migration("postcopy-active")
    target.qmp.wait_migration("postcopy-active")
    for vm in (target, source):
        result = vm.prefault("--populate-only")
        assert result.status == 5, result.stderr
        assert result.error["code"] == "postcopy"


def test_incoming_without_migration(vm_of: StartVm) -> None:
    result = vm_of("-m", "64M").prefault("--populate-only", "--incoming")
    assert result.status == 5, result.stderr
    assert result.error["code"] == "not-incoming"
    assert "-incoming" in result.error["remedy"]


def test_incoming_with_postcopy_capability(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", "-incoming", "defer")
    vm.qmp.execute(
        "migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}]
    )
    result = vm.prefault("--populate-only", "--incoming")
    assert result.status == 5, result.stderr
    assert result.error["code"] == "postcopy"


def test_dirty_rate_measuring(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", paused=False)
    vm.qmp.execute("calc-dirty-rate", calc_time=60)
    check_refused(vm, "dirty-logging", "measured", "query-dirty-rate")


def test_guest_shut_down(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", "-no-reboot", "-no-shutdown", paused=False)
    vm.qmp.execute("system_reset")
    vm.qmp.wait_event("STOP")
    check_refused(vm, "guest-state", "query-status: shutdown")


def test_guest_panicked(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", "-device", "pvpanic", "-action", "panic=pause", paused=False)
    vm.qmp.execute("human-monitor-command", command_line="o /b 0x505 1")
    assert vm.qmp.status() == "guest-panicked"
    check_refused(vm, "guest-state", "query-status: guest-panicked")


# --- other clients ---


def test_busy_monitor_fails_fast(vm_of: StartVm) -> None:
    vm = vm_of("-m", "64M", paused=False)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(vm.qemu.qmp)
        assert b"QMP" in client.recv(4096)
        started = time.monotonic()
        result = vm.prefault("--populate-only")
        assert time.monotonic() - started < 3
    assert result.status == 5
    assert result.error["code"] == "monitor-busy"
    assert "second -qmp" in result.error["remedy"].replace("\n", " ")


# --- memory ---


@pytest.fixture
def memory_cgroup() -> Iterator[Callable[[int], Path]]:
    """Yield a function that creates a memory cgroup (v1 or v2) with a limit in bytes."""
    made: list[Path] = []

    def ours() -> tuple[Path, bool]:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                base = Path("/sys/fs/cgroup/memory")
                inside = base / path.lstrip("/")
                return (inside if inside.is_dir() else base), False
        unified = Path("/sys/fs/cgroup")
        if "memory" not in (unified / "cgroup.subtree_control").read_text().split():
            pytest.skip("no memory cgroup controller is available")
        return unified, True

    def make(limit: int) -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root can create a cgroup")
        parent, v2 = ours()
        group = parent / f"qemu-prefault-test-{os.getpid()}-{len(made)}"
        try:
            group.mkdir()
            (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"cannot create a memory cgroup: {error}")
        made.append(group)
        return group

    yield make
    for group in made:
        for pid in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()


def test_cgroup_limit_is_respected(vm_of: StartVm, memory_cgroup: Callable[[int], Path]) -> None:
    """Check that populating a 512 MiB guest in a 200 MiB cgroup is refused.

    Otherwise the kernel would kill QEMU.
    """
    group = memory_cgroup(200 * MIB)
    vm = vm_of("-m", "512M")
    (group / "cgroup.procs").write_text(str(vm.pid))
    check_refused(vm, "no-memory", group.name, "needs 511.", "--force", "--max-bytes")
    assert out_of_memory_kills(group) == 0
    # The tool populates a range that fits into the limit.
    assert vm.prefault("--populate-only", "--max-bytes", "64M").status == 0
    assert vm.prefault("--populate-only", "--populate", "resident").status == 0
    assert out_of_memory_kills(group) == 0
    assert vm.qmp.status() == "prelaunch"


def test_ancestor_cgroup_limit_is_respected(
    vm_of: StartVm, memory_cgroup: Callable[[int], Path]
) -> None:
    group = memory_cgroup(200 * MIB)
    inner = group / "inner"
    try:
        inner.mkdir()
        vm = vm_of("-m", "512M")
        (inner / "cgroup.procs").write_text(str(vm.pid))
    except OSError as error:
        pytest.skip(f"cannot create a nested cgroup: {error}")
    check_refused(vm, "no-memory", group.name)
    vm.qemu.kill()
    inner.rmdir()


def test_force_overrides_the_limit(vm_of: StartVm, memory_cgroup: Callable[[int], Path]) -> None:
    """Check that ``--force`` populates the guest in spite of the limit.

    An operator needs this option to prefault a guest first and raise the limit afterwards.
    """
    group = memory_cgroup(200 * MIB)
    vm = vm_of("-m", "256M")
    (group / "cgroup.procs").write_text(str(vm.pid))
    assert vm.prefault("--populate-only").error["code"] == "no-memory"
    assert vm.prefault("--populate-only", "--force", "--dry-run").status == 0
    (limit,) = [p for p in group.iterdir() if p.name in ("memory.max", "memory.limit_in_bytes")]
    limit.write_text(str(350 * MIB))
    assert vm.prefault("--populate-only", "--force").status == 0
    assert out_of_memory_kills(group) == 0


def test_guest_larger_than_the_host(vm_of: StartVm) -> None:
    """Check that a guest larger than the host's memory is not populated.

    With ``--populate all``, the tool must refuse the run.
    """
    total = int(Path("/proc/meminfo").read_text().split()[1]) >> 10  # MiB
    size = f"{total + 1024}M"
    backend = f"memory-backend-ram,id=ram,size={size},reserve=off"
    vm = vm_of("-m", size, "-object", backend, "-machine", "memory-backend=ram")
    with untouched(vm):
        result = vm.prefault("--populate-only", "--populate", "all")
    assert result.status == 5
    assert result.error["code"] == "no-memory"
    assert "host" in result.error["cause"] and "MemAvailable" in result.error["cause"]
    with untouched(vm):
        assert vm.prefault("--populate-only").report["bytes"]["populated"] == 0
    part = vm.prefault("--populate-only", "--populate", "all", "--range", "16M+16M")
    assert part.report["bytes"]["populated"] == 16 * MIB


def test_stock_qemu_has_no_qmp_agent(start_qemu: StartQemu) -> None:
    result = run_tool(start_qemu("-m", "64M"), "--populate-only", "--agent", "qmp")
    assert result.status == 4
    assert result.error["code"] == "no-qmp-command"
    assert "make qemu" in result.error["remedy"]
