# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process with a guest, its monitors and its serial line.

This module runs on the machine with KVM. The subclasses :class:`.guest.Guest` and
:class:`.system.SystemGuest` define the guest's software and control it over the serial line. Each
QEMU has two monitors. The monitor at ``qmp_path`` is for the tool under test. The lab uses the
other monitor, so that it can observe QEMU while the tool is connected.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qemu_prefault.agents.plugin import plugin_path

from .errors import GuestError, QmpError
from .qmp import Qmp
from .serial import Serial

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


@dataclass(frozen=True, kw_only=True)
class QemuConfig(abc.ABC):
    """The options common to all kinds of guests.

    :ivar machine: ``pc``, ``q35`` or ``microvm``, optionally with more properties after a comma.
    :ivar backing: ``ram``, ``memfd``, ``file``, ``file-private`` or ``hugetlb``, optionally with
        more properties after a comma (``ram,prealloc=on``). None means that QEMU gets only ``-m``
        and no memory backend.
    :ivar memory: More suboptions for ``-m``, such as ``slots=2,maxmem=2G``.
    :ivar paused: Start with ``-S``, so that the run state is ``prelaunch`` and no vCPU runs.
    :ivar incoming: A URI, ``defer``, or the path of a file written by :meth:`QemuGuest.save`.
    :ivar args: More arguments for QEMU.
    :ivar plugin: Options for this project's plugin (``["keep=off"]``). None means that QEMU does
        not load the plugin.
    """

    machine: str = "pc"
    memory_mib: int = 384
    memory: str = ""
    smp: int = 1
    backing: str | None = "ram"
    paused: bool = False
    incoming: str | Path | None = None
    args: Sequence[str] = ()
    plugin: Sequence[str] | None = None

    @abc.abstractmethod
    def argv(self, directory: Path) -> list[str]:
        """Return QEMU's command line without the arguments common to all guests.

        :param directory: The directory in which this method creates files for QEMU.
        """

    @property
    def memory_argument(self) -> str:
        """The argument of QEMU's ``-m`` option."""
        return f"{self.memory_mib}M" + (f",{self.memory}" if self.memory else "")

    def backing_arguments(self, directory: Path) -> list[str]:
        """Return the ``-object`` arguments of the memory backend, or an empty list."""
        if self.backing is None:
            return []
        kind, _, properties = self.backing.partition(",")
        text = _BACKINGS[kind].format(directory=directory / "memory")
        text += f",id=ram,size={self.memory_mib}M" + (f",{properties}" if properties else "")
        return ["-object", text]

    def flash_arguments(self, directory: Path) -> list[str]:
        """Copy UEFI's variable store and return the arguments with which QEMU boots UEFI."""
        smm = "smm=off" not in self.machine
        variables = directory / "variables"
        shutil.copy(_OVMF_VARIABLES, variables)
        flash = "if=pflash,format=raw"
        return [
            *("-drive", f"{flash},unit=0,readonly=on,file={_OVMF_SMM_CODE if smm else _OVMF_CODE}"),
            *("-drive", f"{flash},unit=1,file={variables}"),
            *("-global", f"driver=cfi.pflash01,property=secure,value={'on' if smm else 'off'}"),
        ]

    def plugin_arguments(self, directory: Path) -> list[str]:
        """Return the ``-plugin`` arguments, or an empty list if no plugin is configured."""
        if self.plugin is None:
            return []
        return ["-plugin", f"{plugin_path()},{plugin_options(directory, self.plugin)}"]


def plugin_options(directory: Path, options: Sequence[str]) -> str:
    """Return options in the format of ``-plugin`` and ``QEMU_PREFAULT_OPTIONS``."""
    return ",".join([f"socket={_control_path(directory)}", *options])


def _control_path(directory: Path) -> Path:
    return directory / "control"


