# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the map of a guest's memory from the monitor's replies.

No QMP command returns the guest-physical memory map. This module builds the map from four replies.
Each reply contains information that the other replies lack:

==========================  ==================================================================
``info mtree -f``           the guest's *current* view of each address (PAM, holes, ROM on
                            top), and which ranges are KVM memslots
``info ramblock``           the page size and (QEMU >= 8.1) the host address of each RAM block
``query-memdev``            which RAM blocks are guest RAM, and the properties of their backends
``query-memory-devices``    which RAM blocks belong to DIMMs, NVDIMMs, virtio-mem or
                            virtio-pmem
==========================  ==================================================================

The monitor's ``gpa2hva`` command then returns the host address of each range.
:func:`build_sections` joins all of these replies into :class:`MemorySection` objects. A section is
contiguous both in guest-physical memory and in QEMU's address space. Memory that a run must not
prefault also becomes a section, so that users can see the whole map. The ``skipped`` field of such
a section contains the reason.

The functions of this module are pure. They take text and decoded JSON, and return frozen
dataclasses. The replies are untrusted, because the program that listens on the socket need not be
QEMU. Therefore the functions check all input. They raise only :class:`LayoutError`. Their run time
is linear in the size of the input.

All addresses and sizes are in bytes.

This module has one subject, the join of the four replies, so it is longer than 400 lines.
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

#: The address of SeaBIOS below 1 MiB. SeaBIOS write-protects this PAM area last (see
#: :func:`firmware_ahead`).
BIOS_AREA: Final = 0xF0000


@dataclass(frozen=True, slots=True)
class Memdev:
    """One memory backend in the reply to ``query-memdev``.

    A field is None if QEMU does not report it.
    """

    id: str
    size: int
    share: bool | None
    reserve: bool | None
    host_nodes: tuple[int, ...]
    policy: str | None


def parse_memdevs(value: object) -> tuple[Memdev, ...]:
    """Return the memory backends of a decoded ``query-memdev`` reply.

    :raises LayoutError: If the JSON does not match ``Memdev`` in qapi/machine.json.
    """
    memdevs = []
    for item in expect_array(value, "query-memdev"):
        entry = expect_object(item, "an entry of query-memdev")
        if "id" not in entry:  # without an id, no range of mtree can refer to the backend
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
    """One memory device in the reply to ``query-memory-devices``.

    Examples are DIMM, NVDIMM, virtio-mem and virtio-pmem. ``size`` is the size of the device's
    guest-physical range in bytes. For virtio-mem, this is the maximum size, and only ``plugged``
    bytes of the range exist for the guest.
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
    """Return the memory devices of a decoded ``query-memory-devices`` reply.

    :raises LayoutError: If the JSON does not match ``MemoryDeviceInfo`` in qapi/machine.json.
    """
    devices = []
    for item in expect_array(value, "query-memory-devices"):
        entry = expect_object(item, "an entry of query-memory-devices")
        kind = expect_str(entry.get("type"), "the type of a memory device")
        data = expect_object(entry.get("data"), f"the data of a memory device {quote(kind)}")
        what = f"of a memory device {quote(kind)}"
        absent = "max-size" in data  # virtio-mem and hv-balloon: "size" is the plugged size
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
    """Return the last element of a QOM path, for example ``m0`` for ``/objects/m0``."""
    return path.rsplit("/", 1)[-1]


def memdev_nodes(
    ranges: Sequence[FlatRange],
    memdevs: Sequence[Memdev],
    devices: Sequence[MemoryDevice],
    nodes: Sequence[NumaNode],
) -> dict[str, int]:
    """Return the guest NUMA nodes of backends, by the id of the backend.

    ``query-memory-devices`` reports the node of each memory device. No monitor command reports the
    node of a ``-numa node,memdev=`` backend. However, QEMU lays out boot memory in the order of the
    nodes (``numa_init_memdev_container()``, hw/core/numa.c). Therefore the function assigns the
    backends in address order to the nodes in numerical order. If the sizes of these backends and
    nodes do not match, the result contains none of these backends.
    """
    found = {d.memdev: d.node for d in devices if d.memdev is not None and d.node is not None}
    plugged = {device.memdev for device in devices}
    by_id = {memdev.id: memdev for memdev in memdevs}
    boot: dict[str, None] = {}  # a set in insertion order
    for item in ranges:
        name = _memdev_of(item.name, by_id)
        if name is not None and name not in plugged:
            boot.setdefault(name)
    with_memory = [node for node in nodes if node.base]
    sizes = [by_id[name].size >> 20 << 20 for name in boot]
    if sizes == [node.base for node in with_memory]:
        found.update(zip(boot, (node.node for node in with_memory), strict=True))
    return found


@dataclass(frozen=True, slots=True)
class MemorySection:
    """A section of guest memory that is contiguous for the guest and in QEMU.

    :ivar name: The memory region's name in the monitor.
    :ivar gpa: Guest-physical address.
    :ivar size: Size in bytes.
    :ivar hva: Host virtual address in QEMU, or 0 if the address is unknown. Only a skipped section
        can have an unknown address.
    :ivar offset: Offset in the RAM block, in bytes.
    :ivar page_size: Page size of the backing in bytes (4096 also with THP).
    :ivar memdev: Id of the memory backend, or None if the section has none.
    :ivar device: ``dimm``, ``nvdimm``, ``virtio-mem``, ``virtio-pmem`` … or None for boot RAM.
    :ivar share: Whether QEMU maps the backend shared, or None if this is unknown.
    :ivar reserve: False if the memory is overcommitted (``reserve=off``), or None if this is
        unknown.
    :ivar node: Guest NUMA node, or None if the node is unknown.
    :ivar skipped: The reason why a run must skip this section, or None if a run can prefault it.
    :ivar skip_code: A stable name for the value of ``skipped``: ``rom``, ``read-only``,
        ``read-only-backend``, ``device-memory``, ``rom-device``, ``vfio-bar``, ``no-memslot``,
        ``unaligned``, ``no-ram-block``, ``no-host-address``, ``enclave``.
    :ivar disk_file: Whether the section is a shared file on a disk. Populating the section would
        write to the file.
    :ivar bound_nodes: The host NUMA nodes to which the backend binds its memory, or an empty tuple
        if it may use any node. None if the backend has no policy, and the policy of QEMU's threads
        applies.
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
    bound_nodes: tuple[int, ...] | None = None
    disk_file: bool = False

    @property
    def end(self) -> int:
        """The first guest-physical address after the section."""
        return self.gpa + self.size


