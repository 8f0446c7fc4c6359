# SPDX-License-Identifier: GPL-2.0-or-later
"""Compute how much memory can be populated before a limit is reached.

Documentation/admin-guide/cgroup-v1 and Documentation/admin-guide/cgroup-v2.rst describe the file
formats. The plugin has its own implementation in C (native/common/headroom.c).
tests/unit/test_headroom_agreement.py checks both implementations against the same table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from typing import Final

from . import proc_files
from .bounded import list_bounded
from .proc_files import parse_number, read_file, read_limited, read_optional
from .procfs import Process

OVERCOMMIT: Final = "/proc/sys/vm/overcommit_memory"
OVERCOMMIT_NEVER: Final = 2  # include/uapi/linux/mman.h
MEMINFO: Final = "/proc/meminfo"
PATH_MAX: Final = 4096  # include/uapi/linux/limits.h
#: The link of the initial cgroup namespace: PROC_CGROUP_INIT_INO (include/linux/proc_ns.h).
INITIAL_CGROUP_NAMESPACE: Final = "cgroup:[4026531835]"
#: The remedy if a cgroup cannot be read.
REMEDY_HIDDEN: Final = (
    "run qemu-prefault on the host, outside the container, or mount the host's cgroup file system "
    "at /sys/fs/cgroup in the initial cgroup namespace (docker run --cgroupns host -v "
    "/sys/fs/cgroup:/sys/fs/cgroup:ro)"
)


def parse_cgroups(text: str) -> dict[str, str]:
    """Return the cgroup path of each controller, by the name of the controller.

    The key of the v2 hierarchy is ``""``.

    :param text: The text of ``/proc/PID/cgroup``.
    """
    paths = {}
    for line in text.split("\n"):
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and number.isdecimal():
            for controller in controllers.split(","):
                paths[controller] = path
    return paths


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of a file system.

    :ivar root: The directory of the file system that appears at the mount point.
    :ivar point: The mount point.
    :ivar kind: The type of the file system.
    :ivar options: The options of the file system.
    """

    root: str
    point: str
    kind: str
    options: frozenset[str]


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Return the mounts in the text of ``/proc/PID/mountinfo``.

    The function skips lines of an unknown form.
    """
    mounts = []
    for line in text.split("\n"):
        before, dash, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if dash and len(left) >= 6 and len(right) >= 3:
            root, point = (unescape(part) for part in left[3:5])
            mounts.append(Mount(root, point, right[0], frozenset(right[2].split(","))))
    return tuple(mounts)


def unescape(text: str) -> str:
    """Return a path from ``/proc/PID/mountinfo``.

    show_mountinfo() (fs/proc_namespace.c) writes space, tab, newline, backslash and # in octal.
    """
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def parse_key_values(text: str) -> dict[str, int]:
    """Return the values in the text of ``memory.stat`` or ``meminfo``, by key.

    A line has the form ``key 1`` or ``Key: 1 kB``. The function converts values in kB to bytes.
    """
    values = {}
    for line in text.split("\n"):
        words = line.split()
        if len(words) >= 2 and words[1].isascii() and words[1].isdecimal() and len(words[1]) < 20:
            shift = 10 if words[2:3] == ["kB"] else 0
            values[words[0].rstrip(":")] = int(words[1]) << shift
    return values


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit on the memory that can be populated.

    :ivar name: The name of the host, cgroup, pool, node or file system that sets the limit.
    :ivar available: The number of bytes that can be populated before the limit is reached.
    :ivar detail: The values from which ``available`` was computed, for messages.
    :ivar contended: Whether other processes can allocate the same memory at any time.
    :ivar anonymous: Whether the limit counts each byte that is populated.
    :ivar file_bytes: The maximum number of bytes of the mapped file that populating allocates in
        addition, because a page fault in a private mapping allocates the file's page, too.
    :ivar device: The device number of the file system that sets the limit, or None. One file system
        can have several names.
    :ivar unknown: Why the available memory is unknown, or an empty string. ``available`` is then 0.
    """

    name: str
    available: int
    detail: str
    contended: bool = False
    anonymous: bool = True
    file_bytes: int = 0
    device: int | None = None
    unknown: str = ""

    def need(self, size: int) -> int:
        """Return by how much ``available`` decreases at most if ``size`` bytes are populated."""
        return (size if self.anonymous else 0) + min(size, self.file_bytes)

    def fitting(self, available: int, most: int) -> int:
        """Return the number of bytes, at most ``most``, that ``available`` bytes suffice for."""
        if self.need(most) <= available:
            return most
        if not self.anonymous:
            return available
        return max(available // 2, available - self.file_bytes)

    @property
    def key(self) -> str:
        """A key that is equal for two limits on the same memory."""
        return self.name if self.device is None else f"file system {self.device}"

    @property
    def per_batch(self) -> int:
        """The number of bytes that one batch may populate.

        If the limit is contended, this number is 1/16 of ``available``. Otherwise it is
        ``available``.
        """
        return self.available // 16 if self.contended else self.available


def cgroup_directories(
    groups: MappingABC[str, str], mounts: Sequence[Mount], controller: str
) -> list[tuple[str, bool]]:
    """Return the directories of a process's cgroup and its ancestors, in this order.

    :param groups: The result of :func:`parse_cgroups` for the process.
    :param mounts: The result of :func:`parse_mountinfo` for ``/proc/self/mountinfo``.
    :param controller: The name of the controller.
    :returns: Pairs of a directory and a flag. The flag is True if the directory belongs to the v2
        hierarchy. In a cgroup namespace or a container, the mount may show only a part of the tree.
        The result omits the ancestors outside this part, because this process cannot read these
        ancestors.
    """
    unified = controller not in groups
    path = groups.get(controller, groups.get(""))
    if path is None or len(path) >= PATH_MAX:
        return []
    for mount in mounts:
        fits = (
            mount.kind == "cgroup2"
            if unified
            else (mount.kind == "cgroup" and controller in mount.options)
        )
        if not fits:
            continue
        root = mount.root.rstrip("/")
        inside = path[len(root) :] if path == root or path.startswith(root + "/") else None
        if inside is None or "/.." in inside:
            continue
        parts = [part for part in inside.split("/") if part]
        return [
            ("/".join([mount.point.rstrip("/"), *parts[:depth]]), unified)
            for depth in range(len(parts), -1, -1)
        ]
    return []


def directories_of(process: Process, controller: str) -> list[tuple[str, bool]]:
    """Return the result of :func:`cgroup_directories` for a process, in this process's mounts."""
    groups = parse_cgroups(read_optional(f"{process.proc}/cgroup") or "")
    mounts = parse_mountinfo(read_optional(f"{proc_files.PROC}/self/mountinfo") or "")
    return cgroup_directories(groups, mounts, controller)


def hidden_cgroup(process: Process, controller: str) -> str | None:
    """Return the reason why the limits of a process's cgroup cannot be read, or None.

    The plugin applies a similar rule (native/common/headroom.c, ``pf_headroom_sees_group()``). A
    process has no cgroup limit if the kernel lacks the controller, if no hierarchy contains the
    controller, or if the process is in the root cgroup. In a cgroup namespace, the root of the
    namespace is not the root cgroup, but its limits are readable if the hierarchy is mounted.

    :param controller: The name of the controller, for example ``memory``.
    """
    try:
        groups = parse_cgroups(read_limited(f"{process.proc}/cgroup"))
    except (FileNotFoundError, ProcessLookupError):
        groups = {}  # a kernel without cgroups, or the process has exited
    except (OSError, ValueError) as error:
        return f"/proc/{process.pid}/cgroup cannot be read: {error}"
    path = groups.get(controller, groups.get(""))
    in_root = path == "/" and _in_initial_namespace()
    if path is None or in_root or not _has_controller(controller):
        return None
    mounts = parse_mountinfo(read_optional(f"{proc_files.PROC}/self/mountinfo") or "")
    directories = cgroup_directories(groups, mounts, controller)
    if directories:
        return _hidden_directory(directories[0][0])
    where = (
        "outside this process's cgroup namespace"
        if "/.." in path
        else "not mounted in this process's mount namespace"
    )
    return f"QEMU's {controller} cgroup {path} is {where}"


def _hidden_directory(directory: str) -> str | None:
    """Return the reason why the limits in a cgroup's directory cannot be read, or None."""
    try:
        names = list_bounded(directory)
    except OSError as error:
        return f"{directory} cannot be read: {error.strerror}"
    # Another file system can cover the mount of the hierarchy. Every cgroup has this file.
    return None if "cgroup.procs" in names else f"{directory} is not a cgroup"


def _has_controller(controller: str) -> bool:
    """Return whether the kernel has a controller that is not disabled."""
    table = read_optional(f"{proc_files.PROC}/cgroups")
    for line in (table or "").split("\n"):  # proc_cgroupstats_show(), kernel/cgroup/cgroup-v1.c
        words = line.split()
        if len(words) == 4 and words[0] == controller:
            return words[3] != "0"
    # Since Linux 6.14, the table omits memory without CONFIG_MEMCG_V1 (commit af000ce85293). A
    # kernel with CONFIG_MEMCG has /proc/kpagecgroup (fs/proc/page.c).
    return controller == "memory" and os.path.exists(f"{proc_files.PROC}/kpagecgroup")


def _in_initial_namespace() -> bool:
    """Return whether this process is in the initial cgroup namespace."""
    try:
        return os.readlink(f"{proc_files.PROC}/self/ns/cgroup") == INITIAL_CGROUP_NAMESPACE
    except OSError:
        return False


#: The files of a memory cgroup that contain a limit and the usage that the limit applies to.
#: If the usage exceeds memory.high, the kernel throttles the populating thread, but does not invoke
#: the OOM killer (Documentation/admin-guide/cgroup-v2.rst). The memsw files count memory and swap.
#: If the usage reaches their limit, the kernel cannot swap, and invokes the OOM killer.
_V2_LIMITS: Final = (("memory.max", "memory.current"), ("memory.high", "memory.current"))
_V1_LIMITS: Final = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
)


