# SPDX-License-Identifier: GPL-2.0-or-later
"""From the monitor's text to the RAM of a guest: where it is, what backs it, what to leave alone.

No QMP command returns the guest-physical map, so it is put together from four answers,
each of which knows one thing the others do not:

==========================  ==================================================================
``info mtree -f``           what the guest sees at each address *now* (PAM, holes, ROM on top),
                            and which ranges are KVM memslots
``info ramblock``           the page size of the backing, and (QEMU >= 8.1) its host address
``query-memdev``            which of the blocks are guest RAM, and how they are backed
``query-memory-devices``    which of those are DIMMs, NVDIMMs, virtio-mem or virtio-pmem
==========================  ==================================================================

The host address of every range comes from ``gpa2hva``. :func:`build_sections` joins all of
it into :class:`MemorySection`: one contiguous piece of guest-physical memory, one piece of QEMU's
address space. What is not RAM is kept as a section with a reason in ``skipped``, so that a
user can see the whole map and why the tool keeps its hands off a part of it.

This module is pure: text and decoded JSON in, frozen dataclasses out. It trusts nothing it
reads, because the peer may be any program that listens on a socket: the only exception that
leaves it is :class:`LayoutError`, and its time is linear in the size of the input.

Addresses and sizes are in bytes throughout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ..errors import LayoutError
from ..units import PAGE_SIZE
from .hmp import MAX_GPA, MAX_HVA, FlatRange, NumaNode, RamBlock
from .qapi import expect_array, expect_bool, expect_int, expect_object, expect_str, quote

#: QEMU's default names for the RAM that machines create without an explicit backend.
MAIN_RAM_NAMES: Final = frozenset({"pc.ram", "microvm.ram"})


#: Where SeaBIOS lives below 1 MiB; the last PAM area it write-protects (see firmware_ahead).
BIOS_AREA: Final = 0xF0000


# --- query-memdev, query-memory-devices ---


@dataclass(frozen=True, slots=True)
class Memdev:
    """A memory backend (``query-memdev``). None where this QEMU does not say."""

    id: str
    size: int
    share: bool | None
    reserve: bool | None
    host_nodes: tuple[int, ...]
    policy: str | None


def parse_memdevs(value: object) -> tuple[Memdev, ...]:
    """Return the memory backends of a decoded ``query-memdev`` answer.

    :raises LayoutError: if the JSON has another shape (qapi/machine.json, ``Memdev``).
    """
    memdevs = []
    for item in expect_array(value, "query-memdev"):
        entry = expect_object(item, "an entry of query-memdev")
        if "id" not in entry:  # anonymous backends cannot be told apart, nor named in mtree
            continue
        name = expect_str(entry["id"], "the id of a memdev")
        what = f"of memdev {quote(name)}"
        nodes = expect_array(entry.get("host-nodes", []), f"host-nodes {what}")
        memdevs.append(
            Memdev(
                id=name,
                size=expect_int(entry.get("size"), f"size {what}", 1, MAX_GPA),
                share=_flag(entry, "share", what),
                reserve=_flag(entry, "reserve", what),
                host_nodes=tuple(expect_int(n, f"host-nodes {what}", 0, 1023) for n in nodes),
                policy=expect_str(entry["policy"], f"policy {what}") if "policy" in entry else None,
            )
        )
    _no_duplicates([memdev.id for memdev in memdevs], "query-memdev")
    return tuple(memdevs)


def _flag(entry: Mapping[str, object], key: str, what: str) -> bool | None:
    return expect_bool(entry[key], f"{key} {what}") if key in entry else None


def _no_duplicates(names: Sequence[str], what: str) -> None:
    if len(set(names)) != len(names):
        raise LayoutError(f"{what} lists the same name twice")


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """A DIMM, NVDIMM, virtio-mem, virtio-pmem … (``query-memory-devices``).

    `size` is what the device occupies in guest-physical memory; for virtio-mem that is its
    maximum, of which only `plugged` bytes exist for the guest.
    """

    kind: str
    id: str | None
    memdev: str | None
    gpa: int | None
    size: int
    node: int | None
    plugged: int | None = None
    requested: int | None = None


def parse_memory_devices(value: object) -> tuple[MemoryDevice, ...]:
    """Return the memory devices of a decoded ``query-memory-devices`` answer.

    :raises LayoutError: if the JSON has another shape (qapi/machine.json, ``MemoryDeviceInfo``).
    """
    devices = []
    for item in expect_array(value, "query-memory-devices"):
        entry = expect_object(item, "an entry of query-memory-devices")
        kind = expect_str(entry.get("type"), "the type of a memory device")
        data = expect_object(entry.get("data"), f"the data of a memory device {quote(kind)}")
        what = f"of a memory device {quote(kind)}"
        absent = "max-size" in data  # virtio-mem and hv-balloon: size is only what is plugged
        gpa = data.get("addr", data.get("memaddr"))
        memdev = data.get("memdev")
        devices.append(
            MemoryDevice(
                kind=kind,
                id=expect_str(data["id"], f"id {what}") if "id" in data else None,
                memdev=None if memdev is None else _base(expect_str(memdev, f"memdev {what}")),
                gpa=None if gpa is None else expect_int(gpa, f"addr {what}", 0, MAX_GPA - 1),
                size=expect_int(data.get("max-size" if absent else "size"), f"size {what}"),
                node=_count(data, "node", what),
                plugged=expect_int(data.get("size"), f"size {what}") if absent else None,
                requested=_count(data, "requested-size", what),
            )
        )
    return tuple(devices)


def _count(data: Mapping[str, object], key: str, what: str) -> int | None:
    return expect_int(data[key], f"{key} {what}") if key in data else None


def _base(path: str) -> str:
    """Return the last element of a QOM path: ``/objects/m0`` is ``m0``."""
    return path.rsplit("/", 1)[-1]


def memdev_nodes(
    ranges: Sequence[FlatRange],
    memdevs: Sequence[Memdev],
    devices: Sequence[MemoryDevice],
    nodes: Sequence[NumaNode],
) -> dict[str, int]:
    """Return the guest NUMA node of each backend, as far as it can be known.

    Memory devices name their node. For ``-numa node,memdev=`` no monitor command does, but
    boot memory is laid out in node order (``numa_init_memdev_container()``, hw/core/numa.c):
    so the backends in address order are those of the nodes in number order. The sizes must
    agree, or nothing is said about any of them.
    """
    found = {d.memdev: d.node for d in devices if d.memdev is not None and d.node is not None}
    plugged = {device.memdev for device in devices}
    by_id = {memdev.id: memdev for memdev in memdevs}
    boot: dict[str, None] = {}  # insertion-ordered set
    for item in ranges:
        name = _memdev_of(item.name, by_id)
        if name is not None and name not in plugged:
            boot.setdefault(name)
    with_memory = [node for node in nodes if node.base]
    sizes = [by_id[name].size >> 20 << 20 for name in boot]
    if sizes == [node.base for node in with_memory]:
        found.update(zip(boot, (node.node for node in with_memory), strict=True))
    return found


# --- sections ---


@dataclass(frozen=True, slots=True)
class MemorySection:
    """A contiguous piece of guest memory: guest-physical `gpa`, in QEMU at `hva`.

    :ivar name: the memory region's name in the monitor.
    :ivar gpa: guest-physical address, bytes.
    :ivar size: bytes.
    :ivar hva: address in QEMU; 0 if unknown, which only a skipped section can be.
    :ivar offset: offset in the RAM block, bytes.
    :ivar page_size: page size of the backing in bytes (4096 also under THP).
    :ivar memdev: id of the memory backend, None if the section has none.
    :ivar device: ``dimm``, ``nvdimm``, ``virtio-mem``, ``virtio-pmem`` … or None for boot RAM.
    :ivar share: whether the backend is mapped shared; None if unknown.
    :ivar reserve: False tells of deliberate overcommit; None if unknown.
    :ivar node: guest NUMA node; None if unknown.
    :ivar skipped: why the tool must leave this section alone, in words; None if it need not.
    :ivar skip_code: the same as a stable name: ``rom``, ``read-only``, ``read-only-backend``,
        ``device-memory``, ``rom-device``, ``vfio-bar``, ``no-memslot``, ``unaligned``,
        ``no-ram-block``, ``no-host-address``, ``enclave``.
    :ivar disk_file: whether it is a shared file on a disk, which populating would write.
    :ivar bound_nodes: host NUMA nodes that the backend binds its memory to; empty: any.
    """

    name: str
    gpa: int
    size: int
    hva: int
    offset: int
    page_size: int
    memdev: str | None
    device: str | None
    share: bool | None
    reserve: bool | None
    node: int | None
    skipped: str | None
    skip_code: str | None
    bound_nodes: tuple[int, ...] = ()
    disk_file: bool = False

    @property
    def end(self) -> int:
        """First guest-physical address behind the section."""
        return self.gpa + self.size


_SKIP_TEXT: Final = {
    "rom": "ROM",
    "read-only": "RAM the chipset has made read-only (PAM)",
    "read-only-backend": "a read-only memory backend",
    "device-memory": "memory of a device, not guest RAM",
    "rom-device": "flash or another ROM device",
    "vfio-bar": "a BAR of an assigned device",
    "no-memslot": "not a KVM memslot of its own",
    "unaligned": "not a whole number of 4 KiB pages",
    "no-ram-block": "QEMU lists no RAM block for it",
    "no-host-address": "its address in QEMU is unknown",
    "enclave": "SGX enclave memory",
}


def build_sections(
    ranges: Sequence[FlatRange],
    ramblocks: Sequence[RamBlock],
    memdevs: Sequence[Memdev],
    memory_devices: Sequence[MemoryDevice],
    hva_of: Mapping[int, int],
    *,
    kvm: bool | None = None,
    node_of: Mapping[str, int] | None = None,
    device_owned: frozenset[str] = frozenset(),
) -> tuple[MemorySection, ...]:
    """Join what the monitor said into the sections of guest memory, ascending by address.

    Everything except plain I/O becomes a section; what must not be touched has `skipped` set.

    :param hva_of: host address of the first byte of a range, by guest-physical address.
        Where missing, the RAM block's address is used if QEMU tells it.
    :param kvm: whether the guest runs under KVM (``query-kvm``); then RAM that is not a
        memslot is skipped. None: decided by whether any range is a memslot.
    :param node_of: guest NUMA node by backend id (:func:`memdev_nodes`).
    :param device_owned: ids of backends that a device other than a memory device uses, such as
        ivshmem: they are the device's memory, not guest RAM.
    :raises LayoutError: if the answers contradict each other: a range beyond its block, an
        address that differs between ``gpa2hva`` and the block, RAM ranges that share host memory.
    """
    if kvm is None:
        kvm = any(item.kvm for item in ranges)
    join = _Join(
        ramblocks, memdevs, memory_devices, hva_of, node_of or {}, device_owned=device_owned
    )
    sections = tuple(join.section(item, kvm) for item in ranges if item.kind != "i/o")
    _check_disjoint([section for section in sections if section.skipped is None])
    return sections


class _Join:
    """Lookup tables for build_sections: everything by name, so that the join is linear."""

    def __init__(
        self,
        ramblocks: Sequence[RamBlock],
        memdevs: Sequence[Memdev],
        devices: Sequence[MemoryDevice],
        hva_of: Mapping[int, int],
        node_of: Mapping[str, int],
        *,
        device_owned: frozenset[str],
    ) -> None:
        self.device_owned = device_owned
        self.memdevs = {memdev.id: memdev for memdev in memdevs}
        self.devices = {d.memdev: d for d in devices if d.memdev is not None}
        self.hva_of = hva_of
        self.node_of = node_of
        self.blocks: dict[str, RamBlock] = {}
        self.nameless: dict[int, RamBlock] = {}
        for block in ramblocks:
            if not block.name:
                self.nameless[block.total] = block
            self.blocks.setdefault(block.name, block)
            # qemu_ram_set_idstr() puts the device's path in front: 0000:00:01.0/vm0
            self.blocks.setdefault(_base(block.name), block)

    def section(self, item: FlatRange, kvm: bool) -> MemorySection:
        memdev_id = _memdev_of(item.name, self.memdevs)
        memdev = self.memdevs.get(memdev_id) if memdev_id is not None else None
        device = self.devices.get(memdev_id) if memdev_id is not None else None
        block = self._block(item, memdev)
        is_ram = is_ram_region(item.name, self.memdevs) and memdev_id not in self.device_owned
        hva = self._hva(item, block, is_ram)
        code = _skip_code(item, is_ram, kvm, device)
        if code is None and block is None:
            code = "no-ram-block"
        if code is None and not hva:
            code = "no-host-address"
        return MemorySection(
            name=item.name,
            gpa=item.start,
            size=item.size,
            hva=hva,
            offset=item.offset,
            page_size=block.page_size if block else PAGE_SIZE,
            memdev=memdev_id,
            device=device.kind if device else None,
            share=memdev.share if memdev else None,
            reserve=memdev.reserve if memdev else None,
            node=self.node_of.get(memdev_id or "", device.node if device else None),
            skipped=_SKIP_TEXT[code] if code else None,
            skip_code=code,
            bound_nodes=memdev.host_nodes if memdev and memdev.policy == "bind" else (),
        )

    def _block(self, item: FlatRange, memdev: Memdev | None) -> RamBlock | None:
        block = self.blocks.get(item.name) if item.name else None
        if block is None and memdev is not None:
            # QEMU 7.2 gives the block of virtio-pmem no name at all.
            block = self.blocks.get(memdev.id) or self.nameless.get(memdev.size)
        if block is not None and memdev is not None and item.offset + item.size > block.total:
            raise LayoutError(f"{quote(item.name)} at {item.start:#x} reaches beyond its RAM block")
        return block

    def _hva(self, item: FlatRange, block: RamBlock | None, is_ram: bool) -> int:
        told = self.hva_of.get(item.start, 0)
        if block is None or block.hva is None:
            return told
        computed = block.hva + item.offset
        if is_ram and told and told != computed:
            raise LayoutError(
                f"{quote(item.name)} at {item.start:#x} is at {told:#x} in QEMU by gpa2hva, "
                f"but at {computed:#x} by its RAM block",
                "the memory layout may have changed meanwhile: try again",
            )
        return told or computed


def is_ram_region(name: str, memdevs: Collection[str]) -> bool:
    """Whether a memory region has a backend, or is a machine's RAM that has none.

    :param memdevs: ids of all backends.
    """
    if not memdevs:
        return name in MAIN_RAM_NAMES
    return _memdev_of(name, memdevs) is not None


def _memdev_of(name: str, memdevs: Collection[str]) -> str | None:
    """Return the id of the backend behind the region `name`, if it is one.

    memfd and file backends of machine types before 4.0 are named by their full QOM path,
    ``/objects/m0`` (``x-use-canonical-path-for-ramblock-id``, hw/core/machine.c).
    """
    if name in memdevs:
        return name
    if name.startswith("/objects/") and _base(name) in memdevs:
        return _base(name)
    return None


def _skip_code(item: FlatRange, is_ram: bool, kvm: bool, device: MemoryDevice | None) -> str | None:
    code = None
    if item.kind != "ram":
        by_kind = {"romd": "rom-device", "ramd": "vfio-bar", "rom": "rom"}
        code = "read-only" if item.kind == "rom" and is_ram else by_kind[item.kind]
        if code == "read-only" and device is not None:
            code = "read-only-backend"
    elif not is_ram:
        code = "device-memory"
    elif device is not None and device.kind == "sgx-epc":
        code = "enclave"
    elif (item.start | item.size | item.offset) % PAGE_SIZE:
        code = "unaligned"
    elif kvm and not item.kvm:
        code = "no-memslot"
    return code


def _check_disjoint(sections: Sequence[MemorySection]) -> None:
    """Refuse two pieces of guest RAM in the same host memory: then one of the answers lies."""
    by_hva = sorted(sections, key=lambda section: section.hva)
    for before, after in pairwise(by_hva):
        if before.hva + before.size > after.hva:
            raise LayoutError(
                f"guest RAM at {before.gpa:#x} and at {after.gpa:#x} shares memory in QEMU"
            )
    for section in sections:
        if section.hva % PAGE_SIZE or section.hva + section.size >= MAX_HVA:
            raise LayoutError(
                f"guest RAM at {section.gpa:#x} has the impossible host address {section.hva:#x}"
            )


# --- what follows from the layout ---


def firmware_ahead(ranges: Sequence[FlatRange]) -> bool | None:
    """Tell whether the firmware has yet to rewrite the memslots of low RAM.

    On pc and q35 SeaBIOS deletes and re-creates the slot of low RAM three times; what was
    prefaulted before is lost. Its last act is to write-protect the area at 0xf0000
    (``make_bios_readonly()``, src/fw/shadow.c), which is then ``rom`` with the name of main RAM.

    :returns: True before that; False after it, and for microvm, whose slots firmware leaves
        alone; None where this says nothing, as with OVMF in flash.
    """
    low = _range_at(ranges, 0)
    area = _range_at(ranges, BIOS_AREA)
    if low is None or low.kind != "ram" or area is None:
        return None
    if area.name == low.name and area.kind == "rom":
        return False
    if any(item.name.startswith("system.flash") for item in ranges):
        return None
    if area.name == low.name:  # all of PAM is RAM: SeaBIOS is at work
        return True if area.kind == "ram" else None
    if area.kind == "rom":  # still the ROM itself: nothing has run
        return True
    # microvm maps its firmware as plain RAM over main RAM and has no PAM.
    return False if area.kind == "ram" else None


def _range_at(ranges: Sequence[FlatRange], gpa: int) -> FlatRange | None:
    return next((item for item in ranges if item.start <= gpa < item.end), None)


def huge_alignment(section: MemorySection, huge_size: int) -> bool:
    """Tell whether KVM can ever map this section with pages of `huge_size` bytes.

    Guest-physical and host address must agree modulo the page size, or KVM forbids such
    leaves for the whole slot (``kvm_alloc_memslot_metadata()``, arch/x86/kvm/x86.c).
    """
    return (section.gpa - section.hva) % huge_size == 0