#: The area that the chipset can make read-only (hw/pci-host/pam.c).
PAM_START, PAM_END = 0xC0000, 0x100000

_SKIP_TEXT: Final = {
    "rom": "ROM",
    "read-only": "RAM that the chipset has made read-only (PAM)",
    "read-only-backend": "a read-only memory backend",
    "device-memory": "memory of a device, not guest RAM",
    "rom-device": "flash or another ROM device",
    "vfio-bar": "a BAR of an assigned device",
    "no-memslot": "not exactly one KVM memslot",
    "unaligned": "not a whole number of 4 KiB pages",
    "no-ram-block": "QEMU lists no RAM block for this section",
    "no-host-address": "the address in QEMU is unknown",
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
    """Join the monitor's replies into sections of guest memory, ascending by address.

    Every range except plain I/O becomes a section. If a run must not prefault a section, the
    function sets the ``skipped`` field of this section.

    :param hva_of: The host address of the first byte of each range, by the guest-physical address
        of the range. If a range is missing, the function uses the RAM block's address, if QEMU
        reports it.
    :param kvm: Whether the guest runs under KVM (``query-kvm``). Under KVM, the function skips RAM
        that is not a memslot. If ``kvm`` is None, the function assumes KVM if any range is a
        memslot.
    :param node_of: The guest NUMA node of each backend, by the id of the backend
        (:func:`memdev_nodes`).
    :param device_owned: The ids of the backends that belong to devices other than memory devices,
        for example ivshmem. The memory of these backends is device memory and not guest RAM.
    :raises LayoutError: If a range ends beyond its RAM block, if ``gpa2hva`` and the RAM block
        report different addresses, or if RAM ranges share host memory.
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
    """Lookup tables of the monitor's replies, by name.

    With these tables, :func:`build_sections` runs in linear time.
    """

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
            # qemu_ram_set_idstr() (system/physmem.c) prepends the device: 0000:00:01.0/vm0
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
            bound_nodes=_bound_nodes(memdev),
        )

    def _block(self, item: FlatRange, memdev: Memdev | None) -> RamBlock | None:
        block = self.blocks.get(item.name) if item.name else None
        if block is None and memdev is not None:
            # The RAM block of virtio-pmem has no name in QEMU 7.2.
            block = self.blocks.get(memdev.id) or self.nameless.get(memdev.size)
        if block is not None and memdev is not None and item.offset + item.size > block.total:
            raise LayoutError(f"{quote(item.name)} at {item.start:#x} ends beyond its RAM block")
        return block

    def _hva(self, item: FlatRange, block: RamBlock | None, is_ram: bool) -> int:
        reported = self.hva_of.get(item.start, 0)
        if block is None or block.hva is None:
            return reported
        computed = block.hva + item.offset
        if is_ram and reported and reported != computed:
            raise LayoutError(
                f"{quote(item.name)} at {item.start:#x} is at {reported:#x} in QEMU according to "
                f"gpa2hva, but at {computed:#x} according to its RAM block",
                "run qemu-prefault again, because the memory layout may have changed",
            )
        return reported or computed


def is_ram_region(name: str, memdevs: Collection[str]) -> bool:
    """Return whether a memory region is the machine's main RAM or has a backend.

    :param memdevs: The ids of all backends.
    """
    if not memdevs:
        return name in MAIN_RAM_NAMES
    return _memdev_of(name, memdevs) is not None


def _memdev_of(name: str, memdevs: Collection[str]) -> str | None:
    """Return the id of the backend behind the ``name`` region, or None.

    Machine types before 4.0 name memfd and file backends by their full QOM path, ``/objects/m0``
    (``x-use-canonical-path-for-ramblock-id``, hw/core/machine.c).
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
        in_pam = item.start >= PAM_START and item.end <= PAM_END
        if code == "read-only" and (device is not None or not in_pam):
            code = "read-only-backend"  # readonly=on
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
    """Raise an error if two sections of guest RAM overlap in QEMU."""
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


def firmware_ahead(ranges: Sequence[FlatRange]) -> bool | None:
    """Return whether the firmware will still change the memslots of low RAM.

    On pc and q35, SeaBIOS makes QEMU delete and re-create the low-RAM memslot three times. Each
    deletion drops prefaulted entries. In its last step, SeaBIOS write-protects the area at 0xf0000
    (``make_bios_readonly()``, src/fw/shadow.c). Afterwards this area is ``rom`` and has main RAM's
    name.

    :returns: True if the firmware has not completed this last step. False if the firmware has
        completed it, or if the machine is microvm, whose firmware does not change memslots. None if
        the memory layout does not show the state, for example with OVMF in flash.
    """
    low = _range_at(ranges, 0)
    area = _range_at(ranges, BIOS_AREA)
    if low is None or low.kind != "ram" or area is None:
        return None
    if area.name == low.name and area.kind == "rom":
        return False
    if any(item.name.startswith("system.flash") for item in ranges):
        return None
    if area.name == low.name:  # the PAM areas are writable RAM while SeaBIOS runs
        return True if area.kind == "ram" else None
    if area.kind == "rom":  # QEMU maps the ROM itself until SeaBIOS starts
        return True
    # microvm maps its firmware as plain RAM on top of main RAM, and has no PAM.
    return False if area.kind == "ram" else None


def _range_at(ranges: Sequence[FlatRange], gpa: int) -> FlatRange | None:
    return next((item for item in ranges if item.start <= gpa < item.end), None)


def huge_alignment(section: MemorySection, huge_size: int) -> bool:
    """Return whether KVM can map this section with pages of ``huge_size`` bytes.

    If the guest-physical address and the host address differ modulo the page size, KVM uses no
    pages of this size in the whole memslot (``kvm_alloc_memslot_metadata()``, arch/x86/kvm/x86.c).
    """
    return (section.gpa - section.hva) % huge_size == 0


def _bound_nodes(memdev: Memdev | None) -> tuple[int, ...] | None:
    if memdev is None or memdev.policy in (None, "default"):
        return None
    return memdev.host_nodes if memdev.policy == "bind" else ()
