# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that are whole distributions (:mod:`qemu_prefault_lab.distro`), and their console.

Where the KVM is, a directory named by ``QEMU_PREFAULT_DISTROS`` has for each distribution a
directory with ``disk`` (a file or a block device, never written to) and ``boot/``.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .distro import PASSWORD
from .errors import GuestError
from .guest import KERNEL_ARGS
from .qemu_guest import QemuConfig, QemuGuest

DISTROS_VARIABLE = "QEMU_PREFAULT_DISTROS"
"""Environment variable naming the directory of the distributions."""

# A CPU that is away for long is the emulating host's doing, and no stall; nor is a service stuck.
GUEST_KERNEL_ARGS = (
    f"{KERNEL_ARGS} root=/dev/vda rw rcupdate.rcu_cpu_stall_suppress=1 systemd.service_watchdogs=0 "
    # TCG has XSETBV pass KVM by: CPUID keeps telling the old size of the state, and Linux warns.
    "noxsave "
    # A plugged DIMM is used at once, and by what can be moved: files in memory.
    "memhp_default_state=online_movable"
)


def distro_directory(name: str) -> Path:
    """Where a distribution's disk and boot files are on this machine."""
    return Path(os.environ.get(DISTROS_VARIABLE, "/lab/distros")) / name


def make_overlay(disk: Path, overlay: Path, disk_format: str = "raw") -> None:
    """Make the qcow2 file that takes what a guest writes to its disk."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", disk_format, "-b", str(disk.resolve()),
         str(overlay)],
        check=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SystemConfig(QemuConfig):
    """How a whole distribution is started.

    :ivar distro: a directory name below :data:`DISTROS_VARIABLE`, whose kernel is started; None:
        whatever the firmware finds on the disk.
    :ivar overlay: of :func:`make_overlay`; a migration's two guests, and a saved guest and
        its restored one, have it in common.
    :ivar firmware: ``seabios`` or ``ovmf`` (for ``q35``).
    """

    distro: str | None
    overlay: Path
    memory_mib: int = 512
    firmware: str = "seabios"

    def argv(self, directory: Path) -> list[str]:
        microvm = self.machine.partition(",")[0] == "microvm"
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        argv += self.plugin_arguments(directory)
        argv += self.backing_arguments(directory)
        argv += self.flash_arguments(directory) if self.firmware == "ovmf" else []
        argv += ["-machine", f"{self.machine},memory-backend=ram", "-accel", "kvm", "-cpu", "host"]
        argv += ["-m", self.memory_argument, "-smp", str(self.smp)]
        if self.distro is not None:
            boot = distro_directory(self.distro) / "boot"
            # microvm's firmware starts only what needs no decompressing.
            argv += ["-kernel", str(boot / ("vmlinux" if microvm else "vmlinuz"))]
            argv += ["-initrd", str(boot / "initrd"), "-append", GUEST_KERNEL_ARGS]
        argv += ["-drive", f"file={self.overlay},format=qcow2,if=none,id=disk,cache=unsafe"]
        argv += ["-device", f"virtio-blk-{'device' if microvm else 'pci'},drive=disk"]
        return argv


class SystemGuest(QemuGuest):
    """A QEMU with a whole distribution in it, spoken to at its serial console.

    :param changes: the other fields of its :class:`SystemConfig`.
    """

    def __init__(self, distro: str | None, overlay: Path, **changes: Any) -> None:
        self._commands = 0
        super().__init__(SystemConfig(distro=distro, overlay=overlay, **changes))

    # The console.

    def expect(self, pattern: str, timeout: float) -> re.Match[bytes]:
        """Wait for the console to show this; what it showed up to its end is forgotten."""
        return self._serial.expect(pattern, timeout)

    def type(self, text: str) -> None:
        """Send text to the console."""
        self._serial.send(text)

    def wait_login(self, timeout: float = 900.0) -> None:
        """Wait until a booting guest asks who is there."""
        self.expect(r"login: ", timeout)

    def log_in(self, timeout: float = 300.0) -> None:
        """Log in as root at the prompt of :meth:`wait_login`, for :meth:`shell`."""
        self.type("root\n")
        self.expect(r"Password: ", timeout)
        self.type(f"{PASSWORD}\n")
        self.expect(r"# ", timeout)
        # A shell that prints answers, and nothing else. Quoted, so as not to match itself.
        self.type("stty -echo; exec env PS1= PS2= sh\n")
        self.type("echo '@''ready@'\n")
        self.expect("@ready@", timeout)

    def shell(self, command: str, timeout: float = 300.0, check: bool = True) -> str:
        """Run a command in the shell of :meth:`log_in`; give what it printed.

        :raise GuestError: it failed, and ``check`` is set; or it did not end in time.
        """
        self._commands += 1
        mark = f"@{self._commands}"
        self._serial.forget()
        self.type(f"{{ {command}\n}} 2>&1; printf '\\n%s:%d@\\n' {mark} $?\n")
        found = self.expect(rf"(?s)\A(.*)\n{mark}:(\d+)@\r?\n", timeout)
        output = found[1].decode(errors="replace").replace("\r", "").strip()
        if check and int(found[2]):
            raise GuestError(f"in the guest: {command!r} ended with {int(found[2])}", output)
        return output

    # Its state.

    def reboot(self, timeout: float = 900.0) -> None:
        """Have the system of :meth:`shell` reboot; return at the reset."""
        self.type("systemctl reboot\n")
        # Read all the while: a console that nobody reads soon blocks who writes to it.
        self.expect("reboot: Restarting system", timeout)
        self.wait_event("RESET", timeout=timeout)

    def wait_migrated(self, timeout: float = 600.0) -> None:
        """Wait until all of this guest has been sent."""
        self._wait_migration(timeout, "migration")

    def wait_running(self, timeout: float = 600.0) -> None:
        """Wait until an incoming guest runs."""
        if self.status() != "running":
            self.wait_event("RESUME", timeout=timeout)

    def fill(self, name: str, mib: int, timeout: float = 600.0) -> None:
        """Write a file in the guest's memory, in which no two pages are the same."""
        size = mib << 20
        numbers = f"seq 10000001 {10000001 + size // len('10000001.')}"
        self.shell(f"{numbers} | head -c {size} >/dev/shm/{name}; "
                   f"[ $(stat -c %s /dev/shm/{name}) = {size} ]", timeout)  # fmt: skip

    def checksum(self, name: str, timeout: float = 600.0) -> str:
        """Read all of a file of :meth:`fill`; give its checksum."""
        return self.shell(f"sha256sum </dev/shm/{name}", timeout).split()[0]
