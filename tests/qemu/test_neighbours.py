# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that populating a guest takes no memory that its neighbours can still allocate.

The neighbours are other guests on the same file system, processes in the same cgroup, and the
host. Some tests use file systems whose servers do not respond.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault.host import headroom, memory_source
from support.hung_fuse import NAME, fuse
from support.limits import MIB, cgroups, huge_pages, in_group, mounted, out_of_memory_kills, swap
from support.plugin import capable_prefix, wait_started
from support.qemu import Qemu, QemuVm, StartQemu, kvm_usable, start_vm

StartVm = Callable[..., QemuVm]
OVERCOMMIT = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and cgroups require root")
needs_kvm = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")


@pytest.fixture
def vm_of(start_qemu: StartQemu, tmp_path: Path) -> StartVm:
    def start(*arguments: str, prefix: Sequence[str] = ()) -> QemuVm:
        return start_vm(start_qemu, tmp_path, *arguments, prefix=prefix)

    return start


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    with mounted("tmpfs", tmp_path / "shm", "size=200M") as path:
        yield path


def ram(path: Path, mib: int, options: str = "share=on") -> Sequence[str]:
    backend = f"memory-backend-file,id=m,size={mib}M,mem-path={path},{options}"
    return ("-m", f"{mib}M", "-object", backend, "-machine", "memory-backend=m")


def with_plugin(
    start_qemu: StartQemu, control: Path, *arguments: str, prefix: Sequence[str] = ()
) -> Qemu:
    plugin = ("-plugin", f"{plugin_path()},socket={control}")
    prefix = [*prefix, *capable_prefix()]
    return start_qemu(*plugin, *arguments, accel="kvm", paused=False, prefix=prefix)


# --- files of other guests ---

