# SPDX-License-Identifier: GPL-2.0-or-later
"""Test parsers of /proc files on sample text, and readers on real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_prefault.errors import (
    FailedError,
    GoneError,
    QemuPrefaultError,
    RefusedError,
    UnsupportedError,
)
from qemu_prefault.host.fds import KvmFds, kvm_fds, parse_kvm_fds, take_fd
from qemu_prefault.host.headroom import (
    Limit,
    Mount,
    cgroup_directories,
    hugetlb_cgroup_limits,
    memory_headroom,
    parse_cgroups,
    parse_key_values,
    parse_mountinfo,
)
from qemu_prefault.host.identify import identify
from qemu_prefault.host.mappings import MemoryMapping, backing_of, mappings_of, parse_maps
from qemu_prefault.host.procfs import Process, parse_start_time, parse_status, thread_map
from qemu_prefault.host.ptrace_access import (
    CAP_SYS_PTRACE,
    PtraceFacts,
    diagnose_ptrace,
    explain_ptrace,
    ptrace_denied,
)

STATUS = """\
Name:\tqemu-system-x86
Umask:\t0022
State:\tS (sleeping)
Tgid:\t4711
Pid:\t4712
TracerPid:\t99
Uid:\t64055\t64055\t64055\t64055
Gid:\t103\t103\t103\t103
NSpid:\t4712\t8
VmRSS:\t  123456 kB
SigBlk:\tfffffffe3ffbfa17
SigIgn:\t0000000000001000
SigCgt:\t0000000180004243
CapPrm:\t0000000000000000
CapEff:\t0000000000080000
Seccomp:\t2
x86_Thread_features:\tshstk wrss
"""


def test_status() -> None:
    status = parse_status(STATUS)
    assert status.name == "qemu-system-x86"
    assert (status.tgid, status.tracer_pid, status.ns_pids) == (4711, 99, (4712, 8))
    assert status.uids == (64055,) * 4 and status.gids == (103,) * 4
    assert status.sig_blocked == 0xFFFFFFFE3FFBFA17
    assert status.has_capability(CAP_SYS_PTRACE) and not status.has_capability(0)
    assert (status.seccomp, status.thread_features) == (2, frozenset({"shstk", "wrss"}))


def test_status_without_newer_fields() -> None:
    old = "\n".join(
        line
        for line in STATUS.split("\n")
        if not line.startswith(("NSpid", "Seccomp", "x86_Thread"))
    )
    status = parse_status(old)
    assert (status.ns_pids, status.seccomp) == ((4712,), 0)


def test_command_name_cannot_forge_start_time() -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    assert parse_start_time(f"1 (a) S 0) S {fields}") == 22
    assert parse_start_time(f"1 (a\n)) S {fields}") == 22


MAPS = """\
55e0c6a3b000-55e0c6d9f000 r--p 00000000 fe:00 4200 /usr/bin/qemu-system-x86_64
7f43b3e00000-7f43f3e00000 rw-p 00000000 00:00 0 
7f43f4000000-7f43f8000000 rw-s 00001000 00:01 1029 /memfd:memory-backend-memfd (deleted)
7f43f8000000-7f43fc000000 rw-s 00000000 00:0f 77 /dev/hugepages/qemu_back_mem.m0.abc (deleted)
7f43fc000000-7f43fd000000 rw-p 00000000 00:10 78 /anon_hugepage (deleted)
7f43fd000000-7f43fe000000 rw-s 00000000 00:01 79 /dev/zero (deleted)
7f43fe000000-7f43ff000000 rw-s 00000000 00:1c 80 /dev/shm/a file
7f43ff000000-7f43ff001000 rw-s 00000000 00:05 81 /dev/vfio/1
7ffc0a0f0000-7ffc0a111000 rw-p 00000000 00:00 0 [stack]
"""


def test_mapping_backing() -> None:
    maps = parse_maps(MAPS.encode())
    assert [backing_of(m) for m in maps] == [
        "file", "anonymous", "memfd", "hugetlb", "hugetlb", "shmem", "shmem", "device", "anonymous"
    ]  # fmt: skip
    assert backing_of(maps[2], 2 << 20) == "hugetlb"  # a memfd with hugetlb=on
    assert maps[2] == MemoryMapping(
        0x7F43F4000000, 0x7F43F8000000, "rw-s", 0x1000, (0, 1), 1029,
        "/memfd:memory-backend-memfd (deleted)",
    )  # fmt: skip
    assert maps[6].path == "/dev/shm/a file"
    assert [m.shared for m in maps[:3]] == [False, False, True]
    assert [m.writable for m in maps[:3]] == [False, True, True]


def test_covering_mappings() -> None:
    maps = [MemoryMapping(i << 12, (i + 1) << 12, "rw-p", 0, (0, 0), 0, "") for i in (1, 2, 4)]
    assert mappings_of(maps, 0x1800, 0x1000) == tuple(maps[:2])
    assert mappings_of(maps, 0x4000, 0x1000) == (maps[2],)
    for start, size in ((0x0, 0x2000), (0x2000, 0x2001), (0x2000, 0x3000), (0x9000, 1)):
        with pytest.raises(FailedError) as caught:
            mappings_of(maps, start, size)
        assert caught.value.code == "unmapped"


@pytest.mark.parametrize("line", ["x", "2000-1000 rw-p 0 00:00 0", "1000-2000 rwxq 0 00:00 0"])
def test_impossible_maps(line: str) -> None:
    with pytest.raises(FailedError):
        parse_maps(line.encode())


@given(st.text())
def test_parsers_raise_only_our_errors(text: str) -> None:
    for parse in (parse_status, parse_start_time):
        with contextlib.suppress(QemuPrefaultError):
            parse(text)
    with contextlib.suppress(QemuPrefaultError):
        parse_maps(text.encode("utf-8", "surrogatepass"))
    parse_cgroups(text)
    parse_mountinfo(text)
    parse_key_values(text)


def test_kvm_descriptors() -> None:
    links = [
        (9, "/dev/kvm"), (10, "anon_inode:kvm-vm"), (14, "anon_inode:kvm-vcpu:0"),
        (15, "anon_inode:kvm-vcpu:4"), (16, "anon_inode:kvm-vcpu-stats:0"), (3, "socket:[1]"),
    ]  # fmt: skip
    assert parse_kvm_fds(links) == KvmFds(10, 9, vcpus={0: 14, 4: 15}, vcpu_stats={0: 16})
    assert parse_kvm_fds([]) == KvmFds()
    with pytest.raises(UnsupportedError, match="more than one"):
        parse_kvm_fds([*links, (30, "anon_inode:kvm-vm")])


# --- cgroups ---


def test_cgroup_paths() -> None:
    v1 = parse_cgroups("9:name=systemd:/x\n4:cpu,memory:/machine/a b:c\n0::/\n")
    assert v1["memory"] == v1["cpu"] == "/machine/a b:c" and v1[""] == "/"
    mounts = parse_mountinfo(
        "30 25 0:26 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
        "31 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "32 25 0:28 / /with\\040space rw - tmpfs tmpfs rw\n"
        "garbage\n"
    )
    assert mounts[2] == Mount("/", "/with space", "tmpfs", frozenset({"rw"}))
    assert cgroup_directories(v1, mounts, "memory") == [
        ("/sys/fs/cgroup/memory/machine/a b:c", False),
        ("/sys/fs/cgroup/memory/machine", False),
        ("/sys/fs/cgroup/memory", False),
    ]
    v2 = parse_cgroups("0::/machine.slice/vm.scope\n")
    assert cgroup_directories(v2, mounts, "memory") == [
        ("/sys/fs/cgroup/unified/machine.slice/vm.scope", True),
        ("/sys/fs/cgroup/unified/machine.slice", True),
        ("/sys/fs/cgroup/unified", True),
    ]


def test_container_cgroups() -> None:
    inside = [Mount("/docker/1", "/sys/fs/cgroup/memory", "cgroup", frozenset({"memory"}))]
    assert cgroup_directories({"memory": "/docker/1/vm"}, inside, "memory") == [
        ("/sys/fs/cgroup/memory/vm", False),
        ("/sys/fs/cgroup/memory", False),
    ]
    assert cgroup_directories({"memory": "/docker/12"}, inside, "memory") == []
    unified = [Mount("/", "/sys/fs/cgroup", "cgroup2", frozenset())]
    assert cgroup_directories({"": "/../../vm"}, unified, "memory") == []
    assert cgroup_directories({}, unified, "memory") == []


def cgroup(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def fake_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a /proc whose process 7 is in cgroup /a/b of tmp_path/cg (v2)."""
    proc = tmp_path / "proc"
    (proc / "7").mkdir(parents=True)
    (proc / "self").mkdir()
    (proc / "7" / "cgroup").write_text("0::/a/b\n")
    (proc / "self" / "mountinfo").write_text(f"1 1 0:1 / {tmp_path}/cg rw - cgroup2 x rw\n")
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  1000 kB\n")
    monkeypatch.setattr("qemu_prefault.host.proc_files.PROC", str(proc))
    return tmp_path


