# SPDX-License-Identifier: GPL-2.0-or-later
"""L2 guests, which are unmodified QEMUs on which the tests run the tool.

This module runs on the machine with KVM, which is usually L1. A guest boots a distribution kernel
whose only process is ``workload.c``. The lab controls the workload over the serial line.
:class:`.qemu_guest.QemuGuest` manages the QEMU process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qemu_prefault.agents.plugin import plugin_path
from qemu_prefault.host.kvm import paging

from .errors import GuestError
from .qemu_guest import QemuConfig, QemuGuest, plugin_options
from .serial import Answer

__all__ = [
    "FIRMWARE",
    "KERNEL_ARGS",
    "L2_VARIABLE",
    "PATCHED_QEMU_VARIABLE",
    "Defaults",
    "Guest",
    "GuestConfig",
    "GuestError",
    "defaults",
    "l2_directory",
    "mmu",
    "patched_qemu",
    "reserve_hugepages",
    "thp",
]

#: The environment variable that names the directory with the L2 kernel and initramfs.
L2_VARIABLE = "QEMU_PREFAULT_L2"
#: The environment variable with the path of the patched QEMU, if that QEMU is installed.
PATCHED_QEMU_VARIABLE = "QEMU_PREFAULT_QEMU"
#: Debian's firmware directories, for the patched QEMU, which is built without firmware.
FIRMWARE = ("/usr/share/seabios", "/usr/share/qemu")

# Skip calibration, mitigations and address randomization, which are slow to emulate. Log oopses but
# no driver errors, because driver errors would be interleaved with the workload's replies.
KERNEL_ARGS = (
    "console=ttyS0 loglevel=3 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check "
    "audit=0 cryptomgr.notests random.trust_cpu=on nowatchdog "
    # These initcalls would wait for devices that microvm does not have: a real-time clock (for 4 s)
    # and a keyboard controller.
    "initcall_blacklist=cmos_init,i8042_init"
)
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def l2_directory() -> Path:
    """Return the directory with the L2 kernel and initramfs on this machine."""
    return Path(os.environ.get(L2_VARIABLE, "/lab/l2"))


def thp(mode: str) -> str:
    """Set the mode of transparent huge pages, and return the previous mode.

    :param mode: ``always``, ``madvise`` or ``never``.
    """
    before = _THP.read_text().partition("[")[2].partition("]")[0]
    _THP.write_text(mode)
    return before


def mmu() -> str:
    """Return how this host's KVM translates guest addresses: ``ept``, ``npt`` or ``shadow``."""
    found = paging()
    return "shadow" if found is None else found.name.lower()


def reserve_hugepages(count: int) -> int:
    """Reserve 2 MiB hugetlb pages and return the number that the kernel has reserved."""
    _HUGEPAGES.write_text(str(count))
    return int(_HUGEPAGES.read_text())


@dataclass
class Defaults:
    """The default QEMU command and plugin options for guests."""

    qemu: Sequence[str] = ("qemu-system-x86_64",)
    plugin: Sequence[str] | None = None


defaults = Defaults()


def patched_qemu() -> list[str] | None:
    """Return the command of the patched QEMU, or None if no such QEMU is installed."""
    binary = os.environ.get(PATCHED_QEMU_VARIABLE)
    return None if binary is None else [binary, *(w for p in FIRMWARE for w in ("-L", p))]


@dataclass(frozen=True, kw_only=True)
class GuestConfig(QemuConfig):
    """The configuration of a guest that runs the workload.

    :ivar accel: The accelerator, ``kvm`` or ``tcg``.
    :ivar workload_mib: MiB that the guest allocates and writes before it is ready.
    :ivar kvm: Enable nested virtualization in the guest, for the workload's ``nest`` command.
    :ivar ovmf: Boot with UEFI. The machine must be ``q35`` or ``q35,smm=off``, and the kernel must
        be ``vmlinuz``. With ``q35``, the guest uses the OVMF build that protects the UEFI
        variables with SMM.
    :ivar qemu: The QEMU command and its first arguments. None means those in :data:`defaults`.
    :ivar plugin: The plugin's options. None means those in :data:`defaults`.
    :ivar preload: Load the plugin with ``LD_PRELOAD`` instead of ``-plugin``.
    :ivar wrapper: A command that runs QEMU, such as ``["env", "LD_PRELOAD=…"]``.
    """

    accel: str = "kvm"
    cpu: str | None = None
    workload_mib: int = 0
    kernel: str = "vmlinux"
    kernel_args: str = ""
    qemu: Sequence[str] | None = None
    kvm: bool = False
    ovmf: bool = False
    preload: bool = False
    wrapper: Sequence[str] = ()

    def argv(self, directory: Path) -> list[str]:
        argv = list(self.wrapper)
        if self.preload and self.plugin is not None:
            argv += ["env", f"LD_PRELOAD={plugin_path()}"]
            argv += [f"QEMU_PREFAULT_OPTIONS={plugin_options(directory, self.plugin)}"]
        argv += self.qemu or defaults.qemu
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += [] if self.preload else self.plugin_arguments(directory)
        argv += self.backing_arguments(directory)
        argv += self.flash_arguments(directory) if self.ovmf else []
        backend = "" if self.backing is None else ",memory-backend=ram"
        argv += ["-machine", self.machine + backend, "-accel", self.accel]
        argv += ["-m", self.memory_argument, "-smp", str(self.smp)]
        if self.cpu or self.accel.partition(",")[0] == "kvm":
            argv += ["-cpu", self.cpu or "host"]
        files = l2_directory()
        initramfs = files / ("initramfs-kvm" if self.kvm else "initramfs")
        append = KERNEL_ARGS + (f" workload.mib={self.workload_mib}" if self.workload_mib else "")
        argv += ["-kernel", str(files / self.kernel), "-initrd", str(initramfs)]
        argv += ["-append", f"{append} {self.kernel_args}".strip()]
        return argv


class Guest(QemuGuest):
    """A QEMU that runs the workload.

    Leaving the context kills QEMU.

    :param config: The configuration. None means :class:`GuestConfig` with its defaults.
    :param changes: Fields of the configuration to replace for this guest.
    """

    def __init__(self, config: GuestConfig | None = None, **changes: Any) -> None:
        config = replace(config or GuestConfig(), **changes)
        if config.plugin is None:
            config = replace(config, plugin=defaults.plugin)
        super().__init__(config)

    def wait_kept(self, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the plugin has prefaulted the guest, and return the plugin's status.

        The guest must be running.
        """
        deadline = time.monotonic() + timeout
        while (status := self.control("status"))["pending"]:
            if time.monotonic() > deadline:
                raise self._make_error(f"the plugin did not finish within {timeout:g} s: {status}")
            self.command("echo idle")
        return status

    def reset(self) -> None:
        """Reset the guest and discard the output of its previous boot.

        QEMU must have been started with ``-action reboot=reset``.
        """
        self.qmp("system_reset")
        while self.wait_event("RESET")["data"]["reason"] != "host-qmp-system-reset":
            pass
        # The guest is stopped, so all output of the previous boot has been received.
        self._serial.forget()

    def wait_ready(self, timeout: float = 240.0) -> Answer:
        """Wait until a booting guest prints ``ready``, and return the line's values.

        The ``uptime`` value is in seconds.
        """
        return self._serial.answer("ready", timeout)

    def command(self, line: str, timeout: float = 120.0) -> Answer:
        """Send a command to the workload and return the values in its reply."""
        return self._serial.command(line, timeout)
