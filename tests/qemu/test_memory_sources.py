# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that populating respects the limits of tmpfs, hugetlb pools and disks.

Some tests name the bug reports from which their setups are taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.qemu import MIB, QemuVm, StartQemu, start_vm

StartVm = Callable[..., QemuVm]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting requires root")


@pytest.fixture
def vm_of(start_qemu: StartQemu, tmp_path: Path) -> StartVm:
    def start(*arguments: str, accel: str = "tcg", paused: bool = True) -> QemuVm:
        return start_vm(start_qemu, tmp_path, *arguments, accel=accel, paused=paused)

    return start


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 200 MiB."""
    path = tmp_path / "shm"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200M", "none", path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def ram_in(directory: Path, mib: int, name: str = "") -> tuple[str, ...]:
    path = directory / name if name else directory
    backend = f"memory-backend-file,id=m,size={mib}M,mem-path={path},share=on"
    return ("-m", f"{mib}M", "-object", backend, "-machine", "memory-backend=m")


def used(directory: Path) -> int:
    figures = os.statvfs(directory)
    return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


@needs_root
def test_too_small_tmpfs_is_refused(vm_of: StartVm, tmpfs: Path) -> None:
    """Check that RAM larger than its tmpfs is refused before QEMU gets SIGBUS.

    The setup is from kata-containers#12919 and zTrix/qemu-compose#26.
    """
    vm = vm_of(*ram_in(tmpfs, 256))
    result = vm.prefault("--populate-only")
    assert result.status == 5 and result.error["code"] == "no-memory"
    assert f"the file system of {tmpfs} has only 200.0 MiB" in result.error["cause"]
    assert used(tmpfs) == 0


@needs_root
def test_deleted_file_is_found_without_cap_sys_admin(vm_of: StartVm, tmpfs: Path) -> None:
    """Check that the tool finds a deleted file without the links in map_files/.

    Only processes with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE can follow these links
    (proc_map_files_get_link() in fs/proc/base.c).
    """
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    vm = vm_of(*ram_in(tmpfs, 256))
    capabilities = "-sys_admin,-checkpoint_restore"
    without = ["setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities]
    tool = [sys.executable, "-m", "qemu_prefault", "--qmp", vm.qemu.qmp, "--populate-only"]
    done = subprocess.run([*without, *tool], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert f"the file system of {tmpfs} has only 200.0 MiB" in done.stderr
    assert used(tmpfs) == 0


@needs_root
@pytest.mark.parametrize("unlinked", [True, False])
def test_memory_committed_to_other_files_is_not_used(
    vm_of: StartVm, tmpfs: Path, unlinked: bool
) -> None:
    neighbour = vm_of(*ram_in(tmpfs, 64, "" if unlinked else "neighbour"), paused=False)
    vm = vm_of(*ram_in(tmpfs, 150))  # the tmpfs has space for this file, but not for both
    result = vm.prefault("--populate-only")
    assert result.status == 5 and "committed to other files" in result.error["cause"]
    assert neighbour.qmp.status() == "running"


@needs_root
def test_tmpfs_is_filled_to_its_last_page(vm_of: StartVm, tmpfs: Path) -> None:
    vm = vm_of(*ram_in(tmpfs, 200))
    result = vm.prefault("--populate-only")
    assert result.status == 0, result.stderr
    assert result.report["bytes"]["remaining"] == 0
    assert used(tmpfs) > 199 * MIB


@needs_root
def test_force_overrides_the_file_system(vm_of: StartVm, tmpfs: Path) -> None:
    vm = vm_of(*ram_in(tmpfs, 256))
    result = vm.prefault("--populate-only", "--force")
    assert result.status == 3
    assert vm.qmp.status() in ("prelaunch", "paused")


@needs_root
def test_memory_shortage_ends_the_run(vm_of: StartVm, tmpfs: Path) -> None:
    """Fill the tmpfs after a successful dry run, so that too little space remains."""
    vm = vm_of(*ram_in(tmpfs, 190))
    report = vm.prefault("--populate-only", "--dry-run").report
    assert report["bytes"]["populated"] > 180 * MIB
    (tmpfs / "late").write_bytes(bytes(60 * MIB))
    late = vm.prefault("--populate-only")
    assert late.status == 5 and vm.qmp.status() in ("prelaunch", "paused")


def test_disk_file_is_not_populated(vm_of: StartVm, tmp_path: Path) -> None:
    """Check that ``--populate auto`` does not populate files on disks.

    The setup is from LookingGlass#403.
    """
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    device = os.stat(tmp_path).st_dev
    own = [f for f in fields if f[2] == f"{os.major(device)}:{os.minor(device)}"]
    if not own or own[-1][own[-1].index("-") + 1] == "tmpfs":
        pytest.skip("the temporary directory is not on a disk")
    vm = vm_of(*ram_in(tmp_path, 64, "ram"))
    result = vm.prefault("--populate-only")
    assert result.status == 0 and result.warnings == {"resident-only"}
    assert (tmp_path / "ram").stat().st_blocks == 0
    # Sparse files elsewhere on the disk may leave too little space for the check.
    assert vm.prefault("--populate-only", "--populate", "all", "--force").status == 0
    assert (tmp_path / "ram").stat().st_blocks * 512 >= 63 * MIB


def test_ivshmem_is_not_guest_ram(vm_of: StartVm, tmp_path: Path) -> None:
    backend = f"memory-backend-file,id=glass,mem-path={tmp_path}/glass,share=on,size=32M"
    device = ("-object", backend, "-device", "ivshmem-plain,memdev=glass")
    vm = vm_of("-M", "q35", "-m", "64M", *device, paused=False)
    assert vm.prefault("--populate-only").status == 0
    assert (tmp_path / "glass").stat().st_blocks == 0


def test_numa_ram_is_guest_ram_with_ivshmem(vm_of: StartVm, tmp_path: Path) -> None:
    nodes = [
        word
        for number in (0, 1)
        for word in (
            *("-object", f"memory-backend-ram,id=n{number},size=64M"),
            *("-numa", f"node,memdev=n{number}"),
        )
    ]
    glass = f"memory-backend-file,id=glass,mem-path={tmp_path}/glass,share=on,size=32M"
    device = ("-object", glass, "-device", "ivshmem-plain,memdev=glass")
    vm = vm_of("-M", "q35", "-smp", "2", "-m", "128M", *nodes, *device)
    result = vm.prefault("--populate-only")
    assert result.status == 0
    assert result.report["bytes"]["requested"] > 126 * MIB


BOOT_SECTOR = """\
.code16
.globl _start
_start: cli
 xorw %ax, %ax
 movw %ax, %ds
 movw %ax, %ss
 movw $0x7000, %sp
 movl $0xC0000000, %ebx
