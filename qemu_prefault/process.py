# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU as the kernel sees it: which process it is, its KVM descriptors, its memory, its limits.

The monitor says what the guest is; ``/proc`` says who does it. The two must agree before
anything is injected anywhere: SO_PEERCRED names the process that listens on the QMP socket,
``query-cpus-fast`` names the vCPU threads, and :func:`identify` insists that the one owns the
others. A proxy in between fails that, and so does a server that lies.

Parsers are pure functions of text (``parse_*``); :class:`Process` only reads files and hands
them over. A process can vanish between any two reads; that is the error ``qemu-gone``, never a
traceback. Its pid can also be used again, so a :class:`Process` remembers the start time and
checks it with :meth:`Process.check`.

Field and file formats are those of proc(5), and Documentation/admin-guide/cgroup-v{1,2}.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from typing import Final, Literal

from .errors import FailedError, RefusedError, UnsupportedError

Backing = Literal["anonymous", "memfd", "shmem", "hugetlb", "file", "device"]

CAP_SYS_PTRACE: Final = 19  # include/uapi/linux/capability.h
PROC: Final = "/proc"
#: Of a process whose threads come and go all the time.
MOST_LISTINGS: Final = 16


class GoneError(FailedError):
    """QEMU's process (or one of its threads) does not exist any more."""

    code = "qemu-gone"


# --- reading ---


def _gone(pid: int) -> GoneError:
    return GoneError(f"process {pid} is gone", "see whether QEMU has exited, and why")


def _denied(path: str) -> UnsupportedError:
    return UnsupportedError(
        f"no permission to read {path}",
        "run as root, or as the user QEMU runs as with CAP_SYS_PTRACE",
        code="proc-permission",
    )


def _read(path: str, pid: int) -> str:
    """Return a file of /proc/PID.

    :raises GoneError: if the process has vanished.
    :raises UnsupportedError: if it may not be read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _gone(pid) from error
    except PermissionError as error:
        raise _denied(path) from error
    except OSError as error:
        raise FailedError(
            f"cannot read {path}: {error.strerror}", "see whether /proc is mounted", code="proc"
        ) from error


def _read_optional(path: str) -> str | None:
    """Return a file's text; None if it does not exist, or says nothing to us."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None


def _malformed(what: str, text: str) -> FailedError:
    return FailedError(
        f"{what} has an unknown form: {text[:120]!r}",
        "report this with the kernel's version (uname -r)",
        code="proc",
    )


# --- /proc/PID/status, stat, maps, cgroup ---


@dataclass(frozen=True, slots=True)
class Status:
    """What matters of ``/proc/PID/status``. Signal sets have bit N-1 for signal N.

    `ns_pids` are the process's ids from this pid namespace inwards; the last is what the
    process calls itself. `thread_features` lists e.g. ``shstk`` (CET shadow stack).
    """

    name: str
    tgid: int
    tracer_pid: int
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    ns_pids: tuple[int, ...]
    sig_blocked: int
    sig_ignored: int
    sig_caught: int
    cap_effective: int
    cap_permitted: int
    seccomp: int
    thread_features: frozenset[str]
    rss: int

    def has_capability(self, number: int) -> bool:
        """Whether the effective set holds capability `number`."""
        return bool(self.cap_effective >> number & 1)


