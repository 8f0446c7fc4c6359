# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that run whole distributions, and their consoles.

:mod:`qemu_prefault_lab.distro` builds the distributions. On the machine with KVM, the
``QEMU_PREFAULT_DISTROS`` variable names a directory with one subdirectory per distribution. Each
subdirectory contains ``disk`` and ``boot/``. The disk is a file or a block device. Guests never
write to the disk.
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

#: The environment variable that names the directory with the distributions.
DISTROS_VARIABLE = "QEMU_PREFAULT_DISTROS"

# Disable RCU's stall detector and systemd's service watchdogs, because emulation can delay CPUs for
# a long time.
GUEST_KERNEL_ARGS = (
    f"{KERNEL_ARGS} root=/dev/vda rw rcupdate.rcu_cpu_stall_suppress=1 systemd.service_watchdogs=0 "
    # TCG does not intercept XSETBV for KVM, so CPUID reports a stale XSAVE size and Linux warns.
    "noxsave "
    # Online a plugged DIMM's memory automatically, as movable memory.
    "memhp_default_state=online_movable"
)


def distro_directory(name: str) -> Path:
    """Return the directory with a distribution's disk and boot files on this machine."""
    return Path(os.environ.get(DISTROS_VARIABLE, "/lab/distros")) / name


def make_overlay(disk: Path, overlay: Path, disk_format: str = "raw") -> None:
    """Create the qcow2 overlay that holds a guest's writes to its disk."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", disk_format, "-b", str(disk.resolve()),
         str(overlay)],
        check=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SystemConfig(QemuConfig):
    """The configuration of a guest that runs a whole distribution.

    :ivar distro: The name of a distribution's subdirectory in the directory that
        :data:`DISTROS_VARIABLE` names. QEMU boots the distribution's kernel. None means that the
        firmware boots from the disk.
    :ivar overlay: A file that :func:`make_overlay` has created. The source and the destination of a
        migration share one overlay, and so do a saved guest and the guest restored from it.
    :ivar firmware: ``seabios`` or, with ``q35`` only, ``ovmf``.
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
            # microvm's firmware can start only an uncompressed kernel.
            argv += ["-kernel", str(boot / ("vmlinux" if microvm else "vmlinuz"))]
            argv += ["-initrd", str(boot / "initrd"), "-append", GUEST_KERNEL_ARGS]
        argv += ["-drive", f"file={self.overlay},format=qcow2,if=none,id=disk,cache=unsafe"]
        argv += ["-device", f"virtio-blk-{'device' if microvm else 'pci'},drive=disk"]
        return argv


class SystemGuest(QemuGuest):
    """A QEMU that runs a whole distribution, controlled through its serial console.

    :param distro: See :class:`SystemConfig`.
    :param overlay: See :class:`SystemConfig`.
    :param changes: More fields of :class:`SystemConfig`.
    """

    def __init__(self, distro: str | None, overlay: Path, **changes: Any) -> None:
        self._commands = 0
        super().__init__(SystemConfig(distro=distro, overlay=overlay, **changes))

    # The console.

    def expect(self, pattern: str, timeout: float) -> re.Match[bytes]:
        """Wait until the output matches a pattern, and return the match.

        This method discards the output up to the end of the match.
        """
        return self._serial.expect(pattern, timeout)

    def type(self, text: str) -> None:
        """Send text to the console."""
        self._serial.send(text)

    def wait_login(self, timeout: float = 900.0) -> None:
        """Wait until a booting guest shows its login prompt."""
        self.expect(r"login: ", timeout)

    def log_in(self, timeout: float = 900.0) -> None:
        """Log in as root at the login prompt, and start the shell for :meth:`shell`."""
        self.type("root\n")
        self.expect(r"Password: ", timeout)
        self.type(f"{PASSWORD}\n")
        self.expect(r"# ", timeout)
        # Start a shell without echo and prompts. The quotes make the echo of the command differ
        # from its output, because expect() must match only the output.
        self.type("stty -echo; exec env PS1= PS2= sh\n")
        self.type("echo '@''ready@'\n")
        self.expect("@ready@", timeout)

    def shell(self, command: str, timeout: float = 900.0, check: bool = True) -> str:
        """Run a command in the shell of :meth:`log_in` and return its output.

        :raises GuestError: If the command failed and ``check`` is set, or if the command timed out.
        """
        self._commands += 1
        mark = f"@{self._commands}"
        self._serial.forget()
        self.type(f"{{ {command}\n}} 2>&1; printf '\\n%s:%d@\\n' {mark} $?\n")
        found = self.expect(rf"(?s)\A(.*)\n{mark}:(\d+)@\r?\n", timeout)
        output = found[1].decode(errors="replace").replace("\r", "").strip()
        if check and int(found[2]):
            raise GuestError(f"in the guest, {command!r} exited with {int(found[2])}", output)
        return output

    # The guest's state.

    def reboot(self, timeout: float = 900.0) -> None:
        """Reboot the guest and wait until QEMU has reset it."""
        self.type("systemctl reboot\n")
        # Read the console until the reset. If the socket's buffer filled up, the guest would block.
        self.expect("reboot: Restarting system", timeout)
        self.wait_event("RESET", timeout=timeout)

    def wait_migrated(self, timeout: float = 600.0) -> None:
        """Wait until the outgoing migration of this guest has completed."""
        self._wait_migration(timeout, "migration")

    def wait_running(self, timeout: float = 600.0) -> None:
        """Wait until an incoming guest runs."""
        if self.status() != "running":
            self.wait_event("RESUME", timeout=timeout)

    def fill(self, name: str, mib: int, timeout: float = 600.0) -> None:
        """Write a file with distinct pages to the guest's memory."""
        size = mib << 20
        numbers = f"seq 10000001 {10000001 + size // len('10000001.')}"
        self.shell(f"{numbers} | head -c {size} >/dev/shm/{name}; "
                   f"[ $(stat -c %s /dev/shm/{name}) = {size} ]", timeout)  # fmt: skip

    def checksum(self, name: str, timeout: float = 600.0) -> str:
        """Read the whole file that :meth:`fill` wrote, and return its checksum."""
        return self.shell(f"sha256sum </dev/shm/{name}", timeout).split()[0]
