# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the source of a mapping's memory, and compute the available memory.

The source of every mapping is the host's memory. The following sources limit some mappings to a
part of the host's memory:

* the file system, if the mapping is a shared file
* the hugetlb pool, if the mapping uses huge pages
* NUMA nodes, if the mapping's policy or the process's cpuset allows only these nodes

Other processes use the same sources. The functions subtract the memory that other processes can
still allocate without further checks. This memory consists of the unwritten parts of the other
processes' files, and of the huge pages that are reserved for their mappings.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..units import PAGE_SIZE
from .bounded import limit_of, list_bounded, read_bounded
from .headroom import (
    Limit,
    commit_limit,
    hugetlb_cgroup_limits,
    hugetlb_pool_limit,
    memory_headroom,
    parse_key_values,
)
from .mappings import MemoryMapping
from .proc_files import lines_of, parse_number, parse_number_list, read_optional
from .procfs import Process
from .unwritten import FileId, unwritten_bytes

NODES: Final = Path("/sys/devices/system/node")
MIN_FREE: Final = Path("/proc/sys/vm/min_free_kbytes")
#: CONFIG_NODES_SHIFT is 10 at most.
MAX_NODES: Final = 1024
#: File systems whose files exist only in memory, in pages of the base size.
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class MemorySource:
    """The source of one mapping's memory.

    :ivar process: The process that contains the mapping.
    :ivar mapping: The mapping.
    :ivar page_size: The page size of the backing, in bytes.
    :ivar nodes: The NUMA nodes to which the mapping's policy binds the memory, or an empty tuple if
        the policy does not bind it.
    :ivar reserved: Whether the kernel has reserved the huge pages that the mapping has not
        allocated yet.
    """

    process: Process
    mapping: MemoryMapping
    page_size: int = PAGE_SIZE
    nodes: tuple[int, ...] = ()
    reserved: bool = True

    @property
    def file(self) -> FileId:
        """The mapped file, whose inode is 0 for anonymous memory."""
        return self.mapping.device, self.mapping.inode

    def limits(self, absent: int, together: AbstractSet[FileId] = frozenset()) -> list[Limit]:
        """Return every limit that applies to populating the mapping.

        :param absent: The number of bytes of the mapping that are not allocated yet.
        :param together: Other files that the caller populates. The limits do not subtract the
            memory for these files, because the caller already counts this memory.
        :raises GoneError: If the process has exited.
        """
        nodes = confining_nodes(self.process, self.nodes)
        if self.page_size > PAGE_SIZE:
            limits = hugetlb_cgroup_limits(self.process, self.page_size)
            if nodes or not self.reserved:
                ours = self._reserved_bytes(absent) if self.reserved else 0
                limits.append(hugetlb_pool_limit(self.page_size, nodes, ours))
            # The kernel guarantees a reserved page, but not its node. The pool, and a file system
            # with a size, count the page as used (Documentation/mm/hugetlbfs_reserv.rst).
            if self.reserved:
                return limits
        else:
            limits = memory_headroom(self.process)
            if nodes:
                limits.append(node_limit(nodes))
            copied = is_copied(self.process, self.mapping)
            if copied:
                limits = [replace(limit, cost=2) for limit in limits]
            if copied or is_in_memory(self.process, self.mapping):
                limits += commit_limit()
        limits += file_system_limit(self.process, self.mapping, together)
        return limits

    def _reserved_bytes(self, absent: int) -> int:
        """Return the number of bytes of huge pages that are reserved for the mapping.

        The result is at least ``absent``. If the process has huge pages in several mappings, the
        result is a lower bound.
        """
        status = read_optional(f"{self.process.proc}/status") or ""
        resident = re.search(r"^HugetlbPages:\s*([0-9]{1,18}) kB$", status, re.MULTILINE)
        allocated = int(resident[1]) << 10 if resident else 0
        return max(absent, self.mapping.size - allocated)


# --- NUMA nodes ---


def parse_node_list(text: str) -> tuple[int, ...]:
    """Return the numbers in a list in the kernel's format, such as ``0-2,5``.

    The result is empty if the text has another format.
    """
    return parse_number_list(text, MAX_NODES)


