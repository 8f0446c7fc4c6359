# SPDX-License-Identifier: GPL-2.0-or-later
"""Start the machine on which the demo, the benchmarks and the tests run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from qemu_prefault.errors import InputError

from . import bochs_image, image
from .bochs import BochsLab
from .emulated import EmulatedMachine
from .machine import LocalMachine, Machine, kvm_can_prefault
from .nested import Lab

#: The names of all variants, in QEMU and in Bochs.
VARIANTS: Final = (*image.VARIANTS, *bochs_image.VARIANTS)


def build_image(variant: str) -> image.Image | bochs_image.BochsImage:
    """Return the image of a variant, built unless cached, with all other files for its boot."""
    if variant in bochs_image.VARIANTS:
        bochs_image.files_disk()
        return bochs_image.build(bochs_image.VARIANTS[variant])
    image.files_disk()
    return image.build(image.variant_named(variant))


def start_lab(
    variant: str = "trixie",
    *,
    npt: bool = True,
    tdp_mmu: bool | None = None,
    nodes_mib: Sequence[int] = (),
    module_parameters: Sequence[str] = (),
    disks: Sequence[Path] = (),
    emulator: Path | None = None,
    snapshot: bool = True,
) -> EmulatedMachine:
    """Start L1 in the emulator of the variant.

    :param npt: Use nested paging for L2, which is NPT or EPT.
    :param module_parameters: Parameters of L1's modules (``kvm_intel.pml=0``).
    :raises InputError: If the variant's emulator does not support one of the other parameters,
        which :meth:`Lab.start` describes.
    """
    if variant not in bochs_image.VARIANTS:
        return Lab.start(
            variant,
            npt=npt,
            tdp_mmu=tdp_mmu,
            nodes_mib=nodes_mib,
            kernel_args=module_parameters,
            disks=disks,
            emulator=emulator,
            snapshot=snapshot,
        )
    if nodes_mib or disks or emulator:
        raise InputError(
            f"variant {variant} supports no NUMA nodes, no further disks and no other emulator",
            "select a variant that runs in QEMU",
        )
    return BochsLab.start(
        variant, ept=npt, tdp_mmu=tdp_mmu, kernel_args=module_parameters, snapshot=snapshot
    )


def open_machine(
    variant: str = "trixie",
    *,
    nested: bool = False,
    npt: bool = True,
    tdp_mmu: bool | None = None,
    nodes_mib: Sequence[int] = (),
    module_parameters: Sequence[str] = (),
    disks: Sequence[Path] = (),
    emulator: Callable[[], Path] | None = None,
) -> Machine:
    """Return this host if its KVM can prefault, or otherwise a booted lab.

    :param nested: Use the lab even if this host can prefault. A variant in Bochs, ``npt=False``,
        any value of ``tdp_mmu``, ``nodes_mib`` and ``module_parameters`` also select the lab.
    :param nodes_mib: The memory of each of L1's NUMA nodes in MiB, as in :meth:`Lab.start`.
    :param disks: Disks for the lab, as in :meth:`Lab.start`.
    :param emulator: A function that returns the emulator for the lab. The function may have to
        build QEMU, so it is not called if the machine is this host.
    """
    special = variant in bochs_image.VARIANTS or not npt or tdp_mmu is not None
    if not (nested or special or nodes_mib or module_parameters) and kvm_can_prefault():
        return LocalMachine()
    return start_lab(
        variant,
        npt=npt,
        tdp_mmu=tdp_mmu,
        nodes_mib=nodes_mib,
        module_parameters=module_parameters,
        disks=disks,
        emulator=emulator() if emulator else None,
    )
