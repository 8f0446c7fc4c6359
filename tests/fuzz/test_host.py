# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz the parsers of /proc, sysfs, cgroups, KVM's counters and seccomp filters."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_prefault.agents.base import Kind, Range
from qemu_prefault.agents.control_page import Helper
from qemu_prefault.agents.helper_calls import optional_calls, required_calls
from qemu_prefault.agents.plugin_socket import bound_paths
from qemu_prefault.agents.ptrace import _seconds_left
from qemu_prefault.agents.seccomp import BadFilterError, denied, parse_filters
from qemu_prefault.host import (
    headroom,
    mapped_file,
    mappings,
    memory_source,
    placement,
    proc_files,
    procfs,
    task_limits,
    unwritten,
)
from qemu_prefault.host.executable import is_static, script_interpreter
from qemu_prefault.host.fds import parse_kvm_fds
from qemu_prefault.host.kernel_log import find_cause
from qemu_prefault.host.kvm import BinaryStats, describe_errno
from qemu_prefault.host.memory_source import MemorySource, confining_nodes, node_limit, source_of
from qemu_prefault.host.procfs import Process
from qemu_prefault.host.stall import why_stalled
from qemu_prefault.libvirt.find_qemu import find_qemu
from support.fuzz import Target
from support.under_filter import filter_of

Check = Callable[[Target], None]

STATUS = b"""\
Name:\tqemu-system-x86
Umask:\t0022
State:\tS (sleeping)
Tgid:\t7
Ngid:\t0
Pid:\t7
PPid:\t1
TracerPid:\t0
Uid:\t64055\t64055\t64055\t64055
Gid:\t108\t108\t108\t108
FDSize:\t64
NStgid:\t7
NSpid:\t7\t1
HugetlbPages:\t    2048 kB
Threads:\t2
SigQ:\t0/47889
SigBlk:\t0000000010002240
CapEff:\t000001ffffffffff
Seccomp:\t2
Seccomp_filters:\t1
x86_Thread_features:\tshstk
Mems_allowed_list:\t0-1
"""
STAT = b"7 (CPU 0/KVM) S 1 7 7 0 -1 1077936192 7 0 0 0 6 5 0 0 20 0 9 0 4242 99 88 1844674407370955"
MAPS = b"""\
55d4c0000000-55d4c0200000 r-xp 00000000 fe:01 1837 /usr/bin/qemu-system-x86_64 (deleted)
7f0000000000-7f0008000000 rw-s 00000000 00:01 5 /memfd:ram (deleted)
7f0008000000-7f0009000000 rw-p 00000000 00:00 0
7f0010000000-7f0020000000 rw-s 10000000 00:1a 9 /dev/shm/a b
7f0040000000-7f0080000000 rw-s 00000000 00:10 77 /dev/hugepages/libvirt/qemu (deleted)
7ffd0b000000-7ffd0b021000 rw-p 00000000 00:00 0 [stack]
"""
SMALL_CGROUP = b"12:memory:/machine/qemu\n4:cpu,hugetlb:/x\n0::/machine.slice/vm.scope\n"
MOUNTINFO = b"""\
22 25 0:21 / /proc rw,nosuid shared:5 - proc proc rw
30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw
31 25 0:27 /machine /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory
32 25 0:28 / /dev/shm rw - tmpfs tmpfs rw,size=4096k
"""
MEMINFO = b"""\
MemTotal:       16326428 kB
MemFree:         9000000 kB
MemAvailable:   12345678 kB
HugePages_Total:       4
"""
NODE_MEMINFO = b"""\
Node 1 MemTotal:       1048576 kB
Node 1 MemFree:          20480 kB
Node 1 Inactive(file):    4096 kB
"""
NUMA_MAPS = b"""\
55d4c0000000 default file=/usr/bin/qemu mapped=10 N0=10 kernelpagesize_kB=4
7f0000000000 bind:1 file=/memfd:ram dirty=2 N1=2 kernelpagesize_kB=2048
7f1000000000 interleave:0-1 anon=3 dirty=3 N0=2 N1=1 kernelpagesize_kB=4
"""
UNIX = b"""\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 23144 /run/qemu-prefault-7.sock
0000000000000000: 00000003 00000000 00000000 0001 03 23145 @abstract name
0000000000000000: 00000003 00000000 00000000 0001 03 23146
"""
LIMITS = b"""\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max processes             47889                47889                processes
Max pending signals       47889                47889                signals
"""
LOADAVG = b"0.52 0.58 0.59 1/467 30210\n"
KMSG = b"""\
6,1023,4500000,-;oom-kill:constraint=CONSTRAINT_NONE
3,1024,5000000,-;Out of memory: Killed process 7 (qemu-system-x86) total-vm:1kB
5,1025,6000000,-;audit: type=1326 audit(1.2:3): auid=0 pid=7 comm="q" sig=31 arch=c000003e
6,1026,7000000,-;CPU 0/KVM[7]: segfault at 0 ip 0 sp 0 error 4
"""
LINKS = b"""\
anon_inode:kvm-vm
anon_inode:kvm-vcpu:0
anon_inode:kvm-vcpu:1
anon_inode:kvm-vcpu-stats:0
/dev/kvm
socket:[23144]
"""


