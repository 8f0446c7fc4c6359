# SPDX-License-Identifier: GPL-2.0-or-later
"""Start L1 in Bochs, which emulates an Intel CPU with EPT.

QEMU's TCG emulates only AMD's nested paging. This lab has the same methods as
:class:`.nested.Lab`, so the tests run in both. The emulated CPU executes about 100 to 200 million
instructions per second, and its clock counts instructions: a second in L1 takes one to two seconds
if L1 is busy, and much less if it is idle. Time limits of commands are in L1's seconds.

As in QEMU, the first start of a configuration boots L1 and saves it. Every start restores it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_prefault.errors import FailedError, InputError

from . import bochs_build, bochs_image, bochs_process, cache, disk_stream
from .channel import Channel
from .emulated import KERNEL_ARGS, EmulatedMachine
from .errors import LabLostError
from .machine import EMULATOR_VARIABLE

log = logging.getLogger(__name__)

#: A CPU with EPT, accessed and dirty bits in EPT, PML, APICv and VPID.
CPU_MODEL: Final = "corei7_icelake_u"
_END_SECONDS: Final = 10.0
_SAVE_SECONDS: Final = 300.0
_RESTORE_SECONDS: Final = 300.0
_STALE_SECONDS: Final = 3600.0
_PREFIX: Final = "bochs-"
_BOOT_DISK: Final = "boot.img"
_INSTRUCTIONS_PER_SECOND: Final = 200_000_000
# CPUID tells Linux another frequency of the time-stamp counter than Bochs' timers have.
_TSC_ARGUMENT: Final = f"tsc_early_khz={_INSTRUCTIONS_PER_SECOND // 1000}"
_BOCHSRC: Final = """\
config_interface: textconfig
display_library: nogui
cpu: model={model}, count=1, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest={memory}, host={memory}, block_size=2048
romimage: file={bios}, options=fastboot
vgaromimage: file={vga_bios}
pci: enabled=1, chipset=i440fx
boot: disk
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, mode=volatile, path=boot.img, journal=boot.journal
ata0-slave: type=disk, mode=volatile, path={root}, journal=root.journal
ata1-master: type=disk, mode=volatile, path={files}, journal=files.journal
ata1-slave: type=disk, mode=flat, path={stream}
clock: sync=none, time0=utc
speaker: enabled=0
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""


@dataclass(frozen=True)
class _Recipe:
    """The configuration of an L1. Equal recipes share one snapshot."""

    program: bochs_build.Bochs
    system: bochs_image.BochsImage
    files: Path
    cpu_model: str
    memory_mib: int
    kernel_args: str

    def bochsrc(self) -> str:
        """Return Bochs' configuration without the serial lines."""
        return _BOCHSRC.format(
            model=self.cpu_model,
            ips=_INSTRUCTIONS_PER_SECOND,
            memory=self.memory_mib,
            bios=self.program.bios,
            vga_bios=self.program.vga_bios,
            root=self.system.root,
            files=self.files,
            stream=bochs_process.STREAM,
            log=bochs_process.LOG,
        )

    def key(self) -> str:
        """Return a hash of the recipe."""
        return cache.key_of(
            str(self.program.directory), str(self.system.directory), self.bochsrc(),
            self.kernel_args, "1",
        )  # fmt: skip

    def prepare(self, directory: Path) -> None:
        """Create the files from which Bochs boots."""
        bochs_image.make_boot_disk(
            directory / _BOOT_DISK, self.program.directory, self.system, self.kernel_args
        )
        size = bochs_image.whole_cylinders(disk_stream.DISK_SECTORS * disk_stream.SECTOR)
        name = secrets.token_bytes(disk_stream.NAME_LENGTH)
        disk_stream.create(str(directory / bochs_process.STREAM), name, size)
        (directory / "bochsrc").write_text(self.bochsrc())

    def prepare_restore(self, saved: Path, directory: Path) -> None:
        """Create the files from which Bochs restores a snapshot, without copying its memory."""
        (directory / _BOOT_DISK).symlink_to(saved / _BOOT_DISK)
        for name in (bochs_process.STREAM, bochs_process.STREAM_STATE):
            shutil.copy(saved / name, directory)
        state = directory / bochs_process.SAVED
        state.mkdir()
        for path in (saved / bochs_process.SAVED).iterdir():
            (state / path.name).symlink_to(path)
        # bochs_process replaces the serial lines in this file.
        (state / "config").unlink()
        shutil.copy(saved / bochs_process.SAVED / "config", state)