def memory_limit(directory: str, unified: bool) -> Limit | None:
    """Return a memory cgroup's limit, or None if the cgroup has no limit."""
    found: list[tuple[int, str, int, int]] = []
    for name, usage_name in _V2_LIMITS if unified else _V1_LIMITS:
        limit = parse_number(read_optional(f"{directory}/{name}"))
        usage = parse_number(read_optional(f"{directory}/{usage_name}"))
        # cgroup v1 prints LONG_MAX rounded down to a page for "no limit"
        if limit is not None and usage is not None and limit < 1 << 62:
            found.append((limit - usage, name, limit, usage))
    if not found:
        return None
    left, name, limit, usage = min(found)
    stat = parse_key_values(read_optional(f"{directory}/memory.stat") or "")
    reclaimable = stat.get("inactive_file" if unified else "total_inactive_file", 0)
    detail = f"{name} {limit}, {usage} in use, {reclaimable} of it reclaimable"
    return Limit(f"cgroup {directory}", max(0, left + reclaimable), detail, True)


def cgroup_hugetlb_limit(directory: str, unified: bool, page_size: int) -> Limit | None:
    """Return a hugetlb cgroup's limit for one page size, or None if it is unlimited."""
    kib = page_size >> 10
    size = next(f"{kib >> s}{u}" for s, u in ((20, "GB"), (10, "MB"), (0, "KB")) if kib >> s)
    limit_name, usage_name = ("max", "current") if unified else ("limit_in_bytes", "usage_in_bytes")
    limit = parse_number(read_optional(f"{directory}/hugetlb.{size}.{limit_name}"))
    usage = parse_number(read_optional(f"{directory}/hugetlb.{size}.{usage_name}"))
    if limit is None or usage is None or limit >= 1 << 62:
        return None
    detail = f"hugetlb.{size}.{limit_name} {limit}, {usage} in use"
    return Limit(f"cgroup {directory}", max(0, limit - usage), detail)