def test_headroom_is_minimum_of_host_and_cgroups(fake_proc: Path) -> None:
    cgroup(fake_proc / "cg", memory__current=1)  # the root has no limit files
    cgroup(fake_proc / "cg/a", memory__max=500, memory__current=300, memory__high="max")
    (fake_proc / "cg/a/memory.stat").write_text("anon 1\ninactive_file 50\n")
    cgroup(fake_proc / "cg/a/b", memory__max="max", memory__high=200, memory__current=900)
    limits = memory_headroom(Process(7, 0))
    assert [(limit.name, limit.available) for limit in limits] == [
        ("host", 1000 << 10),
        (f"cgroup {fake_proc}/cg/a/b", 0),
        (f"cgroup {fake_proc}/cg/a", 250),
    ]


def test_hugetlb_cgroup(fake_proc: Path) -> None:
    name = "hugetlb__2MB__"
    cgroup(fake_proc / "cg/a/b", **{name + "max": 8 << 20, name + "current": 6 << 20})
    assert hugetlb_cgroup_limits(Process(7, 0), 2 << 20)[0] == Limit(
        f"cgroup {fake_proc}/cg/a/b", 2 << 20, "hugetlb.2MB.max 8388608, 6291456 in use"
    )


def test_headroom_of_this_process() -> None:
    limits = memory_headroom(Process.find(os.getpid()))
    assert limits[0].name == "host" and limits[0].available > 0
    assert all(limit.available >= 0 for limit in limits)


