# SPDX-License-Identifier: GPL-2.0-or-later
"""Start L1 under TCG, and run commands in L1 through its command server.

The first start of an L1 configuration boots the machine, saves its memory and discards the machine.
Every start, including the first, then restores the memory within two seconds. QEMU maps the memory
file privately, so any number of labs can share one snapshot without copying it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_prefault.errors import FailedError

from . import cache, image
from .channel import Channel
from .emulated import KERNEL_ARGS, EmulatedMachine
from .errors import QmpError
from .machine import UEFI_VARIABLE
from .qmp import Qmp

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recipe:
    """The configuration of an L1.

    Equal recipes share one snapshot.
    """

    host: image.TcgHost
    image: image.Image
    files: Path
    memory_mib: int
    kernel_args: str
    disks: tuple[Path, ...] = ()
    emulator: Path | None = None
    nodes_mib: tuple[int, ...] = ()

    def argv(self, memory_file: Path | None, shared: bool) -> list[str]:
        """Return QEMU's command line.

        L1 has one vCPU. With two vCPUs, L1's kernel occasionally oopses under TCG.
        """
        machine = "pc"
        memory: list[str] = []
        if self.nodes_mib:
            memory = self._nodes(memory_file, shared)
        elif memory_file is not None:
            memory = _backend("ram", self.memory_mib, memory_file, shared)
            machine += ",memory-backend=ram"
        disks = []
        for disk in (self.image.rootfs, self.files, *self.disks):
            disks += ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
        return self.host.qemu(
            *memory,
            *("-machine", machine, "-accel", "tcg,tb-size=512", "-cpu", "max,-la57", "-smp", "1"),
            *("-m", f"{self.memory_mib}M", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", "-serial", "stdio", *disks),
            *("-device", "virtio-serial-pci", "-chardev", "socket,id=port,fd={port}"),
            *("-device", "virtserialport,chardev=port,name=lab"),
            *("-chardev", "socket,id=monitor,fd={monitor}", "-mon", "monitor,mode=control"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs)),
            *("-append", self.kernel_args),
            binary=self.emulator,
        )

    def _nodes(self, memory_file: Path | None, shared: bool) -> list[str]:
        """Return QEMU's arguments for the NUMA nodes, with the CPU on the first node."""
        arguments = []
        for number, size in enumerate(self.nodes_mib):
            name = f"ram{number}"
            file = memory_file and memory_file.with_name(f"{memory_file.name}{number}")
            cpus = ",cpus=0" if number == 0 else ""
            arguments += _backend(name, size, file, shared)
            arguments += ["-numa", f"node,nodeid={number},memdev={name}{cpus}"]
        return arguments

    def key(self) -> str:
        """Return a hash of the recipe and of the disks' sizes and modification times.

        The hash covers the disks because a snapshot contains data that L1 has read from them.
        """
        disks = [path.stat() for path in self.disks]
        versions = [f"{disk.st_size} {disk.st_mtime_ns}" for disk in disks]
        return cache.key_of(*self.argv(Path("ram"), shared=True), *versions)


def _backend(name: str, size_mib: int, file: Path | None, shared: bool) -> list[str]:
    """Return the ``-object`` arguments of a memory backend.

    :param file: The backend's file. None means memory-backend-ram.
    """
    if file is None:
        return ["-object", f"memory-backend-ram,id={name},size={size_mib}M"]
    share = "on" if shared else "off"
    return ["-object", f"memory-backend-file,id={name},size={size_mib}M,mem-path={file},"
            f"share={share}"]  # fmt: skip