class BochsLab(EmulatedMachine):
    """A booted L1 in Bochs, which :meth:`start` returns. Leaving the context kills L1."""

    slowdown = 40.0
    emulator = f"Bochs {bochs_build.RELEASE}"

    def __init__(self, channel: Channel, scratch: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(channel, {EMULATOR_VARIABLE: self.emulator})
        self._scratch = scratch
        self.emulator_pid = _bochs_pid(Path(scratch.name))

    @classmethod
    def start(
        cls,
        variant: str = "ept",
        *,
        ept: bool = True,
        tdp_mmu: bool | None = None,
        cpu_model: str = CPU_MODEL,
        memory_mib: int = 4096,
        kernel_args: Sequence[str] = (),
        snapshot: bool = True,
        boot_timeout: float = 900.0,
        heartbeat_limit: float = 300.0,
        console_log: Path | None = None,
        patches: Path = Path("patches"),
    ) -> BochsLab:
        """Boot L1, or restore it from the snapshot of an earlier boot.

        :param variant: A key of :data:`qemu_prefault_lab.bochs_image.VARIANTS`.
        :param ept: Use EPT for L2. If False, KVM in L1 uses shadow paging.
        :param tdp_mmu: The value of kvm's ``tdp_mmu`` parameter. None means the default.
        :param cpu_model: A CPU that ``bochs --help cpu`` lists.
        :param memory_mib: L1's memory in MiB.
        :param kernel_args: Arguments to add to L1's kernel command line.
        :param snapshot: Restore L1 from a snapshot. If False, boot L1 from power-on and save no
            snapshot.
        :param boot_timeout: The time limit of a boot in seconds on L0.
        :param heartbeat_limit: Seconds without a message from L1 after which L1 is considered lost.
            L1 sends a message once a second of its own time, which can be half a minute if other
            processes use all CPUs.
        :param console_log: A file to which the console output is written.
        :param patches: The checkout's ``patches`` directory.
        :raises LabLostError: If L1 failed while it started. The error includes the end of the
            console output.
        """
        if variant not in bochs_image.VARIANTS:
            names = ", ".join(bochs_image.VARIANTS)
            raise InputError(f"no lab variant {variant!r} in Bochs", f"choose from {names}")
        parameters = [f"console=ttyS0,115200 {KERNEL_ARGS}", _TSC_ARGUMENT]
        parameters.append(f"kvm_intel.ept={int(ept)}")
        if tdp_mmu is not None:
            parameters.append(f"kvm.tdp_mmu={'Y' if tdp_mmu else 'N'}")
        recipe = _Recipe(
            bochs_build.build(patches),
            bochs_image.build(bochs_image.VARIANTS[variant]),
            bochs_image.files_disk(),
            cpu_model,
            memory_mib,
            " ".join([*parameters, *kernel_args]),
        )

        def run(directory: Path, timeout: float) -> Channel:
            argv = [sys.executable, "-m", bochs_process.__name__, "{port}", "{monitor}"]
            argv += [str(directory), str(recipe.program.program)]
            channel = Channel(argv, heartbeat_limit, console_log, "Bochs")
            try:
                channel.hello(timeout)
            except BaseException:
                channel.close()
                raise
            return channel

        def start(prepare: Callable[[Path], None], timeout: float) -> BochsLab:
            parent = cache.subdirectory("scratch")
            _remove_stale(parent)
            scratch = tempfile.TemporaryDirectory(
                dir=parent, prefix=_PREFIX, ignore_cleanup_errors=True
            )
            try:
                prepare(Path(scratch.name))
                return cls(run(Path(scratch.name), timeout), scratch)
            except BaseException:
                scratch.cleanup()
                raise

        if snapshot:
            saved = cache.entry(
                f"snapshot-{variant}",
                recipe.key(),
                lambda path: _save(recipe, path, lambda path: run(path, boot_timeout)),
            )
            try:
                return start(lambda path: recipe.prepare_restore(saved, path), _RESTORE_SECONDS)
            except FailedError as error:
                log.warning("cannot restore the snapshot (%s). Booting instead.", error)
                cache.discard(saved)
        return start(recipe.prepare, boot_timeout)

    def close(self) -> None:
        pidfd = _open_process(self.emulator_pid)
        super().close()
        if pidfd is not None:
            # The kernel kills Bochs because its parent has exited. Until then, Bochs writes files.
            select.select([pidfd], [], [], _END_SECONDS)
            os.close(pidfd)
        self._scratch.cleanup()


def _bochs_pid(directory: Path) -> int:
    return int((directory / bochs_process.PID).read_text())


def _remove_stale(parent: Path) -> None:
    """Remove the directories of labs whose Python process was killed."""
    for path in parent.glob(f"{_PREFIX}*"):
        # An error means that the lab is starting or ending, or that it has ended meanwhile.
        with contextlib.suppress(OSError, ValueError):
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if old and not Path(f"/proc/{_bochs_pid(path)}").exists():
                shutil.rmtree(path, ignore_errors=True)


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _save(recipe: _Recipe, directory: Path, boot: Callable[[Path], Channel]) -> None:
    """Boot L1, and let Bochs save it in the directory."""
    log.info("booting the lab once to take its snapshot")
    started = time.monotonic()
    recipe.prepare(directory)
    channel = boot(directory)
    try:
        log.info("booted in %.1f s", time.monotonic() - started)
        channel.rest()
        channel.monitor.send(b"s")
        if not channel.wait_end(_SAVE_SECONDS):
            raise channel.give_up("Bochs did not save L1")
        if channel.lost is None or channel.lost.emulator_status != 0:
            raise channel.lost or LabLostError("Bochs did not save L1")
    finally:
        channel.close()