# --- real processes ---

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users or namespaces")


@contextlib.contextmanager
def child(**options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that runs until its stdin is closed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        yield process
        process.kill()


def test_own_mappings_are_found() -> None:
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        process = Process.find(os.getpid())
        maps = process.maps()
        assert any(backing_of(m) == "anonymous" and m.size >= 1 << 20 for m in maps)
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, 1 << 20)
    with mmap.mmap(descriptor, 1 << 20):
        (found,) = [m for m in process.maps() if m.path.startswith("/memfd:guest")]
        assert backing_of(found) == "memfd" and found.shared
    os.close(descriptor)
    assert os.getpid() in process.threads()
    assert process.status().tgid == os.getpid()
    assert process.exe == os.path.realpath(sys.executable)
    assert kvm_fds(process) == KvmFds()
    process.check()


def test_ending_threads_do_not_hide_others() -> None:
    # A single read of /proc/PID/task omits a thread about once in a thousand reads.
    process = Process.find(os.getpid())
    for _ in range(1500):
        ends = threading.Thread(target=time.sleep, args=(0.0002,))
        done = threading.Event()
        stays = threading.Thread(target=done.wait)
        ends.start()
        stays.start()
        listed = [process.threads() for _ in range(20)]
        done.set()
        stays.join()
        ends.join()
        assert all(stays.native_id in threads for threads in listed)


@needs_root
def test_real_cgroup_limits_headroom() -> None:
    mine = Path("/proc/self/cgroup").read_text()
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    directories = cgroup_directories(parse_cgroups(mine), mounts, "memory")
    if not directories:
        pytest.skip("no memory cgroup is visible")
    root, unified = directories[-1]
    group = Path(root) / f"qemu-prefault-test-{os.getpid()}"
    limit = group / ("memory.max" if unified else "memory.limit_in_bytes")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("cannot create a cgroup")
    try:
        if not limit.exists():
            pytest.skip("the memory controller is not enabled for the root's children")
        limit.write_text(str(64 << 20))
        with child() as victim:
            (group / "cgroup.procs").write_text(str(victim.pid))
            limits = {found.name: found for found in memory_headroom(Process.find(victim.pid))}
            found = limits[f"cgroup {group}"]
            assert 60 << 20 <= found.available <= 64 << 20
            assert str(64 << 20) in found.detail
    finally:
        group.rmdir()