def parse_status(text: str) -> Status:
    """Parse ``/proc/PID/status``.

    :raises FailedError: if it does not look like one.
    """
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key, value.strip())
    try:
        tgid = int(fields["Tgid"])
        uids, gids = (tuple(map(int, fields[key].split())) for key in ("Uid", "Gid"))
        if len(uids) != 4 or len(gids) != 4:
            raise _malformed("/proc/PID/status", text)
        return Status(
            name=fields["Name"],
            tgid=tgid,
            tracer_pid=int(fields.get("TracerPid", "0")),
            uids=(uids[0], uids[1], uids[2], uids[3]),
            gids=(gids[0], gids[1], gids[2], gids[3]),
            ns_pids=tuple(map(int, fields.get("NSpid", fields.get("Pid", str(tgid))).split())),
            sig_blocked=int(fields["SigBlk"], 16),
            sig_ignored=int(fields["SigIgn"], 16),
            sig_caught=int(fields["SigCgt"], 16),
            cap_effective=int(fields["CapEff"], 16),
            cap_permitted=int(fields["CapPrm"], 16),
            seccomp=int(fields.get("Seccomp", "0")),
            thread_features=frozenset(fields.get("x86_Thread_features", "").split()),
            rss=int(fields.get("VmRSS", "0 kB").split()[0]) << 10,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise _malformed("/proc/PID/status", text) from error


def parse_start_time(text: str) -> int:
    """Return the start time of ``/proc/PID/stat``: clock ticks since boot, field 22.

    :raises FailedError: if it does not look like one.
    """
    # the command name is in parentheses and may hold any character, ')' and '\n' too
    fields = text[text.rfind(")") + 1 :].split()
    try:
        return int(fields[19])
    except (IndexError, ValueError) as error:
        raise _malformed("/proc/PID/stat", text) from error


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of ``/proc/PID/maps``: ``start..end-1``, backed by `path` from `offset` on."""

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes reach the file (MAP_SHARED)."""
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        """Whether the process may write to it."""
        return self.perms[1] == "w"


_MAPPING: Final = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16}) "
    r"([0-9a-f]{2,8}):([0-9a-f]{2,8}) ([0-9]{1,20}) *(.*)",
    re.DOTALL,
)


def parse_maps(text: str) -> tuple[Mapping, ...]:
    """Parse ``/proc/PID/maps``.

    :raises FailedError: at a line of another form.
    """
    return tuple(_parse_mapping(line) for line in text.split("\n") if line)


def _parse_mapping(line: str) -> Mapping:
    match = _MAPPING.fullmatch(line)
    if match is None:
        raise _malformed("a line of /proc/PID/maps", line)
    start, end = int(match[1], 16), int(match[2], 16)
    if end <= start:
        raise _malformed("a line of /proc/PID/maps", line)
    return Mapping(
        start=start,
        end=end,
        perms=match[3],
        offset=int(match[4], 16),
        device=(int(match[5], 16), int(match[6], 16)),
        inode=int(match[7]),
        path=match[8],
    )


def backing_of(mapping: Mapping, page_size: int = 4096) -> Backing:
    """Tell what a mapping is made of; whether it is private or shared is ``mapping.shared``.

    :param page_size: page size of the backing as the monitor tells it
        (:attr:`~qemu_prefault.layout.Section.page_size`): the path does not show that a memfd
        or a file is of huge pages.
    """
    path = mapping.path.removesuffix(" (deleted)")
    # An anonymous MAP_HUGETLB mapping is a file of this name too (fs/hugetlbfs/inode.c).
    if page_size > 4096 or path.startswith(("/anon_hugepage", "/dev/hugepages/")):
        return "hugetlb"
    if mapping.inode == 0:
        return "anonymous"
    if path.startswith("/memfd:"):
        return "memfd"
    if path.startswith(("/dev/shm/", "/dev/zero", "/SYSV")):
        return "shmem"
    if path.startswith("/dev/"):
        return "device"
    return "file"


def mappings_of(maps: Sequence[Mapping], start: int, size: int) -> tuple[Mapping, ...]:
    """Return the mappings that together cover ``start..start+size-1`` without a gap.

    :raises FailedError: if some byte of it is not mapped (code ``unmapped``): then the monitor
        and the process disagree.
    """
    found = tuple(m for m in maps if m.start < start + size and m.end > start)
    reached = start
    for mapping in found:
        if mapping.start > reached:
            break
        reached = mapping.end
    if reached < start + size:
        raise FailedError(
            f"QEMU has nothing mapped at {reached:#x}, where guest RAM should be",
            "the memory layout may have changed meanwhile: try again",
            code="unmapped",
        )
    return found