def memory_headroom(process: Process) -> list[Limit]:
    """Return every limit that applies to memory that QEMU populates.

    The limits are the host's MemAvailable, the limit of QEMU's memory cgroup, and the limits of all
    ancestors of this cgroup. The function counts inactive page cache as available, because the
    kernel can reclaim it.
    """
    limits = []
    meminfo = parse_key_values(read_file(f"{proc_files.PROC}/meminfo", process.pid))
    if "MemAvailable" in meminfo:
        available = meminfo["MemAvailable"]
        limits.append(Limit("host", available, "MemAvailable in /proc/meminfo", True))
    limits += _cgroup_limits(process, "memory", memory_limit)
    return limits


def commit_limit() -> list[Limit]:
    """Return a list that contains the limit on committed memory, if the kernel enforces it.

    The kernel commits private memory when it is mapped. It commits a page of a tmpfs file or a
    memfd when it allocates the page (mm/shmem.c, ``shmem_acct_blocks()``). If the limit is reached,
    the kernel refuses memory to all processes, and a guest that accesses a new page gets SIGBUS.
    """
    if parse_number(read_optional(OVERCOMMIT)) != OVERCOMMIT_NEVER:
        return []
    meminfo = parse_key_values(read_optional(MEMINFO) or "")
    if "CommitLimit" not in meminfo or "Committed_AS" not in meminfo:
        return []
    limit, committed = meminfo["CommitLimit"], meminfo["Committed_AS"]
    detail = f"CommitLimit {limit}, Committed_AS {committed}"
    name = "the limit on committed memory (vm.overcommit_memory=2)"
    return [Limit(name, max(0, limit - committed), detail, True)]