def test_every_read_of_an_ended_process_raises_gone() -> None:
    with child() as victim:
        process = Process.find(victim.pid)
        process.check()
        assert process.name == "cat"
        victim.kill()
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(GoneError):  # a zombie
            process.check()
        victim.wait()
        for question in (process.check, process.threads, process.status, process.maps,
                         lambda: kvm_fds(process), lambda: Process.find(victim.pid),
                         lambda: identify(victim.pid, None, [victim.pid]),
                         lambda: diagnose_ptrace(process)):  # fmt: skip
            with pytest.raises(GoneError) as caught:
                question()
            assert caught.value.code == "qemu-gone"
        assert process.thread_syscall(victim.pid) is None
        assert process.exe is None


def test_take_fd_copies_a_descriptor() -> None:
    with child(stdout=subprocess.PIPE) as other:
        process = Process.find(other.pid)
        with os.fdopen(take_fd(process, 1), "wb", buffering=0) as its_stdout:
            its_stdout.write(b"not from cat")
        assert other.stdout is not None and other.stdout.read(12) == b"not from cat"
        with pytest.raises(GoneError, match="descriptor 1000 of process"):
            take_fd(process, 1000)
        with pytest.raises(GoneError):
            take_fd(dataclasses.replace(process, start_time=process.start_time - 1), 1)
    with pytest.raises(GoneError):
        take_fd(process, 1)


def test_reused_pid_is_detected() -> None:
    with child() as other:
        process = Process.find(other.pid)
        with pytest.raises(GoneError):
            dataclasses.replace(process, start_time=process.start_time - 1).check()


def test_identify_finds_thread_owner() -> None:
    with child() as qemu, child() as proxy:
        assert identify(qemu.pid, None, [qemu.pid]).pid == qemu.pid
        assert thread_map(Process.find(qemu.pid)) == {qemu.pid: qemu.pid}
        # The socket belongs to a proxy, but the user has specified QEMU with --pid.
        assert identify(proxy.pid, qemu.pid, [qemu.pid]).pid == qemu.pid
        for peer, given, threads in (
            (proxy.pid, None, [qemu.pid]),
            (qemu.pid, proxy.pid, [qemu.pid]),
            (qemu.pid, None, [qemu.pid, 1]),
            (qemu.pid, None, [1]),
            (qemu.pid, None, []),
        ):
            with pytest.raises(RefusedError) as caught:
                identify(peer, given, threads)
            assert caught.value.code == "proxy"
        with pytest.raises(RefusedError, match=rf"process {qemu.pid} \(cat\)"):
            identify(proxy.pid, None, [qemu.pid])
        with pytest.raises(UnsupportedError):  # a TCP socket whose owner is not QEMU
            identify(None, None, [qemu.pid])
        with pytest.raises(RefusedError):
            identify(os.getpid(), None, [os.getpid()])


@needs_root
def test_thread_ids_are_translated_across_pid_namespaces() -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "echo; exec cat"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as outer:  # type: ignore[call-overload]
        assert outer.stdout.readline() == b"\n"
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        inner = int(children[0])
        assert thread_map(Process.find(inner)) == {1: inner}
        assert identify(inner, None, [1]).pid == inner
        with pytest.raises(RefusedError):  # untranslated ids belong to other threads
            identify(inner, None, [inner])
        outer.kill()


# --- ptrace ---

FACTS = PtraceFacts(
    pid=4711, own_uid=1000, own_gid=1000, own_capability=False, own_seccomp=False,
    own_initial_user_ns=True, same_user_ns=True, tracer=None, target_uids=(1000,) * 4,
    target_gids=(1000,) * 4, target_ns_depth=1, target_dumpable=True, yama_scope=0,
    own_label=None, target_label=None,
)  # fmt: skip
ROOT = dataclasses.replace(FACTS, own_uid=0, own_gid=0, own_capability=True)


