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
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..units import PAGE_SIZE
from .bounded import limit_of, read_bounded
from .headroom import (
    Limit,
    commit_limit,
    hugetlb_cgroup_limits,
    hugetlb_pool_limit,
    memory_headroom,
    parse_key_values,
)
from .mapped_file import copied_bytes, file_system_limit, is_in_memory
from .mappings import MemoryMapping
from .proc_files import lines_of, parse_number, parse_number_list, read_optional
from .procfs import Process
from .unwritten import FileId

NODES: Final = Path("/sys/devices/system/node")
MIN_FREE: Final = Path("/proc/sys/vm/min_free_kbytes")
#: CONFIG_NODES_SHIFT is 10 at most.
MAX_NODES: Final = 1024


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
            copied = copied_bytes(self.process, self.mapping)
            if copied:
                limits = [replace(limit, file_bytes=copied) for limit in limits]
                limits += [
                    replace(limit, anonymous=False, file_bytes=copied) for limit in commit_limit()
                ]
            elif is_in_memory(self.process, self.mapping):
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