def text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    """Return a function that decodes an input like a /proc file and parses the text."""
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def two(parse: Callable[[str, str], object]) -> Callable[[bytes], object]:
    """Return a function that parses the texts before and after a ``--`` line."""

    def both(data: bytes) -> object:
        first, _, second = data.decode("utf-8", "surrogateescape").partition("--\n")
        return parse(first, second)

    return both


def maps(data: bytes) -> None:
    found = mappings.parse_maps(data)
    for mapping in found[:3]:
        mappings.backing_of(mapping)
        mappings.mappings_of(found, mapping.start, mapping.size)


def groups(cgroup: str, mountinfo: str) -> None:
    paths, mounts = headroom.parse_cgroups(cgroup), headroom.parse_mountinfo(mountinfo)
    for controller in ("memory", "hugetlb", "pids"):
        headroom.cgroup_directories(paths, mounts, controller)
    placement.threads_files(paths, {}, mounts)


def node_lists(data: str) -> None:
    memory_source.parse_node_list(data)
    placement.parse_cpu_list(data)


def limits(loadavg: str, table: str) -> None:
    task_limits.parse_limits(table)
    task_limits.parse_pending(table)
    task_limits._host_limits(loadavg, {"pid_max": 4194304})


def links(data: str) -> None:
    parse_kvm_fds(enumerate(data.split("\n")))


TEXTS = (
    Target("status", text(procfs.parse_status), [STATUS]),
    Target("stat", text(procfs.parse_start_time), [STAT]),
    Target("maps", maps, [MAPS]),
    Target("cgroup-mountinfo", two(groups), [SMALL_CGROUP + b"--\n" + MOUNTINFO]),
    Target("meminfo", text(headroom.parse_key_values), [MEMINFO, b"anon 1\ninactive_file 50\n"]),
    Target("numa-maps", text(lambda t: memory_source.parse_numa_maps(t, 0x7F00_0000_0000)),
           [NUMA_MAPS]),
    Target("node-list", text(node_lists), [b"0-2,5\n", b"0\n", b"0-3,8,128-255"]),
    Target("task-limits", two(limits), [LOADAVG + b"--\n" + LIMITS + b"SigQ:\t0/47889\n"]),
    Target("net-unix", lambda data: bound_paths(data, 23144), [UNIX]),
    Target("kvm-links", text(links), [LINKS]),
    Target("kernel-log", text(lambda t: find_cause(t.split("\n"), 7, 1.0)), [KMSG]),
)  # fmt: skip


@pytest.mark.parametrize("target", TEXTS, ids=lambda target: target.name)
def test_text(target: Target, check: Check) -> None:
    check(target)


# --- a tree of files ---