def parse_cgroups(text: str) -> dict[str, str]:
    """Return path by controller of ``/proc/PID/cgroup``; the key of the v2 hierarchy is ``""``."""
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
    """One mounted file system: what part of it (`root`) is seen where (`point`)."""

    root: str
    point: str
    kind: str
    options: frozenset[str]


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Parse ``/proc/PID/mountinfo``, leaving out what is not understood."""
    mounts = []
    for line in text.split("\n"):
        before, dash, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if dash and len(left) >= 6 and len(right) >= 3:
            root, point = (_unescape(part) for part in left[3:5])
            mounts.append(Mount(root, point, right[0], frozenset(right[2].split(","))))
    return tuple(mounts)


def _unescape(text: str) -> str:
    # show_mountinfo() writes space, tab, newline, backslash and # in octal
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def parse_key_values(text: str) -> dict[str, int]:
    """Return the numbers of ``memory.stat`` (``key 1``) or ``meminfo`` (``Key: 1 kB``): bytes."""
    values = {}
    for line in text.split("\n"):
        words = line.split()
        if len(words) >= 2 and words[1].isascii() and words[1].isdecimal() and len(words[1]) < 20:
            shift = 10 if words[2:3] == ["kB"] else 0
            values[words[0].rstrip(":")] = int(words[1]) << shift
    return values


# --- descriptors ---


@dataclass(frozen=True, slots=True)
class KvmFds:
    """Numbers, in QEMU, of its KVM descriptors.

    `vcpus` and `vcpu_stats` (KVM_GET_STATS_FD; QEMU keeps them open since 8.1) are keyed by
    KVM's vcpu id, the APIC id.
    """

    vm: int | None = None
    kvm: int | None = None
    vcpus: MappingABC[int, int] = field(default_factory=dict)
    vcpu_stats: MappingABC[int, int] = field(default_factory=dict)


_VCPU_LINK: Final = re.compile(r"anon_inode:kvm-vcpu(-stats)?:([0-9]{1,9})")


def parse_kvm_fds(links: Iterable[tuple[int, str]]) -> KvmFds:
    """Pick KVM's descriptors from (number, link target) pairs (virt/kvm/kvm_main.c).

    :raises UnsupportedError: if there are two VMs in the process: then vCPU 0 may be either's.
    """
    vm = kvm = None
    vcpus: dict[int, int] = {}
    vcpu_stats: dict[int, int] = {}
    for number, target in sorted(links):
        match = _VCPU_LINK.fullmatch(target)
        if match is not None:
            (vcpu_stats if match[1] else vcpus).setdefault(int(match[2]), number)
        elif target == "anon_inode:kvm-vm":
            if vm is not None:
                raise UnsupportedError(
                    "the process runs more than one KVM guest",
                    "only a QEMU with one guest can be prefaulted from outside",
                )
            vm = number
        elif target == "/dev/kvm" and kvm is None:
            kvm = number
    return KvmFds(vm, kvm, vcpus, vcpu_stats)


# --- the process ---


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes may still be populated before `name` (host, cgroup, …) runs out."""

    name: str
    available: int
    detail: str


def thread_names(pid: int) -> dict[int, str]:
    """Return a process's threads, as ``/proc/PID/task/TID/comm`` names them; none if it is gone."""
    names = {}
    with contextlib.suppress(OSError):
        for tid in _whole_list(lambda: os.listdir(f"{PROC}/{pid}/task")):
            with contextlib.suppress(OSError), open(f"{PROC}/{pid}/task/{tid}/comm") as comm:
                names[int(tid)] = comm.read().rstrip("\n")
    return names


def _whole_list(list_tasks: Callable[[], list[str]]) -> list[str]:
    """List threads until a list comes twice.

    Once is not enough: when a thread ends under the kernel's hand, one behind it is left out,
    for it goes on by count (next_tid() and first_tid(), fs/proc/base.c). That which ended was
    listed itself, so a list that comes twice is whole.
    """
    before: list[str] = []
    for _ in range(MOST_LISTINGS):
        names = list_tasks()
        if names == before:
            break
        before = names
    return before


