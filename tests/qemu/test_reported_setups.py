# SPDX-License-Identifier: GPL-2.0-or-later
"""Test setups from public bug reports.

In each setup, an earlier version of the tool harmed a guest or misled the operator. Each test names
the reports. Tests for more setups are in the files for their subjects, for example
test_memory_sources.py, test_seccomp.py and test_plugin_run.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault_lab.wait import wait_for
from support.limits import MIB, cgroups, in_group, mounted, out_of_memory_kills
from support.plugin import capable_prefix, wait_started
from support.process import leftovers
from support.qemu import StartQemu, kvm_usable, start_tool, start_vm
from support.tool import Result, Tool

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and cgroups require root")
needs_kvm = pytest.mark.skipif(not kvm_usable(), reason="/dev/kvm cannot be opened")


# --- neighbours ---


def ram_in(directory: Path, mib: int, share: str = "on") -> tuple[str, ...]:
    backend = f"memory-backend-file,id=m,size={mib}M,mem-path={directory},share={share}"
    return ("-m", f"{mib}M", "-object", backend, "-machine", "memory-backend=m")


@needs_root
@needs_kvm
@pytest.mark.parametrize(
    ("agent", "mib", "share"),
    [
        ("attach", 256, "on"),
        ("attach", 150, "on"),
        ("attach", 150, "off"),
        ("plugin", 256, "on"),
        ("plugin", 150, "on"),
        ("plugin", 150, "off"),
    ],
)
def test_neighbour_in_tmpfs_gets_its_memory(
    start_qemu: StartQemu, tmp_path: Path, agent: str, mib: int, share: str
) -> None:
    """Check that the tool does not use space that another guest in the tmpfs needs.

    If a tmpfs is full, QEMU gets SIGBUS when its guest uses new memory. The setup is from
    kata-containers#12919 and systemd#16617.
    """
    with mounted("tmpfs", tmp_path / "shm", "size=200M") as shm:
        neighbour = start_vm(start_qemu, tmp_path, *ram_in(shm, 64), accel="kvm", paused=False)
        ram = ram_in(shm, mib, share)
        if agent == "attach":
            result = start_vm(start_qemu, tmp_path, *ram, accel="kvm").prefault("--populate-only")
            assert result.status == 5 and "the file system of" in result.error["cause"]
        else:
            control = tmp_path / "control"
            plugin = ("-plugin", f"{plugin_path()},socket={control}")
            prefix = capable_prefix()
            qemu = start_qemu(*plugin, *ram, accel="kvm", paused=False, prefix=prefix)
            assert wait_started(qemu, control)["populate"] == "resident"
        # Now the neighbour allocates all of its RAM.
        result = neighbour.prefault("--populate-only", "--force")
        assert result.complete()["bytes"]["requested"] > 62 * MIB
        assert neighbour.qmp.status() == "running"


@needs_root
def test_concurrent_runs_exceed_no_limit(start_qemu: StartQemu, tmp_path: Path) -> None:
    """Start three runs at once, each of which would fit into the cgroup alone.

    The setup is from harvester#2522 and kubevirt#4560.
    """
    with cgroups("memory") as ((group,), unified):
        name = "memory.max" if unified else "memory.limit_in_bytes"
        (group / name).write_text(str(560 * MIB))
        vms = [
            start_vm(start_qemu, tmp_path, "-m", "200M", prefix=in_group(group)) for _ in range(3)
        ]
        tools = [start_tool(vm.qemu, "--populate-only", "--chunk", "65536") for vm in vms]
        results = [tool.finish() for tool in tools]
        assert out_of_memory_kills(group) == 0
        for vm, result in zip(vms, results, strict=True):
            assert vm.qmp.status() == "prelaunch"
            assert leftovers(vm.pid) == []
            assert result.status in (0, 3, 5), result.stderr
            if result.status == 3:
                assert result.warnings == {"memory-short"}
        assert {result.status for result in results} & {3, 5}
        for vm in vms:
            vm.qemu.kill()


# --- descriptors ---

MANY_FDS = """
import os, resource, sys
count = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 1000, count + 1000))
null = os.open("/dev/null", os.O_RDWR)
for number in range(3, count):
    os.dup2(null, number, inheritable=True)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@needs_kvm
@pytest.mark.parametrize("count", [300, 2000])
def test_many_inherited_descriptors(start_qemu: StartQemu, tmp_path: Path, count: int) -> None:
    """Check that both agents work in a QEMU that has inherited many descriptors.

    Management programs pass hundreds of descriptors for tap and vhost queues to QEMU. The setup is
    from lxd#13484 and tp-qemu#1668.
    """
    plugin = ("-plugin", f"{plugin_path()},socket={tmp_path}/control")
    prefix = [sys.executable, "-c", MANY_FDS, str(count)]
    vm = start_vm(start_qemu, tmp_path, "-m", "64M", *plugin, accel="kvm", prefix=prefix)
    links = {fd.name: os.readlink(fd) for fd in Path(f"/proc/{vm.pid}/fd").iterdir()}
    assert any(link == "anon_inode:kvm-vm" and int(fd) >= count for fd, link in links.items())
    findings = {f["check"]: f for f in vm.command("probe").report["findings"]}
    assert "not loaded" not in findings["plugin"]["text"]
    for agent in ("plugin", "attach"):
        result = vm.prefault("--populate-only", "--agent", agent)
        assert result.complete()["agent"] == agent