#: Each file of a simulated host, below one directory.
FILES = {
    "proc/7/status": STATUS,
    "proc/7/stat": STAT,
    "proc/7/comm": b"qemu-system-x86\n",
    "proc/7/cgroup": b"0::/a/b\n",
    "proc/7/maps": MAPS,
    "proc/7/numa_maps": NUMA_MAPS,
    "proc/7/limits": LIMITS,
    "proc/7/mountinfo": MOUNTINFO,
    "proc/7/task/7/status": STATUS,
    "proc/7/task/7/stat": STAT,
    "proc/7/task/7/comm": b"CPU 0/KVM\n",
    "proc/7/task/7/wchan": b"kvm_vcpu_block",
    "proc/self/mountinfo": b"30 25 0:26 / %s/cg rw,nosuid shared:9 - cgroup2 cgroup2 rw\n",
    "proc/meminfo": MEMINFO,
    "proc/loadavg": LOADAVG,
    "cg/a/memory.max": b"500000000\n",
    "cg/a/memory.current": b"3000\n",
    "cg/a/memory.stat": b"anon 1\ninactive_file 50\n",
    "cg/a/pids.max": b"100\n",
    "cg/a/pids.current": b"10\n",
    "cg/a/b/memory.high": b"900\n",
    "cg/a/b/memory.max": b"max\n",
    "cg/a/b/memory.current": b"100\n",
    "cg/a/b/hugetlb.2MB.max": b"8388608\n",
    "cg/a/b/hugetlb.2MB.current": b"4096\n",
    "node/has_memory": b"0-1\n",
    "node/node1/meminfo": NODE_MEMINFO,
    "min_free": b"67584\n",
    "libvirt/qemu/run/vm.pid": b"7\n",
}
SEPARATOR = b"\n==\n"


def read_everything() -> None:
    """Read all files of the simulated host, as a run does."""
    process = Process.find(7)
    process.status()
    procfs.thread_map(process)
    procfs.tgid_of(7)
    procfs.comm_of(7)
    task_limits.task_limits(process)
    why_stalled(process, 7, seconds=0.0)
    for mapping in process.maps()[:4]:
        source = source_of(process, mapping)
        source.limits(1 << 20)
        mapped_file.is_disk_file(process, mapping)
        MemorySource(process, mapping, 2 << 20, (1,), reserved=False).limits(1 << 20)
    node_limit(confining_nodes(process, (1,)))
    find_qemu("vm", "")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Redirect the product's paths to a directory in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        redirect(Path(name), monkeypatch)
        yield Path(name)