@dataclass(frozen=True, slots=True)
class Process:
    """A process, pinned by pid and start time. Make one by :meth:`find` or :func:`identify`."""

    pid: int
    start_time: int

    @classmethod
    def find(cls, pid: int) -> Process:
        """Return the process with this id.

        :raises GoneError: if there is none.
        """
        return cls(pid, parse_start_time(_read(f"{PROC}/{pid}/stat", pid)))

    def check(self) -> None:
        """Make sure that the pid still means the same, living process.

        :raises GoneError: if it has exited (a zombie counts as gone) or the pid is used again.
        """
        text = _read(f"{PROC}/{self.pid}/stat", self.pid)
        state = text[text.rfind(")") + 1 :].split()[:1]
        if parse_start_time(text) != self.start_time or state in (["Z"], ["X"]):
            raise _gone(self.pid)

    @property
    def exe(self) -> str | None:
        """Path of the program as this process sees it; None if that may not be known."""
        return self._link("exe")

    @property
    def name(self) -> str:
        """The command name (at most 15 characters)."""
        return _read(f"{PROC}/{self.pid}/comm", self.pid).rstrip("\n")

    def arguments(self) -> tuple[str, ...]:
        """Return its command line."""
        return tuple(_read(f"{PROC}/{self.pid}/cmdline", self.pid).split("\0")[:-1])

    def threads(self) -> tuple[int, ...]:
        """Return the ids of its threads, ascending."""
        names = _whole_list(lambda: self._list("task"))
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    def status(self, tid: int | None = None) -> Status:
        """Return the status of the process, or of its thread `tid`."""
        task = "" if tid is None else f"/task/{tid}"
        return parse_status(_read(f"{PROC}/{self.pid}{task}/status", self.pid))

    def maps(self) -> tuple[Mapping, ...]:
        """Return its memory map."""
        return parse_maps(_read(f"{PROC}/{self.pid}/maps", self.pid))

    def kvm_fds(self) -> KvmFds:
        """Return the numbers of its KVM descriptors.

        :raises UnsupportedError: if its descriptors may not be listed.
        """
        links = ((int(n), self._link(f"fd/{n}")) for n in self._list("fd") if n.isdecimal())
        return parse_kvm_fds((number, link) for number, link in links if link is not None)

    def take_fd(self, number: int) -> int:
        """Duplicate its descriptor ``number`` into this process (pidfd_getfd(2), Linux 5.6).

        The caller closes it: while it is open, so is what it stands for, even if QEMU ends.

        :raises GoneError: if the process or its descriptor is gone.
        :raises UnsupportedError: if that may not be done; it takes the right to ptrace.
        """
        from ._native import lib  # noqa: PLC0415

        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError as error:
            raise _gone(self.pid) from error
        try:
            self.check()  # from here on the pidfd pins it
            answer = int(lib.take_fd(pidfd, number))
        finally:
            os.close(pidfd)
        if answer >= 0:
            return answer
        if answer == -errno.EPERM:
            cause, remedy = diagnose_ptrace(self)
            raise UnsupportedError(cause, remedy, code="ptrace-denied")
        if answer in (-errno.ESRCH, -errno.EBADF):
            raise GoneError(
                f"descriptor {number} of process {self.pid} is gone", "try again while QEMU runs"
            )
        raise FailedError(
            f"descriptor {number} of process {self.pid} cannot be taken: {os.strerror(-answer)}",
            "pidfd_getfd(2) came with Linux 5.6; a seccomp filter may also forbid it",
            code="pidfd",
        )

    def thread_syscall(self, tid: int) -> str | None:
        """Return ``/proc/PID/task/TID/syscall`` (``202 0x… …`` or ``running``).

        None where it cannot be read: without CAP_SYS_PTRACE, or without
        CONFIG_HAVE_ARCH_TRACEHOOK.
        """
        text = _read_optional(f"{PROC}/{self.pid}/task/{tid}/syscall")
        return None if text is None else text.strip()

    def memory_headroom(self) -> list[Limit]:
        """Return every limit that memory populated by QEMU counts against.

        That is the host's MemAvailable, and each memory cgroup from QEMU's own up to the
        root. What is in use but easily given back (inactive page cache) counts as available.
        """
        limits = []
        meminfo = parse_key_values(_read(f"{PROC}/meminfo", self.pid))
        if "MemAvailable" in meminfo:
            available = meminfo["MemAvailable"]
            limits.append(Limit("host", available, "MemAvailable of /proc/meminfo"))
        limits += self._cgroup_limits("memory", _memory_limit)
        return limits

    def hugetlb_free(self, page_size: int) -> list[Limit]:
        """Return the limits for further huge pages of `page_size` bytes: pool and cgroups.

        Reserved pages (resv_hugepages) are not free for all, but QEMU's own mappings usually
        hold the reservation; so `available` is the free pages, and `detail` names both.
        """
        pool = f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB"
        free, reserved, overcommit = (
            _number(_read_optional(f"{pool}/{name}_hugepages"))
            for name in ("free", "resv", "nr_overcommit")
        )
        if free is None:
            return [Limit("hugetlb", 0, f"this kernel has no huge pages of {page_size >> 10} KiB")]
        in_use = _number(_read_optional(f"{pool}/surplus_hugepages")) or 0
        more = max(0, (overcommit or 0) - in_use)
        detail = f"{free} free, {reserved or 0} of them reserved, {more} by overcommit in {pool}"
        limits = [Limit("hugetlb", (free + more) * page_size, detail)]

        def hugetlb_limit(directory: str, unified: bool) -> Limit | None:
            return _hugetlb_limit(directory, unified, page_size)

        return limits + self._cgroup_limits("hugetlb", hugetlb_limit)

    # --- details ---

    def _link(self, name: str) -> str | None:
        try:
            return os.readlink(f"{PROC}/{self.pid}/{name}")
        except OSError:
            return None

    def _list(self, name: str) -> list[str]:
        path = f"{PROC}/{self.pid}/{name}"
        try:
            return os.listdir(path)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise _gone(self.pid) from error
        except PermissionError as error:
            raise _denied(path) from error

    def _cgroup_limits(
        self, controller: str, read: Callable[[str, bool], Limit | None]
    ) -> list[Limit]:
        groups = parse_cgroups(_read_optional(f"{PROC}/{self.pid}/cgroup") or "")
        mounts = parse_mountinfo(_read_optional(f"{PROC}/self/mountinfo") or "")
        limits = []
        for directory, unified in cgroup_directories(groups, mounts, controller):
            limit = read(directory, unified)
            if limit is not None:
                limits.append(limit)
        return limits