# --- other monitors ---


def attempt(address: str, *arguments: str) -> Result:
    return Tool(["--qmp", address, "--json", "--populate-only", *arguments]).finish()


@pytest.mark.parametrize("way", ["-qmp-pretty", "-mon"])
def test_pretty_printed_qmp_is_recognized(start_qemu: StartQemu, tmp_path: Path, way: str) -> None:
    path = tmp_path / "pretty"
    if way == "-qmp-pretty":
        monitor: Sequence[str] = (way, f"unix:{path},server=on,wait=off")
    else:
        monitor = ("-chardev", f"socket,id=p,path={path},server=on,wait=off",
                   "-mon", "p,mode=control,pretty=on")  # fmt: skip
    start_qemu("-m", "64M", *monitor)
    result = attempt(str(path))
    assert result.status == 1
    assert "pretty-printed" in result.error["cause"] and "pretty=off" in result.error["remedy"]


def test_telnet_is_recognized(start_qemu: StartQemu) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start_qemu("-m", "64M", "-qmp", f"telnet:127.0.0.1:{port},server=on,wait=off")
    result = attempt(f"127.0.0.1:{port}")
    assert result.status == 1
    assert "telnet" in result.error["cause"] and "tcp:" in result.error["remedy"]


@contextmanager
def storage_daemon(path: Path) -> Iterator[None]:
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is not installed")
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    with subprocess.Popen([program, "--chardev", chardev, "--monitor", "chardev=c"]) as daemon:
        try:
            wait_for(path.exists, "the daemon listens")
            yield
        finally:
            daemon.kill()


def test_storage_daemon_has_no_guest(tmp_path: Path) -> None:
    path = tmp_path / "qsd"
    with storage_daemon(path):
        result = attempt(str(path))
    assert result.status in (1, 4)
    assert "qemu-storage-daemon" in result.error["remedy"]


def test_preconfig_has_no_guest(start_qemu: StartQemu) -> None:
    qemu = start_qemu("-m", "64M", "-preconfig")
    result = attempt(qemu.qmp)
    assert result.status in (1, 4)
    assert "x-exit-preconfig" in result.error["remedy"]


# --- hidden processes ---


@needs_root
@pytest.mark.parametrize(
    "options", ["hidepid=1", "hidepid=2", "hidepid=invisible", "hidepid=ptraceable", "subset=pid"]
)
@pytest.mark.parametrize(
    "command",
    [
        ("--populate-only",),
        pytest.param(("probe",), marks=pytest.mark.full),
        pytest.param(("map",), marks=pytest.mark.full),
    ],
)
def test_hidden_proc_is_reported(
    start_qemu: StartQemu, tmp_path: Path, options: str, command: tuple[str, ...]
) -> None:
    """Check that the tool reports a /proc that hides QEMU.

    systemd's ProtectProc= hides other users' processes. ProcSubset= hides /proc/meminfo.
    """
    vm = start_vm(start_qemu, tmp_path, "-m", "64M", paused=False)
    path = Path(vm.qemu.qmp)
    path.chmod(0o666)
    for directory in list(path.parents)[:-1]:
        directory.chmod(directory.stat().st_mode | 0o011)
    uid = 0 if options == "subset=pid" else 65534
    child = os.fork()
    if child == 0:
        status = 99
        try:
            unshare_mounts()
            subprocess.run(["mount", "-t", "proc", "-o", options, "proc", "/proc"], check=True)
            result = Tool([*command, "--json", "--qmp", str(path)], uid=uid or None).finish()
            (tmp_path / "stdout").write_text(result.stdout)
            status = result.status
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = (tmp_path / "stdout").read_text()
    result = Result(status, text, "")
    assert vm.qmp.status() == "running" and leftovers(vm.pid) == []
    if uid == 0:
        assert status in (0, 4), text
        return
    assert status == 4, text
    assert "is gone" not in text and "has exited" not in text
    if command[0] != "probe":
        assert result.error["remedy"]
        if options != "hidepid=1":  # with hidepid=1, /proc still lists the process
            assert "hidepid" in result.error["remedy"]


def unshare_mounts() -> None:
    """Enter a new mount namespace with private mounts."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS; os.unshare() needs Python 3.12
        raise OSError("unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


# --- libvirt ---


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_reported(encoding: str) -> None:
    """Check that XML in UTF-16, the encoding of PowerShell's ``>``, is refused."""
    xml = "<domain type='kvm'><name>a</name><memory>1</memory></domain>".encode(encoding)
    command = [sys.executable, "-m", "qemu_prefault", "libvirt", "enable", "-", "--plugin", "/x.so"]
    done = subprocess.run(command, input=xml, capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""
    assert b"not in UTF-8" in done.stderr and b"iconv" in done.stderr