@pytest.mark.parametrize(
    ("facts", "cause", "remedy"),
    [
        (dataclasses.replace(ROOT, tracer=(12, "gdb")), "traced by process 12 (gdb)", "kill 12"),
        (dataclasses.replace(ROOT, yama_scope=3), "refuses all tracing", "plugin agent"),
        (dataclasses.replace(ROOT, own_capability=False), "root lacks CAP_SYS_PTRACE",
         "--cap-add SYS_PTRACE"),
        (dataclasses.replace(FACTS, own_uid=5), "runs as uid 1000", "sudo"),
        (dataclasses.replace(FACTS, own_gid=5), "as uid 1000, gid 5", "sudo"),
        (dataclasses.replace(FACTS, yama_scope=1), "ptrace_scope is 1",
         "sysctl kernel.yama.ptrace_scope=0"),
        (dataclasses.replace(FACTS, yama_scope=2), "ptrace_scope is 2", "sudo"),
        (dataclasses.replace(FACTS, target_dumpable=False), "not dumpable", "sudo"),
        (dataclasses.replace(FACTS, same_user_ns=False), "another user namespace", "sudo"),
        (FACTS, "denies tracing", "sudo"),
        (dataclasses.replace(ROOT, same_user_ns=False), "another user namespace", "on the host"),
        (dataclasses.replace(ROOT, same_user_ns=None, own_initial_user_ns=False),
         "user namespace", "on the host"),
        (dataclasses.replace(ROOT, same_user_ns=True, own_initial_user_ns=False),
         "not visible", "dmesg"),
        (dataclasses.replace(ROOT, own_label="docker-default (enforce)"), "AppArmor",
         "journalctl"),
        (dataclasses.replace(ROOT, own_label="unconfined", target_label="libvirt-1 (enforce)"),
         "not visible", "dmesg"),
        (dataclasses.replace(ROOT, own_label="u:r:t:s0", target_label="s:r:svirt_t:s0:c1"),
         "SELinux", "setsebool deny_ptrace off"),
        (dataclasses.replace(ROOT, own_seccomp=True), "seccomp", "seccomp=unconfined"),
        (ROOT, "not visible to this process", "dmesg"),
    ],
)  # fmt: skip
def test_each_reason_has_cause_and_command(facts: PtraceFacts, cause: str, remedy: str) -> None:
    told = explain_ptrace(facts)
    assert cause in told[0]
    assert remedy in told[1]


DIAGNOSE = (
    "import sys; from qemu_prefault.host.ptrace_access import *;"
    "print(diagnose_ptrace(Process.find(int(sys.argv[1]))))"
)


def diagnose_as(pid: int, *setpriv: str) -> str:
    command = ["setpriv", *setpriv] if setpriv else []
    command += [sys.executable, "-c", DIAGNOSE, str(pid)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    )
    return done.stdout


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@pytest.fixture
def nobody() -> Iterator[ProcessPoolExecutor]:
    """Yield an executor that runs functions as another user.

    The executor forks its processes, because that user may not be able to read Python's files.
    """
    from qemu_prefault import _native  # noqa: F401, PLC0415

    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork, initializer=become_nobody) as executor:
        yield executor


@needs_root
def test_other_users_process(nobody: ProcessPoolExecutor) -> None:
    with child() as victim:
        told = " ".join(nobody.submit(diagnose_ptrace, Process.find(victim.pid)).result())
        assert "runs as uid 0" in told and "as uid 65534" in told


def refusal_of_a_descriptor(process: Process) -> tuple[str, str]:
    with pytest.raises(UnsupportedError) as refusal:
        take_fd(process, 0)
    return refusal.value.code, str(ptrace_denied(process))


@needs_root
def test_take_fd_needs_ptrace_access(nobody: ProcessPoolExecutor) -> None:
    with child() as victim:
        process = Process.find(victim.pid)
        code, told = nobody.submit(refusal_of_a_descriptor, process).result()
        assert code == "ptrace-denied"
        assert "runs as uid 0" in told and "as uid 65534" in told


@needs_root
def test_root_without_cap_sys_ptrace() -> None:
    with child(user=65534, group=65534) as victim:
        told = diagnose_as(victim.pid, "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
        assert "root lacks CAP_SYS_PTRACE" in told


def test_traced_process_names_tracer() -> None:
    tracer = (
        "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0\n"  # PTRACE_SEIZE
        "print('seized', flush=True); sys.stdin.read()"
    )
    with child() as victim, subprocess.Popen(
        [sys.executable, "-c", tracer, str(victim.pid)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"seized\n"
        cause, remedy = diagnose_ptrace(Process.find(victim.pid))
        assert f"traced by process {other.pid} (python" in cause
        assert remedy.endswith(f"kill {other.pid}")
        other.kill()