again: movl $0x80001010, %eax # bus 0, device 2, function 0, register 0x10: its first BAR
 movw $0xCF8, %dx
 outl %eax, %dx
 movw $0xCFC, %dx
 movl %ebx, %eax
 outl %eax, %dx
 addl $0x1000000, %ebx
 cmpl $0xF0000000, %ebx
 jb again
 movl $0xC0000000, %ebx
 jmp again
.org 510
.word 0xAA55
"""


def test_moved_bar_does_not_stop_populating(vm_of: StartVm, tmp_path: Path) -> None:
    """Change the memory map during the run by moving a device's BAR.

    The setup is from rust-vmm/vhost#245 and NVIDIA/QEMU#39.
    """
    for name in ("as", "ld"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (binutils)")
    (tmp_path / "boot.s").write_text(BOOT_SECTOR)
    obj, image = str(tmp_path / "boot.o"), str(tmp_path / "boot.img")
    subprocess.run(["as", "--32", "-o", obj, tmp_path / "boot.s"], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", image, obj]
    subprocess.run(link, check=True)
    drive = ("-device", "VGA,addr=2", "-drive", f"file={image},format=raw,if=ide")
    vm = vm_of("-M", "pc", "-m", "64M", *drive, paused=False)
    mtree: dict[str, Any] = {"command-line": "info mtree -f"}
    maps: set[str] = set()
    while len(maps) < 3:  # until the guest moves the BAR
        maps.add(str(vm.qmp.execute("human-monitor-command", **mtree)))
    result = vm.prefault("--populate-only")
    assert result.status == 0, result.stderr


def test_names_need_not_be_utf8(vm_of: StartVm) -> None:
    """Use a thread name that the kernel truncates within a character, after 15 bytes.

    The setup is from thrash-protect#25.
    """
    vm = vm_of("-name", "process=vm-прод-сервер", "-m", "64M")
    assert vm.prefault("--populate-only").status == 0
    assert vm.command("map").status == 0
    assert "internal error" not in vm.command("probe").stderr


# --- messages ---


def test_missing_machine_is_reported(vm_of: StartVm) -> None:
    result = vm_of("-M", "none").command("map")
    assert result.status == 1 and "has no machine" in result.error["cause"]


def test_read_only_backend_is_not_called_pam(vm_of: StartVm, tmp_path: Path) -> None:
    (tmp_path / "nv").write_bytes(b"")
    os.truncate(tmp_path / "nv", 64 * MIB)
    backend = f"memory-backend-file,id=nv,mem-path={tmp_path}/nv,size=64M,readonly=on"
    nvdimm = ("-object", backend, "-device", "nvdimm,memdev=nv,unarmed=on")
    vm = vm_of("-M", "q35,nvdimm=on", "-m", "64M,slots=1,maxmem=1G", *nvdimm)
    sections = {s["name"]: s["skipped"] for s in vm.command("map").report["sections"]}
    assert sections["nv"] == "a read-only memory backend"


def test_populate_only_reports_skipped_memory(vm_of: StartVm) -> None:
    backend = "memory-backend-ram,id=m,size=64M,reserve=off"
    vm = vm_of("-m", "64M", "-object", backend, "-machine", "memory-backend=m")
    result = vm.prefault("--populate-only")
    assert result.status == 0 and result.warnings == {"resident-only"}