def process_seconds() -> dict[str, float]:
    """Return the CPU time in seconds of each process, by its pid and name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            fields = rest.split()
            ticks = int(fields[11]) + int(fields[12])
            found[name.replace(" (", " ")] = ticks / os.sysconf("SC_CLK_TCK")
    return found


class QemuGuest:
    """A QEMU with a guest.

    Leaving the context kills QEMU.

    :ivar pid: QEMU's process id.
    :ivar qmp_path: The socket of the monitor for the tool under test. The lab does not use this
        monitor.
    :ivar control_path: The plugin's control socket.
    """

    def __init__(self, config: QemuConfig) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="l2-")
        self.directory = Path(self._scratch.name)
        self.qmp_path = self.directory / "qmp"
        self.control_path = _control_path(self.directory)
        self._stderr_path = self.directory / "stderr"
        argv = config.argv(self.directory)
        if config.paused:
            argv.append("-S")
        incoming = config.incoming
        if incoming is not None:
            argv += ["-incoming", "defer" if isinstance(incoming, Path) else incoming]
        self._start([*argv, *config.args])
        try:
            # The lab detects failed migrations and restores from events, without polling.
            self.qmp(
                "migrate-set-capabilities",
                capabilities=[{"capability": "events", "state": True}],
            )
            if isinstance(incoming, Path):
                self._migrate("migrate-incoming", incoming)
        except BaseException:
            self.kill()
            raise

    def _start(self, argv: list[str]) -> None:
        # The serial line and the lab's monitor are socket pairs, which are connected when QEMU
        # starts. QEMU itself binds the tool's monitor, because tests check the socket's peer
        # credentials.
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
        self._serial = Serial(serial, self._make_error, self._pidfd)
        try:
            self.monitor = Qmp(monitor, timeout=60.0)
        except QmpError as error:
            problem = self._make_error(f"QEMU did not start: {error.cause}")
            self.kill()
            raise problem from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # The process.

    @property
    def stderr(self) -> str:
        """The output that QEMU has written to stdout and stderr so far."""
        return self._stderr_path.read_text(errors="replace")

    @property
    def serial_log(self) -> bytes:
        """The output that the guest has written to its serial line so far."""
        return self._serial.log

    @property
    def alive(self) -> bool:
        """Whether QEMU is running."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill QEMU and remove its files.

        Further calls have no effect.
        """
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
        """Wait until QEMU exits on its own, and return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._make_error(f"QEMU did not exit within {timeout:g} s") from None

    def _make_error(self, cause: str) -> GuestError:
        try:
            # When QEMU exits, the kernel closes the sockets before the process can be reaped.
            code: int | None = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        state = "is still running" if code is None else f"exited with {code}"
        serial = self.serial_log.decode(errors="replace").replace("\r", "")[-2000:]
        stderr = self.stderr if self._stderr_path.exists() else ""
        text = f"QEMU {state}; stderr: {stderr.strip()!r}\nserial: {serial!r}"
        if code is None and hasattr(self, "monitor"):
            text += f"\n{self._activity()}"
        return GuestError(cause, text)

    def _activity(self, seconds: float = 2.0) -> str:
        """Return what the guest, QEMU and this machine did in an interval, to diagnose a hang."""
        text = []
        try:
            before, registers = self.stats(), self.hmp("info registers")
            used = process_seconds()
            time.sleep(seconds)
            changes = {k: v - before.get(k, 0) for k, v in self.stats().items()}
            text.append(f"KVM in {seconds:g} s: { {k: v for k, v in changes.items() if v} }")
            for report in (registers, self.hmp("info registers")):
                text.append(" ".join(re.findall(r"[ER]IP=\S+|HLT=\d", report)))
            interrupts = [*self.hmp("info pic").splitlines(), *self.hmp("info lapic").splitlines()]
            text += [line for line in interrupts if line.strip() and "masked" not in line]
            busy = {name: now - used.get(name, now) for name, now in process_seconds().items()}
            most = sorted(busy.items(), key=lambda item: -item[1])[:5]
            text.append(f"CPU seconds: { {name: round(value, 2) for name, value in most} }")
            text.append(Path("/proc/loadavg").read_text() + Path("/proc/meminfo").read_text()[:90])
        except (QmpError, OSError, ValueError) as error:
            text.append(f"the rest is unknown: {error}")
        return "\n".join(text).replace("\r", "")

    # The monitor.

    def qmp(self, command: str, timeout: float = 60.0, **arguments: Any) -> Any:
        """Run a QMP command on the lab's own monitor."""
        try:
            return self.monitor.execute(command, timeout, **arguments)
        except QmpError as error:
            if not self.alive:
                raise self._make_error(f"QEMU exited: {error.cause}") from error
            raise

    def hmp(self, line: str) -> str:
        """Run a human monitor command and return its output."""
        text: str = self.qmp("human-monitor-command", command_line=line)
        return text

    def status(self) -> str:
        """Return QEMU's run state, such as ``running``, ``paused`` or ``prelaunch``."""
        text: str = self.qmp("query-status")["status"]
        return text

    def wait_event(self, *names: str, timeout: float = 60.0) -> dict[str, Any]:
        """Wait for an event with one of these names, and return it.

        If such events have arrived already, return the first one.
        """
        return self.monitor.wait_event(*names, timeout=timeout)

    def save(self, path: Path, timeout: float = 120.0) -> None:
        """Stop the guest and write its state to a file, for ``Guest(incoming=path)``.

        This method raises QEMU's migration bandwidth limit, because the default is meant for
        networks.
        """
        self.qmp("stop")
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        path.touch()
        self._migrate("migrate", path)
        self._wait_migration(timeout, "save")

    def wait_restored(self, timeout: float = 120.0) -> None:
        """Wait until an incoming state is loaded.

        The guest's run state is then ``paused``, as when :meth:`save` saved the guest. The ``cont``
        command resumes the guest.
        """
        self._wait_migration(timeout, "restore")

    def _migrate(self, command: str, path: Path) -> None:
        # QEMU before 8.2 does not support "file:". QEMU 9.1 deprecated "fd:" for files. A pipe
        # works with all releases, but takes more than twice as long under TCG.
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
                raise self._make_error(f"{what} failed: {error.cause}") from error
            status = event["data"]["status"]
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise self._make_error(f"{what} {status}")

    def stats(self) -> dict[str, int]:
        """Return KVM's VM counters, and the sums of the per-vCPU counters.

        ``pages_4k``, ``pages_2m`` and ``pages_1g`` count the present entries in the stage-2 tables.
        ``pf_taken`` and the other event counters start at 0 when the guest is created.
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
        """Send one request to the plugin's control socket, and return the response."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(timeout)
            client.connect(str(self.control_path))
            client.sendall(request.encode() + b"\n")
            answer: dict[str, Any] = json.loads(client.makefile().readline())
        return answer