# In each of these cases, the file of the neighbour is deleted.
NEIGHBOURS: dict[str, Callable[[Path], Sequence[str]]] = {
    "private": lambda path: ("-m", "64M", "-mem-path", str(path)),
    "renamed": lambda path: (*ram(path, 64), "-name", "process=web1"),
    "private and renamed": lambda path: (*ram(path, 64, "share=off"), "-name", "process=web1"),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_deleted_file_of_neighbour_is_found(vm_of: StartVm, tmpfs: Path, neighbour: str) -> None:
    vm_of(*NEIGHBOURS[neighbour](tmpfs))
    result = vm_of(*ram(tmpfs, 150)).prefault("--populate-only", "--dry-run")
    assert result.status == 5, result.stdout
    assert "committed to other files" in result.error["cause"]


def test_file_outside_qemus_mounts_is_found(vm_of: StartVm, tmpfs: Path, tmp_path: Path) -> None:
    """Use a mount namespace in which only one directory of the tmpfs is mounted."""
    ours, view = tmpfs / "ours", tmp_path / "view"
    ours.mkdir()
    view.mkdir()
    with (tmpfs / "other").open("wb") as other:
        other.truncate(64 * MIB)
    hide = f'mount --bind {ours} {view} && umount --lazy {tmpfs} && exec "$@"'
    vm = vm_of(*ram(view / "ram", 150), prefix=["unshare", "--mount", "sh", "-c", hide, "sh"])
    result = vm.prefault("--populate-only", "--dry-run")
    assert result.status == 5, result.stdout
    assert "committed to other files" in result.error["cause"]


@pytest.mark.parametrize("options", ["share=off", "share=on"])
def test_neighbour_of_a_chroot_is_found(
    vm_of: StartVm, tmpfs: Path, tmp_path: Path, options: str
) -> None:
    vm_of(*ram(tmpfs, 64))
    root = tmp_path / "root"
    root.mkdir()
    vm = vm_of(*ram(tmpfs, 150, options), "-chroot", str(root))
    result = vm.prefault("--populate-only")
    assert result.status == 5, result.stdout
    assert f"the file system of {tmpfs} has only 136.0 MiB" in result.error["cause"]


@pytest.mark.parametrize("kind", ["tmpfs", "hugetlbfs"])
def test_shared_memory_of_a_chroot_is_populated(vm_of: StartVm, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with ExitStack() as stack:
        if kind == "hugetlbfs":
            stack.enter_context(huge_pages(32))
        place = stack.enter_context(mounted(kind, tmp_path / "ram", "size=64M"))
        vm = vm_of(*ram(place, 64), "-chroot", str(root))
        result = vm.prefault("--populate-only")
        assert result.complete()["bytes"]["populated"] > 62 * MIB
        vm.qemu.kill()


def test_neighbour_on_an_unmounted_tmpfs_is_found(vm_of: StartVm, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "shm", "size=200M") as place:
        vm_of(*ram(place / "neighbour", 64))
        vm = vm_of(*ram(place, 150, "share=off"))
        subprocess.run(["umount", "--lazy", place], check=True)
        try:
            result = vm.prefault("--populate-only")
        finally:
            subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    assert result.status == 5, result.stdout
    assert "not mounted here, has only 136.0 MiB" in result.error["cause"]


@pytest.mark.parametrize("lower", ["same", "other"])
def test_neighbour_on_an_overlay_is_found(
    vm_of: StartVm, tmpfs: Path, tmp_path: Path, lower: str
) -> None:
    """Use an overlay whose upper layer is a tmpfs. Its lower layer may be another file system."""
    parts = {"upper": tmpfs / "u", "work": tmpfs / "w", "lower": tmpfs / "l"}
    if lower == "other":
        parts["lower"] = tmp_path / "lower"
    for part in parts.values():
        part.mkdir()
    layers = ",".join(f"{name}dir={part}" for name, part in parts.items())
    with mounted("overlay", tmp_path / "overlay", layers) as overlay:
        neighbour = vm_of(*ram(overlay / "neighbour", 64))
        vm = vm_of(*ram(overlay / "ram", 150, "share=off"))
        result = vm.prefault("--populate-only")
        assert result.status == 5, result.stdout
        assert "has only 136.0 MiB" in result.error["cause"]
        for each in (vm, neighbour):
            each.qemu.kill()


def test_unseen_file_is_not_taken_for_free_memory(vm_of: StartVm, tmpfs: Path) -> None:
    """Delete a file that only an unreceived message contains, so that no process shows it."""
    vm = vm_of(*ram(tmpfs, 64))
    fd = os.open(tmpfs / "hidden", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 180 * MIB)
    (tmpfs / "hidden").unlink()
    sender, receiver = socket.socketpair()
    with sender, receiver:
        socket.send_fds(sender, [b"x"], [fd])
        os.close(fd)
        result = vm.prefault("--populate-only")
        assert result.status == 5 and result.error["code"] == "no-memory"
        assert f"the file system of {tmpfs} may contain 1 file that" in result.error["cause"]
        assert "on the host" in result.error["remedy"] and "--force" in result.error["remedy"]
        assert vm.prefault("--populate-only", "--force", "--dry-run").status == 0
    assert vm.prefault("--populate-only").status == 0


def test_neighbour_of_another_user_is_not_overlooked(vm_of: StartVm, tmpfs: Path) -> None:
    """Run the tool without the capabilities that show other users' processes."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    capabilities = "-sys_ptrace,-sys_admin,-perfmon,-checkpoint_restore,-dac_override"
    without = ["setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities]
    vm = vm_of(*ram(tmpfs, 150), prefix=without)
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    program = f"import mmap, os, sys; fd = int(sys.argv[1]); {drop}; mmap.mmap(fd, 64 << 20); "
    fd = os.open(tmpfs / "neighbour", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 64 * MIB)
    (tmpfs / "neighbour").unlink()
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}print(flush=True); input()", str(fd)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[fd],
    ) as neighbour:
        os.close(fd)
        assert neighbour.stdout is not None and neighbour.stdout.readline()
        tool = [sys.executable, "-m", "qemu_prefault", "--qmp", vm.qemu.qmp, "--populate-only"]
        done = subprocess.run([*without, *tool], capture_output=True, text=True, check=False)
        neighbour.kill()
    assert done.returncode == 5, done.stderr
    assert "1 file that qemu-prefault cannot find" in done.stderr


def test_written_part_of_a_file_needs_no_space(vm_of: StartVm, tmpfs: Path) -> None:
    template = tmpfs / "template"
    template.write_bytes(bytes(119 * MIB))
    os.truncate(template, 120 * MIB)
    vm = vm_of(*ram(template, 120, "share=off"))
    assert vm.prefault("--populate-only").status == 0
    used = os.statvfs(tmpfs)
    assert (used.f_blocks - used.f_bfree) * used.f_frsize <= 121 * MIB


# --- a limit on memory and swap together ---


@contextmanager
def swapped_neighbour() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Yield a cgroup with a limit of 200 MiB, and a process in it that has swapped 60 MiB.

    60 MiB of the cgroup's memory are in use.
    """
    with cgroups("memory") as ((group,), unified):
        both = group / "memory.memsw.limit_in_bytes"
        if unified or not both.exists():
            pytest.skip("this host has no limit on memory and swap together (cgroup v1)")
        limit = group / "memory.limit_in_bytes"
        limit.write_text(str(200 * MIB))
        both.write_text(str(200 * MIB))
        program = "import sys; area = bytearray(b'x') * (120 << 20); print(flush=True); input()"
        with subprocess.Popen(
            [*in_group(group), sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stdout.readline()
            limit.write_text(str(60 * MIB))  # the kernel swaps the rest
            limit.write_text(str(200 * MIB))
            try:
                yield group, process
                assert process.poll() is None and out_of_memory_kills(group) == 0
            finally:
                process.kill()


def test_swap_limit_is_respected(vm_of: StartVm, tmp_path: Path) -> None:
    with swap(tmp_path / "swap", 256), swapped_neighbour() as (group, _):
        vm = vm_of("-m", "100M", prefix=in_group(group))
        result = vm.prefault("--populate-only")
        assert result.status == 5, result.stdout
        assert "memory.memsw.limit_in_bytes" in result.error["cause"]
        vm.qemu.kill()


@needs_kvm
def test_plugin_respects_the_swap_limit(start_qemu: StartQemu, tmp_path: Path) -> None:
    control = tmp_path / "control"
    with swap(tmp_path / "swap", 256), swapped_neighbour() as (group, _):
        qemu = with_plugin(start_qemu, control, "-m", "100M", prefix=in_group(group))
        status = wait_started(qemu, control)
        qemu.kill()
        assert status["populate"] == "resident"
        assert status["counters"]["populated"] < 2 * MIB


# --- huge pages that the kernel takes from the host's memory ---


def available() -> int:
    (line,) = (x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x)
    return int(line.split()[1]) << 10


def test_surplus_huge_pages_use_the_hosts_memory(vm_of: StartVm) -> None:
    if not OVERCOMMIT.exists():
        pytest.skip("this host has no huge pages")
    mib = 2 * available() // MIB // 2 * 2
    backend = f"memory-backend-memfd,id=m,size={mib}M,hugetlb=on,reserve=off"
    vm = vm_of("-m", f"{mib}M", "-object", backend, "-machine", "memory-backend=m")
    before = OVERCOMMIT.read_text()
    OVERCOMMIT.write_text(str(mib))
    try:
        result = vm.prefault("--populate-only", "--populate", "all", "--dry-run")
    finally:
        OVERCOMMIT.write_text(before)
    assert result.status == 5, result.stdout
    assert "hugetlb has only" in result.error["cause"]


# --- NUMA nodes ---

BIND = """
import ctypes, os, sys
nodes = ctypes.c_ulong(1)
if ctypes.CDLL(None).syscall(238, 2, ctypes.byref(nodes), 64):  # set_mempolicy, MPOL_BIND
    sys.exit("set_mempolicy failed")
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("policy", "status"),
    [("", 5), (",policy=bind,host-nodes=0", 5), (",policy=preferred,host-nodes=0", 0)],
)
def test_policy_of_qemus_threads_limits_nodes(
    vm_of: StartVm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    status: int,
) -> None:
    """Bind QEMU to node 0 as ``numactl --membind=0`` does, and simulate a node with 16 MiB."""
    nodes = tmp_path / "node"
    (nodes / "node0").mkdir(parents=True)
    (nodes / "node0/meminfo").write_text("Node 0 MemFree: 16384 kB\n")
    monkeypatch.setattr(memory_source, "NODES", nodes)
    # This host's cpuset contains only node 0.
    monkeypatch.setattr(memory_source, "confining_nodes", lambda process, bound: tuple(bound))
    backend = f"memory-backend-ram,id=m,size=64M{policy}"
    machine = ("-m", "64M", "-object", backend, "-machine", "memory-backend=m")
    result = vm_of(*machine, prefix=[sys.executable, "-c", BIND]).prefault("--populate-only")
    assert result.status == status, result.stdout
    assert status == 0 or "NUMA node 0 has only" in result.error["cause"]


# --- committed memory ---


@pytest.fixture
def little_to_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate vm.overcommit_memory=2 on a host on which 34 MiB may still be committed."""
    (tmp_path / "overcommit").write_text("2\n")
    (tmp_path / "meminfo").write_text("CommitLimit: 100352 kB\nCommitted_AS: 65536 kB\n")
    monkeypatch.setattr(headroom, "OVERCOMMIT", str(tmp_path / "overcommit"))
    monkeypatch.setattr(headroom, "MEMINFO", str(tmp_path / "meminfo"))


@pytest.mark.parametrize(
    ("backend", "status"),
    [
        ("memory-backend-memfd,id=m,size=64M", 5),
        ("memory-backend-memfd,id=m,size=64M,share=off", 5),
        ("memory-backend-file,id=m,size=64M,mem-path=TMPFS,share=on", 5),
        ("memory-backend-ram,id=m,size=64M", 0),
        ("memory-backend-ram,id=m,size=64M,share=on", 0),
    ],
)
@pytest.mark.usefixtures("little_to_commit")
def test_committed_memory_is_limited(
    vm_of: StartVm, tmpfs: Path, backend: str, status: int
) -> None:
    """Check that only memory that is not committed yet is held against the limit."""
    memory = backend.replace("TMPFS", str(tmpfs))
    vm = vm_of("-m", "64M", "-object", memory, "-machine", "memory-backend=m")
    result = vm.prefault("--populate-only")
    assert result.status == status, result.stdout
    assert status == 0 or "limit on committed memory" in result.error["cause"]


# --- servers that do not respond ---


def test_hung_mount_in_a_tmpfs_does_not_block(vm_of: StartVm, tmpfs: Path) -> None:
    vm = vm_of(*ram(tmpfs / "ram", 64))
    with fuse(tmpfs / "mount", MIB) as hang:
        hang()
        assert vm.prefault("--populate-only").status == 0


def test_hung_file_mount_in_a_tmpfs_does_not_block(
    vm_of: StartVm, tmpfs: Path, tmp_path: Path
) -> None:
    vm = vm_of(*ram(tmpfs / "ram", 64))
    with fuse(tmp_path / "mount", MIB) as hang:
        file = tmpfs / "file"
        file.write_bytes(b"")
        subprocess.run(["mount", "--bind", tmp_path / "mount" / NAME, file], check=True)
        try:
            hang()
            assert vm.prefault("--populate-only").status == 0
        finally:
            subprocess.run(["umount", "--lazy", file], check=True)


@needs_kvm
def test_hung_mount_does_not_freeze_the_guest(
    start_qemu: StartQemu, tmpfs: Path, tmp_path: Path
) -> None:
    control = tmp_path / "control"
    with fuse(tmpfs / "mount", MIB) as hang:
        hang()
        qemu = with_plugin(start_qemu, control, *ram(tmpfs / "ram", 64))
        assert wait_started(qemu, control)["counters"]["populated"] > 60 * MIB


def test_ram_on_a_hung_server_does_not_block(vm_of: StartVm, tmp_path: Path) -> None:
    with fuse(tmp_path / "mount", 64 * MIB) as hang:
        vm = vm_of(*ram(tmp_path / "mount" / NAME, 64))
        hang()
        result = vm.prefault("--populate-only")
        assert result.status == 0 and result.warnings == {"resident-only"}
