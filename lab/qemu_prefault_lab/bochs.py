# SPDX-License-Identifier: GPL-2.0-or-later
"""Start L1 in Bochs, which emulates an Intel CPU with EPT.

QEMU's TCG emulates only AMD's nested paging. This lab has the same methods as
:class:`.nested.Lab`, so the tests run in both. The emulated CPU executes about 100 to 200 million
instructions per second, and its clock counts instructions: a second in L1 takes one to two seconds
if L1 is busy, and much less if it is idle. Time limits of commands are in L1's seconds.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qemu_prefault.errors import InputError

from . import bochs_build, bochs_image, bochs_process, cache, disk_stream
from .channel import Channel
from .emulated import KERNEL_ARGS, EmulatedMachine

log = logging.getLogger(__name__)

#: A CPU with EPT, accessed and dirty bits in EPT, PML, APICv and VPID.
CPU_MODEL: Final = "corei7_icelake_u"
_END_SECONDS: Final = 10.0
_INSTRUCTIONS_PER_SECOND: Final = 200_000_000
# CPUID tells Linux another frequency of the time-stamp counter than Bochs' timers have.
_TSC_ARGUMENT: Final = f"tsc_early_khz={_INSTRUCTIONS_PER_SECOND // 1000}"
# In Bochs, an L2 guest that runs nested guests oopses if L1's KVM uses APICv.
_PARAMETERS: Final = ("kvm_intel.enable_apicv=0",)
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
ata0-master: type=disk, mode=volatile, path={boot}, journal=boot.journal
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


class BochsLab(EmulatedMachine):
    """A booted L1 in Bochs, which :meth:`start` returns. Leaving the context kills L1."""

    slowdown = 20.0

    def __init__(self, channel: Channel, scratch: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(channel, {})
        self._scratch = scratch
        self.emulator_pid = int((Path(scratch.name) / bochs_process.PID).read_text())
        self._emulator = os.pidfd_open(self.emulator_pid)

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
        boot_timeout: float = 300.0,
        heartbeat_limit: float = 60.0,
        console_log: Path | None = None,
        patches: Path = Path("patches"),
    ) -> BochsLab:
        """Boot L1.

        :param variant: A key of :data:`qemu_prefault_lab.bochs_image.VARIANTS`.
        :param ept: Use EPT for L2. If False, KVM in L1 uses shadow paging.
        :param tdp_mmu: The value of kvm's ``tdp_mmu`` parameter. None means the default.
        :param cpu_model: A CPU that ``bochs --help cpu`` lists.
        :param memory_mib: L1's memory in MiB.
        :param kernel_args: Arguments to add to L1's kernel command line.
        :param boot_timeout: The time limit of a boot in seconds on L0.
        :param heartbeat_limit: Seconds without a message from L1 after which L1 is considered lost.
        :param console_log: A file to which the console output is written.
        :param patches: The checkout's ``patches`` directory.
        :raises LabLostError: If L1 failed while it started. The error includes the end of the
            console output.
        """
        if variant not in bochs_image.VARIANTS:
            names = ", ".join(bochs_image.VARIANTS)
            raise InputError(f"no lab variant {variant!r} in Bochs", f"choose from {names}")
        parameters = [f"console=ttyS0,115200 {KERNEL_ARGS}", _TSC_ARGUMENT, *_PARAMETERS]
        parameters.append(f"kvm_intel.ept={int(ept)}")
        if tdp_mmu is not None:
            parameters.append(f"kvm.tdp_mmu={'Y' if tdp_mmu else 'N'}")
        program = bochs_build.build(patches)
        system = bochs_image.build(bochs_image.VARIANTS[variant])
        scratch = tempfile.TemporaryDirectory(dir=cache.subdirectory("scratch"), prefix="bochs-")
        directory = Path(scratch.name)
        bochs_image.make_boot_disk(
            directory / "boot.img", program.directory, system, " ".join([*parameters, *kernel_args])
        )
        size = bochs_image.whole_cylinders(disk_stream.DISK_SECTORS * disk_stream.SECTOR)
        stream_name = secrets.token_bytes(disk_stream.NAME_LENGTH)
        disk_stream.create(str(directory / bochs_process.STREAM), stream_name, size)
        (directory / "bochsrc").write_text(
            _BOCHSRC.format(
                model=cpu_model,
                ips=_INSTRUCTIONS_PER_SECOND,
                memory=memory_mib,
                bios=program.bios,
                vga_bios=program.vga_bios,
                boot="boot.img",
                root=system.root,
                files=bochs_image.files_disk(),
                stream=bochs_process.STREAM,
                log=bochs_process.LOG,
            )
        )
        argv = [sys.executable, "-m", bochs_process.__name__, "{port}", "{monitor}"]
        argv += [str(directory), str(program.program), "-q", "-f", "bochsrc"]
        channel = Channel(argv, heartbeat_limit, console_log, "Bochs")
        try:
            channel.hello(boot_timeout)
        except BaseException:
            channel.close()
            scratch.cleanup()
            raise
        return cls(channel, scratch)

    def close(self) -> None:
        super().close()
        # Bochs is killed when its parent is. It writes files until then.
        select.select([self._emulator], [], [], _END_SECONDS)
        os.close(self._emulator)
        self._scratch.cleanup()