def cgroup_directories(
    groups: MappingABC[str, str], mounts: Sequence[Mount], controller: str
) -> list[tuple[str, bool]]:
    """Return the directories of a process's cgroup and of its ancestors, innermost first.

    :param groups: :func:`parse_cgroups` of the process.
    :param mounts: :func:`parse_mountinfo` of ourselves.
    :returns: (directory, whether it is of the v2 hierarchy). In a cgroup namespace or a
        container the mount may show only a part of the tree; what is outside cannot be read.
    """
    unified = controller not in groups
    path = groups.get(controller, groups.get(""))
    if path is None:
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


def _number(text: str | None) -> int | None:
    """Return a file's only number; None if it has none ("max", or no such file)."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _memory_limit(directory: str, unified: bool) -> Limit | None:
    """Read a memory cgroup's limit; None if it has none."""
    names = ("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",)
    # memory.high does not kill, but it throttles the populating thread to a crawl.
    limits = {name: _number(_read_optional(f"{directory}/{name}")) for name in names}
    bounds = {name: limit for name, limit in limits.items() if limit is not None}
    usage_name = "memory.current" if unified else "memory.usage_in_bytes"
    usage = _number(_read_optional(f"{directory}/{usage_name}"))
    if not bounds or usage is None:
        return None
    name, limit = min(bounds.items(), key=lambda item: item[1])
    if limit >= 1 << 62:  # v1 says "none" by LONG_MAX rounded down to a page
        return None
    stat = parse_key_values(_read_optional(f"{directory}/memory.stat") or "")
    reclaimable = stat.get("inactive_file" if unified else "total_inactive_file", 0)
    detail = f"{name} {limit}, {usage} in use, {reclaimable} of it reclaimable"
    return Limit(f"cgroup {directory}", max(0, limit - usage + reclaimable), detail)


