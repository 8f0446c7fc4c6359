# SPDX-License-Identifier: GPL-2.0-or-later
"""L2 guests: the stock QEMUs the tool is tried on. Runs where the KVM is, usually in L1.

A guest boots a distribution kernel whose only process is ``workload.c``, spoken to over
its serial line. Its QEMU has two monitors: ``qmp_path`` is for the tool under test, the
other belongs to this class, so that each can be watched while the other is in use.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_prefault.agents.plugin import plugin_path

from .errors import GuestError, QmpError
from .qmp import Qmp
from .serial import Answer, Serial

L2_VARIABLE = "QEMU_PREFAULT_L2"
"""Environment variable naming the directory of the L2 kernel and initramfs."""
PATCHED_QEMU_VARIABLE = "QEMU_PREFAULT_QEMU"
"""Environment variable naming the patched QEMU, where there is one."""
FIRMWARE = ("/usr/share/seabios", "/usr/share/qemu")
"""Where Debian has what QEMU loads into the guest: the patched QEMU brings none."""

# No calibration, no mitigations, no address randomization: less to emulate. And no errors of
# drivers amid the workload's answers; an oops shows all the same.
KERNEL_ARGS = (
    "console=ttyS0 loglevel=3 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check "
    "audit=0 cryptomgr.notests random.trust_cpu=on nowatchdog "
    # Drivers that wait for hardware microvm does not have: a clock (4 s), a keyboard.
    "initcall_blacklist=cmos_init,i8042_init"
)
_BACKINGS = {
    "ram": "memory-backend-ram",
    "memfd": "memory-backend-memfd",
    "file": "memory-backend-file,share=on,mem-path={directory}",
    "file-private": "memory-backend-file,share=off,mem-path={directory}",
    "hugetlb": "memory-backend-memfd,hugetlb=on,hugetlbsize=2M",
}
_OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
_OVMF_SMM_CODE = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
_OVMF_VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def l2_directory() -> Path:
    """Where the L2 kernel and initramfs are on this machine."""
    return Path(os.environ.get(L2_VARIABLE, "/lab/l2"))


def thp(mode: str) -> str:
    """Set transparent huge pages to ``always``, ``madvise`` or ``never``; give the old mode."""
    before = _THP.read_text().partition("[")[2].partition("]")[0]
    _THP.write_text(mode)
    return before


def reserve_hugepages(count: int) -> int:
    """Set the number of 2 MiB hugetlb pages; give the number the kernel could reserve."""
    _HUGEPAGES.write_text(str(count))
    return int(_HUGEPAGES.read_text())


@dataclass
class Defaults:
    """How guests are started where it is not said: by which QEMU, with which plugin options."""

    qemu: Sequence[str] = ("qemu-system-x86_64",)
    plugin: Sequence[str] | None = None


defaults = Defaults()


def patched_qemu() -> list[str] | None:
    """The command of the patched QEMU, if it was put here: see ``lab/patched.py``."""
    binary = os.environ.get(PATCHED_QEMU_VARIABLE)
    return None if binary is None else [binary, *(w for p in FIRMWARE for w in ("-L", p))]


class Guest:
    """A QEMU with one L2 guest. A context manager; leaving it kills QEMU.

    :param machine: ``pc``, ``q35`` or ``microvm``, and further properties after a comma.
    :param accel: ``kvm`` or ``tcg``.
    :param backing: a key of ``ram``, ``memfd``, ``file``, ``file-private``, ``hugetlb``,
        and further properties after a comma (``ram,prealloc=on``); None is a plain ``-m``.
    :param memory: the ``-m`` argument's further parts (``slots=2,maxmem=2G``).
    :param paused: start with ``-S``: status is ``prelaunch``, nothing has run.
    :param incoming: a URI, ``defer``, or the path of a file written by :meth:`save`.
    :param workload_mib: MiB the guest allocates and writes before it is ready.
    :param args: further arguments for QEMU.
    :param kvm: give the guest a KVM of its own, for the workload's ``nest``.
    :param ovmf: UEFI instead of the machine's own firmware, for ``q35`` (the build that keeps
        its variables by SMM) and ``q35,smm=off``; the kernel has to be ``vmlinuz``.
    :param qemu: QEMU's command and its first arguments; None: see :data:`defaults`.
    :param plugin: options of our plugin (``["keep=off"]``), to have it loaded; None likewise.
    :param preload: load it by ``LD_PRELOAD`` and not by ``-plugin``.
    :param wrapper: a command QEMU is run under, such as ``["env", "LD_PRELOAD=…"]``.
    :ivar pid: QEMU's process id.
    :ivar qmp_path: the monitor nobody uses, for the tool under test.
    :ivar control_path: the plugin's control socket.
    """

    def __init__(
        self,
        *,
        machine: str = "pc",
        accel: str = "kvm",
        memory_mib: int = 384,
        memory: str = "",
        smp: int = 1,
        cpu: str | None = None,
        backing: str | None = "ram",
        paused: bool = False,
        incoming: str | Path | None = None,
        workload_mib: int = 0,
        kernel: str = "vmlinux",
        kernel_args: str = "",
        args: Sequence[str] = (),
        qemu: Sequence[str] | None = None,
        kvm: bool = False,
        ovmf: bool = False,
        plugin: Sequence[str] | None = None,
        preload: bool = False,
        wrapper: Sequence[str] = (),
    ) -> None:
        self._prepare()
        load: list[str] = []
        plugin = defaults.plugin if plugin is None else plugin
        if plugin is not None:
            options = ",".join([f"socket={self.control_path}", *plugin])
            if preload:
                wrapper = [*wrapper, "env", f"LD_PRELOAD={plugin_path()}"]
                wrapper += [f"QEMU_PREFAULT_OPTIONS={options}"]
            else:
                load = ["-plugin", f"{plugin_path()},{options}"]
        machine_argument = machine
        memory_argument = f"{memory_mib}M" + (f",{memory}" if memory else "")
        argv = [
            *wrapper,
            *(qemu or defaults.qemu),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]
        argv += load
        if backing is not None:
            argv += self._backing(backing, memory_mib)
            machine_argument += ",memory-backend=ram"
        if ovmf:
            argv += self._flash(machine)
        argv += ["-machine", machine_argument, "-accel", accel, "-m", memory_argument]
        argv += ["-smp", str(smp)]
        if cpu or accel.partition(",")[0] == "kvm":
            argv += ["-cpu", cpu or "host"]
        files = l2_directory()
        append = KERNEL_ARGS + (f" workload.mib={workload_mib}" if workload_mib else "")
        initramfs = files / ("initramfs-kvm" if kvm else "initramfs")
        argv += ["-kernel", str(files / kernel), "-initrd", str(initramfs)]
        argv += ["-append", f"{append} {kernel_args}".strip()]
        self._launch(argv, paused, incoming, args)

    def _prepare(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="l2-")
        self.directory = Path(self._scratch.name)
        self.qmp_path = self.directory / "qmp"
        self.control_path = self.directory / "control"
        self._stderr_path = self.directory / "stderr"

    def _backing(self, backing: str, memory_mib: int) -> list[str]:
        kind, _, properties = backing.partition(",")
        text = _BACKINGS[kind].format(directory=self.directory / "memory")
        text += f",id=ram,size={memory_mib}M" + (f",{properties}" if properties else "")
        return ["-object", text]

    def _launch(
        self, argv: list[str], paused: bool, incoming: str | Path | None, args: Sequence[str]
    ) -> None:
        if paused:
            argv.append("-S")
        if incoming is not None:
            argv += ["-incoming", "defer" if isinstance(incoming, Path) else incoming]
        self._start([*argv, *args])
        try:
            # Failed migrations and restores are told by events, not found by asking again.
            self.qmp(
                "migrate-set-capabilities",
                capabilities=[{"capability": "events", "state": True}],
            )
            if isinstance(incoming, Path):
                self._migrate("migrate-incoming", incoming)
        except BaseException:
            self.kill()
            raise

    def _flash(self, machine: str) -> list[str]:
        smm = "smm=off" not in machine
        variables = self.directory / "variables"
        shutil.copy(_OVMF_VARIABLES, variables)
        flash = "if=pflash,format=raw"
        return [
            *("-drive", f"{flash},unit=0,readonly=on,file={_OVMF_SMM_CODE if smm else _OVMF_CODE}"),
            *("-drive", f"{flash},unit=1,file={variables}"),
            *("-global", f"driver=cfi.pflash01,property=secure,value={'on' if smm else 'off'}"),
        ]

    def _start(self, argv: list[str]) -> None:
        # The harness's ends are socket pairs: nothing to wait for. The tool's monitor is
        # bound by QEMU itself, because its peer credentials are part of what is tested.
        serial, serial_far = socket.socketpair()
        monitor, monitor_far = socket.socketpair()
        argv = [
            *argv,
            *("-chardev", f"socket,id=serial,fd={serial_far.fileno()}", "-serial"),
            *("chardev:serial", "-chardev", f"socket,id=harness,fd={monitor_far.fileno()}"),
            *("-mon", "harness,mode=control"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
        ]
        self.argv = argv
        try:
            with self._stderr_path.open("wb") as stderr:
                self.process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    pass_fds=(serial_far.fileno(), monitor_far.fileno()),
                )
        except BaseException:
            self._scratch.cleanup()
            raise
        finally:
            serial_far.close()
            monitor_far.close()
        self.pid = self.process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._serial = Serial(serial, self._problem, self._pidfd)
        try:
            self.monitor = Qmp(monitor, timeout=60.0)
        except QmpError as error:
            problem = self._problem(f"QEMU did not start: {error.cause}")
            self.kill()
            raise problem from error

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # The process.

    @property
    def stderr(self) -> str:
        """What QEMU has said on stdout and stderr."""
        return self._stderr_path.read_text(errors="replace")

    @property
    def serial_log(self) -> bytes:
        """All that the guest has sent on its serial line."""
        return self._serial.log

    @property
    def alive(self) -> bool:
        """Whether QEMU is running."""
        return self.process.poll() is None

    def check_alive(self) -> None:
        """Raise unless QEMU is running."""
        if not self.alive:
            raise self._problem("QEMU ended")

    def kill(self) -> None:
        """Kill QEMU and remove its files; harmless when repeated."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            self._serial.close()
            if hasattr(self, "monitor"):
                self.monitor.close()
            self._scratch.cleanup()

    def wait_exit(self, timeout: float = 60.0) -> int:
        """Wait for QEMU to end by itself; give its return code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._problem(f"QEMU did not end within {timeout:g} s") from None

    def _problem(self, what: str) -> GuestError:
        try:
            # A QEMU that is about to end closes its sockets first.
            code: int | None = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        state = "is still running" if code is None else f"ended with {code}"
        serial = self.serial_log.decode(errors="replace").replace("\r", "")[-2000:]
        stderr = self.stderr if self._stderr_path.exists() else ""
        return GuestError(what, f"QEMU {state}; stderr: {stderr.strip()!r}\nserial: {serial!r}")

    # The monitor.

    def qmp(self, command: str, timeout: float = 60.0, **arguments: Any) -> Any:
        """Run a QMP command on the harness's own monitor."""
        try:
            return self.monitor.execute(command, timeout, **arguments)
        except QmpError as error:
            if not self.alive:
                raise self._problem(f"QEMU ended: {error.cause}") from error
            raise

    def hmp(self, line: str) -> str:
        """Run a human monitor command."""
        text: str = self.qmp("human-monitor-command", command_line=line)
        return text

    def status(self) -> str:
        """Give the run state: ``running``, ``paused``, ``prelaunch``, ``inmigrate``…"""
        text: str = self.qmp("query-status")["status"]
        return text

    def wait_event(self, *names: str, timeout: float = 60.0) -> dict[str, Any]:
        """Take the first event of one of these names."""
        return self.monitor.wait_event(*names, timeout=timeout)

    def save(self, path: Path, timeout: float = 120.0) -> None:
        """Stop the guest and write its state to a file, for ``Guest(incoming=path)``.

        The default bandwidth limit of a migration is that of a network.
        """
        self.qmp("stop")
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        path.touch()
        self._migrate("migrate", path)
        self._wait_migration(timeout, "save")

    def wait_restored(self, timeout: float = 120.0) -> None:
        """Wait until an incoming state is loaded; the guest is ``paused`` as :meth:`save`
        left it, and ``cont`` makes it go on."""
        self._wait_migration(timeout, "restore")

    def _migrate(self, command: str, path: Path) -> None:
        # QEMU before 8.2 has no "file:", and newer ones refuse a file as "fd:". A pipe
        # works with all and takes more than twice as long under TCG.
        try:
            self.qmp(command, uri=f"file:{path}")
        except QmpError:
            with path.open("r+b") as state:
                self.monitor.send_fd("state", state.fileno())
            self.qmp(command, uri="fd:state")

    def _wait_migration(self, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                event = self.wait_event("MIGRATION", timeout=deadline - time.monotonic())
            except QmpError as error:
                raise self._problem(f"{what} failed: {error.cause}") from error
            status = event["data"]["status"]
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise self._problem(f"{what} {status}")

    def stats(self) -> dict[str, int]:
        """Give KVM's counters: those of the VM, and those of the vCPUs summed up.

        ``pages_4k``, ``pages_2m``, ``pages_1g`` are entries now in the stage-2 tables;
        ``pf_taken`` and its like count since the guest was started.
        """
        totals: dict[str, int] = {}
        for target in ("vm", "vcpu"):
            for provider in self.qmp("query-stats", target=target):
                for stat in provider["stats"]:
                    if isinstance(stat["value"], int):
                        name = stat["name"].replace("-", "_")
                        totals[name] = totals.get(name, 0) + int(stat["value"])
        return totals

    # The plugin.

    def control(self, request: str, timeout: float = 30.0) -> dict[str, Any]:
        """Send one request to the plugin's control socket, on a connection of its own."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(timeout)
            client.connect(str(self.control_path))
            client.sendall(request.encode() + b"\n")
            answer: dict[str, Any] = json.loads(client.makefile().readline())
        return answer

    def wait_kept(self, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the plugin has nothing left to do in a running guest; give its status."""
        deadline = time.monotonic() + timeout
        while (status := self.control("status"))["pending"]:
            if time.monotonic() > deadline:
                raise self._problem(f"the plugin is not done within {timeout:g} s: {status}")
            self.command("echo idle")
        return status

    # The guest.

    def reset(self) -> None:
        """Press the reset button; what the guest has said before is forgotten.

        For guests started with ``-action reboot=reset``.
        """
        self.qmp("system_reset")
        while self.wait_event("RESET")["data"]["reason"] != "host-qmp-system-reset":
            pass
        # No vCPU ran when that was sent, so all of the last boot's output is here.
        self._serial.forget()

    def wait_ready(self, timeout: float = 240.0) -> Answer:
        """Wait for a booting guest's ``ready``; ``uptime`` is its age in seconds then."""
        return self._serial.answer("ready", timeout)

    def command(self, line: str, timeout: float = 120.0) -> Answer:
        """Send a command of ``workload.c`` and give the values of its answer."""
        return self._serial.command(line, timeout)