class Lab(EmulatedMachine):
    """A booted L1 under QEMU's TCG, which :meth:`start` returns.

    Leaving the context kills L1.
    """

    @classmethod
    def start(
        cls,
        variant: str = "trixie",
        *,
        npt: bool = True,
        tdp_mmu: bool | None = None,
        memory_mib: int = 8192,
        nodes_mib: Sequence[int] = (),
        kernel_args: Sequence[str] = (),
        disks: Sequence[Path] = (),
        emulator: Path | None = None,
        snapshot: bool = True,
        boot_timeout: float = 300.0,
        heartbeat_limit: float = 60.0,
        console_log: Path | None = None,
    ) -> Lab:
        """Boot L1, or restore it from the snapshot of an earlier boot.

        :param variant: The name of the Debian variant to boot, a key of
            :data:`qemu_prefault_lab.image.VARIANTS`.
        :param npt: Use nested paging for L2. If False, KVM in L1 uses shadow paging.
        :param tdp_mmu: The value of kvm's ``tdp_mmu`` parameter. None means the default.
        :param memory_mib: L1's memory in MiB.
        :param nodes_mib: The memory of each of L1's NUMA nodes in MiB, instead of ``memory_mib``.
        :param kernel_args: Arguments to add to L1's kernel command line.
        :param disks: Raw images that L1 gets as read-only disks, beginning with ``/dev/vdc``.
        :param emulator: A QEMU to use instead of the lab's own, for guests with UEFI.
        :param snapshot: Restore L1 from a snapshot. If False, boot L1 from power-on and save no
            snapshot.
        :param boot_timeout: The time limit of a boot in seconds.
        :param heartbeat_limit: Seconds without a message from L1 after which L1 is considered lost.
        :param console_log: A file to which the console output is written.
        :raises LabLostError: If L1 failed while it started. The error includes the end of the
            console output.
        """
        parameters = [f"console=ttyS0 {KERNEL_ARGS}", f"kvm_amd.npt={int(npt)}"]
        if tdp_mmu is not None:
            parameters.append(f"kvm.tdp_mmu={'Y' if tdp_mmu else 'N'}")
        recipe = _Recipe(
            image.tcg_host(),
            image.build(image.variant_named(variant)),
            image.files_disk(),
            sum(nodes_mib) or memory_mib,
            " ".join([*parameters, *kernel_args]),
            tuple(disks),
            emulator,
            tuple(nodes_mib),
        )
        env = {} if emulator is None else {UEFI_VARIABLE: "1"}

        def cold(argv: Sequence[str], timeout: float = boot_timeout) -> Channel:
            channel = Channel(argv, heartbeat_limit, console_log)
            try:
                channel.hello(timeout)
            except BaseException:
                channel.close()
                raise
            return channel

        if snapshot:
            name = f"snapshot-{variant}"
            saved = cache.entry(name, recipe.key(), lambda path: _save(recipe, path, cold))
            try:
                return cls(_restore(recipe, saved, heartbeat_limit, console_log), env)
            except FailedError as error:
                log.warning("cannot restore the snapshot (%s). Booting instead.", error)
                cache.discard(saved)
        return cls(cold(recipe.argv(None, shared=False)), env)


def _save(recipe: _Recipe, directory: Path, boot: Callable[[list[str]], Channel]) -> None:
    """Boot L1 with its memory in a file, and save CPU and devices in another file."""
    log.info("booting the lab once to take its snapshot")
    memory = directory / "ram"
    started = time.monotonic()
    channel = boot(recipe.argv(memory, shared=True))
    try:
        log.info("booted in %.1f s", time.monotonic() - started)
        channel.rest()
        qmp = Qmp(channel.monitor)
        qmp.execute("stop")
        _ignore_shared(qmp)
        qmp.execute("migrate", uri=f"exec:cat >'{directory}/state'")
        _wait_migrated(qmp, "completed")
        qmp.execute("quit")
        channel.wait_end(30.0)
    finally:
        channel.close()
    (directory / "recipe.json").write_text(json.dumps({"kernel_args": recipe.kernel_args}))


def _restore(
    recipe: _Recipe, directory: Path, heartbeat_limit: float, console_log: Path | None
) -> Channel:
    argv = [*recipe.argv(directory / "ram", shared=False), "-incoming", "defer"]
    channel = Channel(argv, heartbeat_limit, console_log)
    try:
        qmp = Qmp(channel.monitor)
        _ignore_shared(qmp)
        qmp.execute("migrate-incoming", uri=f"exec:cat '{directory}/state'")
        _wait_migrated(qmp, "completed")
        qmp.execute("cont")
        channel.hello(60.0)
    except BaseException:
        channel.close()
        raise
    return channel


def _ignore_shared(qmp: Qmp) -> None:
    # The memory is in a file already. The migration stream contains only the devices and the CPU.
    capabilities = [
        {"capability": "x-ignore-shared", "state": True},
        {"capability": "events", "state": True},
    ]
    qmp.execute("migrate-set-capabilities", capabilities=capabilities)


def _wait_migrated(qmp: Qmp, wanted: str) -> None:
    while True:
        event = qmp.wait_event("MIGRATION", timeout=120.0)
        status = event["data"]["status"]
        if status == wanted:
            return
        if status in ("failed", "cancelled"):
            raise QmpError(f"migration {status}")