def redirect(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(proc_files, "PROC", str(base / "proc"))
    monkeypatch.setattr(memory_source, "NODES", base / "node")
    monkeypatch.setattr(memory_source, "MIN_FREE", base / "min_free")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    # Otherwise the code would walk this machine's file systems for every mapping on a tmpfs.
    monkeypatch.setattr(unwritten, "MAX_ENTRIES", 3)


def test_files_of_a_host(host: Path, check: Check) -> None:
    written: dict[str, bytes] = {}

    def parse(data: bytes) -> None:
        for name, content in zip(FILES, data.split(SEPARATOR), strict=False):
            if written.get(name) != content:
                (host / name).write_bytes(content)
                written[name] = content
        read_everything()

    where = os.fsencode(host)
    seed = SEPARATOR.join(content.replace(b"%s", where) for content in FILES.values())
    check(Target("host-files", parse, [seed], cost=10))


# --- binary data ---


@pytest.fixture
def memfd() -> Iterator[int]:
    """Yield the descriptor of an empty file in memory."""
    fd = os.memfd_create("input")
    yield fd
    os.close(fd)


def fill(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def descriptor(name: bytes, offset: int) -> bytes:
    return struct.pack("<IhHII", 0, 0, 1, offset, 0) + name.ljust(48, b"\0")


STATS = b"".join([
    struct.pack("<6I", 0, 48, 3, 24, 24 + 48, 24 + 48 + 3 * 64),
    b"kvm-7".ljust(48, b"\0"),
    *(descriptor(name, 8 * at) for at, name in enumerate((b"pf_taken", b"exits", b"guest_mode"))),
    struct.pack("<3Q", 1, 2, 3),
])  # fmt: skip


def test_binary_stats(memfd: int, check: Check) -> None:
    def parse(data: bytes) -> None:
        fill(memfd, data)
        stats = BinaryStats(memfd)
        assert all(type(n) is int for n in stats.read("guest_mode", "pf_taken", "unknown"))

    check(Target("binary-stats", parse, [STATS], errors=(OSError,)))


def counted(code: bytes) -> bytes:
    return struct.pack("<I", len(code) // 8) + code


LONGEST = struct.pack("<HBBI", 0x15, 0, 0, 5) * 4095 + struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)
FILTERS = (
    counted(filter_of("kill", ["16:1=0xc040aed5", "28:2=23", "62"])),
    counted(filter_of("errno", ["9:2=5", "222"])) + counted(filter_of("allow", [])),
    counted(LONGEST),
)


def test_seccomp_filters(check: Check) -> None:
    """Check that denied() returns only system calls that were passed to it."""
    calls = [*required_calls([5, -1], area=1 << 44, gadget=7), *optional_calls(area=1 << 44)]
    names = {call.number.name for call in calls}

    def parse(data: bytes) -> None:
        assert set(denied(parse_filters(data), calls)) <= names

    check(Target("seccomp", parse, FILTERS, errors=(BadFilterError,)))


def elf(kind: int, *segments: tuple[int, bytes]) -> bytes:
    """Return a 64-bit ELF file with these segments (type and contents)."""
    header = struct.pack("<HHIQQQIHHHHHH", kind, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    at, table, contents = 64 + 56 * len(segments), b"", b""
    for type_, content in segments:
        table += struct.pack("<IIQQQQQQ", type_, 4, at, 0, 0, len(content), len(content), 1)
        at, contents = at + len(content), contents + content
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + header + table + contents


PROGRAMS = (
    elf(3, (3, b"/lib64/ld-linux-x86-64.so.2\0"), (2, bytes(16))),
    elf(3, (2, struct.pack("<QQ", 0x6FFFFFFB, 0x08000000))),
    elf(2),
    b"#!/no/such/program -x\n",
)


def test_program(memfd: int, check: Check) -> None:
    def parse(data: bytes) -> None:
        fill(memfd, data)
        is_static(f"/proc/self/fd/{memfd}")
        if not data.startswith((b"#!/d", b"#!/p")):  # /dev and /proc of this machine
            script_interpreter(f"/proc/self/fd/{memfd}")

    check(Target("program", parse, PROGRAMS))


def control_page() -> bytes:
    from qemu_prefault._native import ffi, lib  # noqa: PLC0415

    page = ffi.new(
        "struct prefault_control *",
        {"magic": lib.PREFAULT_CONTROL_MAGIC, "ready": 1, "batch_done": 1, "tid": 9},
    )
    page.batch_started_ns, page.chunk_started_ns = 1 << 30, 1 << 31
    for at in range(2):
        page.ranges[at].done, page.ranges[at].size = 4096, 1 << 20
    return bytes(ffi.buffer(page))[:1024]


def test_control_page(memfd: int, check: Check) -> None:
    """Check that any contents of the control page yield a result or a known error.

    QEMU can overwrite or unmap this page at any time.
    """
    ranges = [Range(Kind.STAGE2, 0, 1 << 20), Range(Kind.POPULATE, 0, 4096)]
    helper = Helper(memfd, 0, 0)

    def parse(data: bytes) -> None:
        fill(memfd, data)
        with contextlib.suppress(OSError, ValueError):  # see PtraceAgent._guarded()
            header = helper.read_header()
            outcomes = helper.outcomes(ranges)
            wait = _seconds_left(0.0, header, outcomes)
            assert not math.isnan(wait)
            for outcome in outcomes:
                describe_errno(outcome.error)

    check(Target("control-page", parse, [control_page()]))