def _hugetlb_limit(directory: str, unified: bool, page_size: int) -> Limit | None:
    """Read a hugetlb cgroup's limit for one page size; None if it has none."""
    kib = page_size >> 10
    size = next(f"{kib >> s}{u}" for s, u in ((20, "GB"), (10, "MB"), (0, "KB")) if kib >> s)
    limit_name, usage_name = ("max", "current") if unified else ("limit_in_bytes", "usage_in_bytes")
    limit = _number(_read_optional(f"{directory}/hugetlb.{size}.{limit_name}"))
    usage = _number(_read_optional(f"{directory}/hugetlb.{size}.{usage_name}"))
    if limit is None or usage is None or limit >= 1 << 62:
        return None
    detail = f"hugetlb.{size}.{limit_name} {limit}, {usage} in use"
    return Limit(f"cgroup {directory}", max(0, limit - usage), detail)


# --- which process is it ---


def identify(peer_pid: int | None, given_pid: int | None, thread_ids: Sequence[int]) -> Process:
    """Return QEMU's process, if monitor, socket and kernel agree on which it is.

    :param peer_pid: who listens on the monitor socket (SO_PEERCRED); None if unknown (TCP).
    :param given_pid: the user's ``--pid``; goes before `peer_pid`, so that a monitor behind a
        proxy can be used by those who know what they do.
    :param thread_ids: the vCPU threads by ``query-cpus-fast``, in QEMU's own pid namespace.
    :raises RefusedError: code ``proxy``: the process does not own these threads.
    :raises UnsupportedError: code ``pid-namespace``: QEMU cannot be seen from here.
    :raises GoneError: if the process vanished.
    """
    pid = peer_pid if given_pid is None else given_pid
    if pid is None:
        pid = _owner(thread_ids[0]) if thread_ids else None
        if pid is None or not _looks_like_qemu(Process.find(pid)):
            raise UnsupportedError(
                "the QMP socket does not tell which process QEMU is",
                "give its process id with --pid; QEMU must be visible in this pid namespace",
                code="pid-namespace",
            )
    if pid == os.getpid():
        raise RefusedError(
            "the QMP server claims to be this very process",
            "use QEMU's own QMP socket, or give QEMU's --pid",
            code="proxy",
        )
    process = Process.find(pid)
    if thread_ids and set(thread_ids) <= thread_map(process).keys():
        return process
    raise _mismatch(process, given_pid is not None, thread_ids)


def thread_map(process: Process) -> dict[int, int]:
    """Return thread id as we see it, by thread id as the process sees it.

    They differ if it lives in a pid namespace of its own (NSpid of ``/proc/PID/status``).
    """
    threads = process.threads()
    if len(process.status().ns_pids) <= 1:
        return {tid: tid for tid in threads}
    found = {}
    for tid in threads:
        try:
            found[process.status(tid).ns_pids[-1]] = tid
        except GoneError:  # a worker thread ended while we looked
            continue
    return found


def _mismatch(process: Process, given: bool, thread_ids: Sequence[int]) -> Exception:
    owners = {owner for owner in map(_owner, thread_ids) if owner is not None}
    who = f"process {process.pid} ({process.name})"
    what = f"--pid names {who}" if given else f"the QMP socket belongs to {who}"
    if not owners and _looks_like_qemu(process):
        return UnsupportedError(
            f"{what}, but its vCPU threads cannot be seen from here",
            "run qemu-prefault in the pid namespace of the host",
            code="pid-namespace",
        )
    others = ", ".join(f"{owner} ({_name(owner)})" for owner in sorted(owners - {process.pid}))
    whose = f"which belong to process {others}" if others else "which are not its own"
    return RefusedError(
        f"{what}, but the monitor behind it speaks of other vCPU threads, {whose}",
        "a proxy seems to stand between: use QEMU's own QMP socket, or give QEMU's --pid",
        code="proxy",
    )