def confining_nodes(process: Process, bound: Sequence[int]) -> tuple[int, ...]:
    """Return the NUMA nodes from which the memory of a mapping must come.

    The result is empty if the memory may come from any node of the host.

    :param bound: The nodes that the mapping's policy allows, or an empty sequence if the policy
        allows all nodes.
    """
    with_memory = set(parse_node_list(read_optional(f"{NODES}/has_memory") or ""))
    by_policy = with_memory & set(bound or with_memory)
    status = read_optional(f"{process.proc}/status") or ""
    cpuset = re.search(r"^Mems_allowed_list:\s*(\S+)$", status, re.MULTILINE)
    by_cpuset = with_memory & set(parse_node_list(cpuset[1])) if cpuset else with_memory
    # If the policy and the cpuset have no node in common, the cpuset decides (mm/mempolicy.c,
    # mpol_rebind_nodemask()).
    allowed = by_policy & by_cpuset or by_cpuset or by_policy
    return () if allowed == with_memory else tuple(sorted(allowed))


def node_limit(nodes: Sequence[int]) -> Limit:
    """Return the memory that is available on NUMA nodes.

    Free memory and inactive page cache are available, except ``vm.min_free_kbytes``. The kernel
    distributes ``vm.min_free_kbytes`` over the nodes (mm/page_alloc.c,
    ``__setup_per_zone_wmarks()``). If an allocation that is bound to a node reaches the node's part
    of these bytes, the kernel runs the OOM killer.
    """
    kept = parse_number(read_optional(f"{MIN_FREE}")) or 0
    available = -(kept << 10)
    for node in nodes:
        text = read_optional(f"{NODES}/node{node}/meminfo") or ""
        values = parse_key_values(re.sub(r"^Node [0-9]+ ", "", text, flags=re.MULTILINE))
        available += values.get("MemFree", 0) + values.get("Inactive(file)", 0)
    names = ",".join(map(str, nodes))
    detail = (
        "MemFree and Inactive(file) in node meminfo, without vm.min_free_kbytes; the policy or "
        "cpuset allows no other node"
    )
    return Limit(f"NUMA node {names}", max(0, available), detail, True)


def parse_numa_maps(text: str, start: int) -> tuple[tuple[int, ...], int]:
    """Return the NUMA nodes and the page size of a mapping.

    :param text: The text of ``/proc/PID/numa_maps`` (mm/mempolicy.c, ``mpol_to_str()``).
    :param start: The start address of the mapping.
    :returns: The nodes, and the page size in bytes. The set of nodes is empty unless the policy is
        ``bind``.
    """
    for line in lines_of(text):
        words = line.split(" ", 2)
        if words[0] != f"{start:08x}" and words[0] != f"{start:x}":
            continue
        policy = words[1] if len(words) > 1 else ""
        nodes = parse_node_list(policy.partition(":")[2]) if policy.startswith("bind") else ()
        rest = words[-1].split(" ")
        size = next((w for w in rest if w.startswith("kernelpagesize_kB=")), "")
        kib = parse_number(size.partition("=")[2])
        return nodes, (kib << 10 if kib else PAGE_SIZE)
    return (), PAGE_SIZE


def task_nodes(process: Process) -> tuple[int, ...]:
    """Return the NUMA nodes to which the policy of QEMU's main thread binds memory.

    The policy is from ``numactl --membind`` or set_mempolicy(2). It applies to mappings without a
    policy of their own, such as the first one, which is QEMU's program.
    """
    try:
        with open(f"{process.proc}/numa_maps", "rb", buffering=0) as file:
            # The kernel produces only as many lines as one read returns.
            line = file.read(PAGE_SIZE).split(b"\n", 1)[0].decode("utf-8", "surrogateescape")
    except OSError:
        return ()
    start = line.partition(" ")[0]
    if not re.fullmatch("[0-9a-f]{1,16}", start):
        return ()
    return parse_numa_maps(line, int(start, 16))[0]


def source_of(process: Process, mapping: MemoryMapping) -> MemorySource:
    """Return the source of a mapping from the files in /proc, without a monitor.

    Do not call this function in a loop, because the kernel walks QEMU's page tables to produce
    ``/proc/PID/numa_maps``.
    """
    path = f"{process.proc}/numa_maps"
    line = None
    with contextlib.suppress(OSError):
        text = read_bounded(path, limit_of(path))
        line = re.search(rb"^0*%x .*$" % mapping.start, text, re.MULTILINE)
    shown = "" if line is None else line[0].decode("utf-8", "surrogateescape")
    nodes, page_size = parse_numa_maps(shown, mapping.start)
    return MemorySource(process, mapping, page_size, nodes)


# --- file systems ---