def hugetlb_pool_limit(page_size: int, nodes: Sequence[int] = (), ours: int = 0) -> Limit:
    """Return the limit of the hugetlb pool for one page size.

    The kernel counts reserved pages (resv_hugepages) as free. However, only the mappings that hold
    the reservations can use these pages.

    :param page_size: The size of a huge page in bytes.
    :param nodes: The NUMA nodes from which the pages must come, or an empty sequence for any node.
    :param ours: The number of bytes that the kernel has reserved for the mapping.
    """
    pool = f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB"
    free, reserved, overcommit, surplus = (
        parse_number(read_optional(f"{pool}/{name}_hugepages"))
        for name in ("free", "resv", "nr_overcommit", "surplus")
    )
    if free is None:
        return Limit("hugetlb", 0, f"this kernel has no huge pages of {page_size >> 10} KiB")
    promised = max(0, (reserved or 0) - -(-ours // page_size))
    more = max(0, (overcommit or 0) - (surplus or 0))
    # The kernel allocates a page by overcommit from the host's memory (mm/hugetlb.c,
    # alloc_surplus_hugetlb_folio()).
    meminfo = parse_key_values(read_optional(f"{proc_files.PROC}/meminfo") or "")
    if "MemAvailable" in meminfo:
        more = min(more, meminfo["MemAvailable"] // page_size)
    if nodes:
        here = "/sys/devices/system/node/node{}/hugepages/" + os.path.basename(pool)
        on_nodes = [
            parse_number(read_optional(f"{here.format(node)}/free_hugepages")) or 0
            for node in nodes
        ]
        names = ",".join(map(str, nodes))
        usable = min(sum(on_nodes), max(0, free - promised))
        detail = (
            f"{sum(on_nodes)} free on these nodes; {free} free in total, {promised} of them "
            "reserved for others"
        )
        return Limit(f"hugetlb on NUMA node {names}", usable * page_size, detail)
    detail = f"{free} free, {promised} of them reserved for others, {more} by overcommit in {pool}"
    return Limit("hugetlb", max(0, free - promised + more) * page_size, detail)


def hugetlb_cgroup_limits(process: Process, page_size: int) -> list[Limit]:
    """Return the limits of the process's hugetlb cgroups, the innermost first.

    :param page_size: The size of a huge page in bytes.
    """

    def hugetlb_limit(directory: str, unified: bool) -> Limit | None:
        return cgroup_hugetlb_limit(directory, unified, page_size)

    return _cgroup_limits(process, "hugetlb", hugetlb_limit)


def _cgroup_limits(
    process: Process, controller: str, read: Callable[[str, bool], Limit | None]
) -> list[Limit]:
    hidden = hidden_cgroup(process, controller)
    if hidden is not None:
        name = f"QEMU's {controller} cgroup"
        why = f"the limit of {name} cannot be read: {hidden}"
        return [Limit(name, 0, hidden, unknown=why)]
    limits = []
    for directory, unified in directories_of(process, controller):
        limit = read(directory, unified)
        if limit is not None:
            limits.append(limit)
    return limits