def _owner(tid: int) -> int | None:
    text = _read_optional(f"{PROC}/{tid}/status")
    return None if text is None else parse_status(text).tgid


def _name(pid: int) -> str:
    return (_read_optional(f"{PROC}/{pid}/comm") or "?").rstrip("\n")


def _looks_like_qemu(process: Process) -> bool:
    program = os.path.basename(process.exe or "")
    return "qemu" in process.name or "qemu" in program or "kvm" in process.name


# --- why ptrace was refused ---


@dataclass(frozen=True, slots=True)
class PtraceFacts:
    """What decides whether one process may trace another (``__ptrace_may_access()``)."""

    pid: int
    own_uid: int
    own_gid: int
    own_capability: bool
    own_seccomp: bool
    own_initial_user_ns: bool
    same_user_ns: bool | None
    tracer: tuple[int, str] | None
    target_uids: tuple[int, int, int, int]
    target_gids: tuple[int, int, int, int]
    target_ns_depth: int
    target_dumpable: bool
    yama_scope: int | None
    own_label: str | None
    target_label: str | None


def diagnose_ptrace(process: Process) -> tuple[str, str]:
    """Explain why PTRACE_SEIZE of the process gave EPERM: (cause, remedy with the command).

    :raises GoneError: if the reason is that it no longer exists.
    """
    own = parse_status(_read(f"{PROC}/self/status", os.getpid()))
    target = process.status()
    # Any thread may be the traced one.
    tracers = [process.status(tid).tracer_pid for tid in process.threads()]
    tracer = next((pid for pid in tracers if pid), 0)
    own_ns = _ns_of("self")
    target_ns = _ns_of(str(process.pid))
    facts = PtraceFacts(
        pid=process.pid,
        own_uid=own.uids[0],
        own_gid=own.gids[0],
        own_capability=own.has_capability(CAP_SYS_PTRACE),
        own_seccomp=own.seccomp == 2,
        own_initial_user_ns=_identity_map(_read_optional(f"{PROC}/self/uid_map")),
        same_user_ns=None if target_ns is None or own_ns is None else own_ns == target_ns,
        tracer=(tracer, _name(tracer)) if tracer else None,
        target_uids=target.uids,
        target_gids=target.gids,
        target_ns_depth=len(target.ns_pids),
        target_dumpable=_dumpable(process, target),
        yama_scope=_number(_read_optional(f"{PROC}/sys/kernel/yama/ptrace_scope")),
        own_label=_label("self"),
        target_label=_label(str(process.pid)),
    )
    return explain_ptrace(facts)


def explain_ptrace(facts: PtraceFacts) -> tuple[str, str]:
    """Find the first rule that forbids tracing, in the order in which the kernel asks."""
    who = f"QEMU (pid {facts.pid})"
    as_root = "run as root: sudo qemu-prefault …"
    if facts.tracer is not None:
        pid, name = facts.tracer
        return (
            f"{who} is already traced by process {pid} ({name}); there can be one tracer only",
            f"end or detach that tracer: kill {pid}",
        )
    if facts.yama_scope == 3:
        return (
            "kernel.yama.ptrace_scope is 3: nobody may trace, until the next boot",
            "use the plugin agent (qemu-prefault run), or boot with "
            "kernel.yama.ptrace_scope below 3 in /etc/sysctl.d",
        )
    if not facts.own_capability:
        return _without_capability(facts, who, as_root)
    return _with_capability(facts, who)