def is_disk_file(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether a mapping is a shared file on a disk.

    Files on tmpfs, ramfs, devtmpfs and hugetlbfs are not on a disk.
    """
    if not mapping.shared or mapping.inode == 0 or _is_internal(mapping):
        return False
    kind = _file_system(process, mapping)
    if kind is not None:
        return kind not in IN_MEMORY | {"hugetlbfs"}
    return mapping.path.startswith("/") and not mapping.path.startswith("/dev/")


def is_on_fuse(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether a file on FUSE is mapped. The server may never respond to a system call."""
    kind = _file_system(process, mapping) if mapping.inode else None
    return kind is not None and kind.startswith(("fuse", "virtiofs"))


def is_in_memory(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether a mapping is a shared file that exists only in memory, such as a memfd."""
    if not mapping.shared or mapping.inode == 0:
        return False
    if _is_internal(mapping):
        return mapping.path.startswith("/memfd:")
    return _file_system(process, mapping) in IN_MEMORY


def is_copied(process: Process, mapping: MemoryMapping) -> bool:
    """Return whether populating allocates both a file's page and a private copy.

    This happens in a private mapping of a file that exists only in memory and has holes. The page
    fault first allocates the file's page (mm/shmem.c, ``shmem_fault()``).
    """
    if mapping.shared or mapping.inode == 0:
        return False
    if not mapping.path.startswith("/memfd:") and (
        _is_internal(mapping) or _file_system(process, mapping) not in IN_MEMORY
    ):
        return False
    path = _reach(process, mapping)
    try:
        status = os.stat(path) if path else None
    except OSError:
        status = None
    return status is None or status.st_blocks * 512 < status.st_size


def _file_system(process: Process, mapping: MemoryMapping) -> str | None:
    """Return a mapped file's file system type, or None if it is not mounted."""
    major, minor = mapping.device
    mounts = read_optional(f"{process.proc}/mountinfo") or ""
    for line in lines_of(mounts):
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if dash and len(fields) > 2 and fields[2] == f"{major}:{minor}":
            return after.split(" ")[0]
    return None


def _is_internal(mapping: MemoryMapping) -> bool:
    """Return whether the mapped file is on a kernel-internal mount.

    For example, memfds are on such a mount.
    """
    return mapping.path.startswith(("/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage"))


def file_system_limit(
    process: Process, mapping: MemoryMapping, together: AbstractSet[FileId] = frozenset()
) -> list[Limit]:
    """Return a list that contains the limit of a mapped file's file system.

    The list is empty if populating allocates no pages of the file, or if the file system has no
    size limit. It is also empty if this process cannot access the file. A memfd and shared
    anonymous memory are on a kernel-internal mount, which has no size limit.

    :param together: Other files that the caller populates. The limit does not subtract the
        unwritten parts of these files.
    """
    if mapping.inode == 0 or _is_internal(mapping) or is_on_fuse(process, mapping):
        return []
    # The size of a hugetlbfs also limits private mappings (mm/hugetlb.c, subpools).
    kind = _file_system(process, mapping)
    allocates_file = mapping.shared or kind == "hugetlbfs"
    if not allocates_file and not is_copied(process, mapping):
        return []
    path = _reach(process, mapping)
    if path is None:
        return []
    try:
        figures = os.statvfs(path)
    except OSError:
        return []
    # Without size=, hugetlbfs reports -1 blocks if it has min_size=, and otherwise 0.
    if figures.f_blocks <= 0:
        return []
    free = figures.f_bavail * figures.f_frsize
    ours = {(mapping.device, mapping.inode), *together}
    in_memory = kind in IN_MEMORY | {"hugetlbfs"}
    promised = unwritten_bytes(process, mapping.device, ours, in_memory=in_memory)
    place = os.path.dirname(mapping.path.removesuffix(" (deleted)")) or "/"
    detail = f"{free} bytes are free, of which {promised} are committed to other files"
    left = max(0, free - promised)
    return [Limit(f"the file system of {place}", left, detail, device=os.makedev(*mapping.device))]


def _reach(process: Process, mapping: MemoryMapping) -> str | None:
    """Return a path at which this process can access the mapped file, or None."""
    wanted = (mapping.inode, os.makedev(*mapping.device))
    path = f"{process.proc}/map_files/{mapping.start:x}-{mapping.end:x}"
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == mapping.inode:
            return path
    # map_files needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (proc_map_files_get_link(),
    # fs/proc/base.c). The path in maps may name another file by now. QEMU keeps the file open, so
    # search QEMU's descriptors.
    with contextlib.suppress(OSError):
        for number in list_bounded(f"{process.proc}/fd"):
            path = f"{process.proc}/fd/{number}"
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if (status.st_ino, status.st_dev) == wanted:
                    return path
    return None