def _with_capability(facts: PtraceFacts, who: str) -> tuple[str, str]:
    # Without permission to see QEMU's namespace, being in one ourselves is reason enough.
    same = facts.own_initial_user_ns if facts.same_user_ns is None else facts.same_user_ns
    if not same:
        return (
            f"CAP_SYS_PTRACE is held in another user namespace than that of {who}",
            "run as root of the host, outside the container or rootless session",
        )
    if facts.own_seccomp and _confinement(facts) is None:
        return (
            "a seccomp filter of this container probably forbids ptrace",
            "run on the host, or: docker run --cap-add SYS_PTRACE --security-opt "
            "seccomp=unconfined --pid host …",
        )
    return _confinement(facts) or (
        f"the kernel forbids tracing {who} for a reason that is not visible from here",
        "look into the kernel log and the audit log: dmesg | tail; ausearch -m avc -ts recent",
    )


def _without_capability(facts: PtraceFacts, who: str, as_root: str) -> tuple[str, str]:
    if facts.own_uid == 0:
        return (
            "root lacks CAP_SYS_PTRACE here: this is a container or a restricted service",
            "run on the host, or: docker run --cap-add SYS_PTRACE --pid host …; "
            "in a systemd unit: CapabilityBoundingSet=CAP_SYS_PTRACE",
        )
    same_user = set(facts.target_uids[:3]) == {facts.own_uid}
    if not same_user or set(facts.target_gids[:3]) != {facts.own_gid}:
        return (
            f"{who} runs as uid {facts.target_uids[0]}, gid {facts.target_gids[0]}, "
            f"this tool as uid {facts.own_uid}, gid {facts.own_gid} without CAP_SYS_PTRACE",
            as_root,
        )
    if facts.same_user_ns is False:
        return (f"{who} is in another user namespace, and CAP_SYS_PTRACE is missing", as_root)
    if not facts.target_dumpable:
        return (
            f"{who} is not dumpable: it changed its user or runs with file capabilities",
            as_root,
        )
    if facts.yama_scope in (1, 2):
        return (
            f"kernel.yama.ptrace_scope is {facts.yama_scope}: it takes CAP_SYS_PTRACE to trace "
            + ("any process but one's children" if facts.yama_scope == 1 else "any process"),
            f"{as_root}; or for all of this host: sysctl kernel.yama.ptrace_scope=0",
        )
    return _confinement(facts) or (
        f"the kernel forbids tracing {who} without CAP_SYS_PTRACE",
        as_root,
    )


def _confinement(facts: PtraceFacts) -> tuple[str, str] | None:
    own, target = facts.own_label or "", facts.target_label or ""
    if own.count(":") >= 3:  # user:role:type:level
        return (
            f"SELinux probably forbids {own} to trace {target or 'QEMU'}",
            "see: ausearch -m avc -ts recent; getsebool deny_ptrace; setsebool deny_ptrace off",
        )
    # AppArmor lets an unconfined tracer trace anybody (profile_tracee_perm(),
    # security/apparmor/ipc.c), so only our own profile can be in the way.
    if own not in ("", "unconfined", "kernel"):
        return (
            f"AppArmor probably forbids it: this tool is confined by the profile {own}",
            "see: journalctl -k -g apparmor; run the tool from an unconfined root shell",
        )
    return None


def _ns_of(who: str) -> str | None:
    try:
        return os.readlink(f"{PROC}/{who}/ns/user")
    except OSError:
        return None


def _identity_map(text: str | None) -> bool:
    # user_namespaces(7): the initial namespace maps all ids to themselves
    return text is None or text.split() == ["0", "0", "4294967295"]


def _dumpable(process: Process, status: Status) -> bool:
    # proc(5): the files of a process that is not dumpable belong to root
    try:
        owner = os.stat(f"{PROC}/{process.pid}/stat").st_uid
    except OSError as error:
        raise _gone(process.pid) from error
    return owner == status.uids[1]


def _label(who: str) -> str | None:
    text = _read_optional(f"{PROC}/{who}/attr/current")
    return None if text is None else text.strip("\0\n ") or None
