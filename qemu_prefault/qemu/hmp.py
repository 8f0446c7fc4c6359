# SPDX-License-Identifier: GPL-2.0-or-later
"""Parse the replies of QEMU's human monitor (HMP) to memory queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from ..errors import LayoutError
from ..units import PAGE_SIZE
from .qapi import quote

RangeKind = Literal["ram", "rom", "romd", "ramd", "i/o"]

#: The architectural limit of x86 physical addresses (MAXPHYADDR, Intel SDM vol. 3, 4.1.4).
MAX_GPA: Final = 1 << 52
#: The end of user space on an x86-64 host with 5-level page tables.
MAX_HVA: Final = 1 << 56

#: Maximum length of a line. The parsers check the length before they match a line, so that every
#: pattern below takes linear time. A RAM block's name is at most 256 characters long
#: (include/exec/ramblock.h).
MAX_LINE: Final = 1024


def _lines(text: str, what: str) -> Iterator[str]:
    """Yield the lines of a reply without LF or CRLF, and check their lengths."""
    for line in text.split("\n"):
        if len(line) > MAX_LINE:
            raise LayoutError(f'"{what}" contains a line of {len(line)} characters')
        yield line.rstrip("\r")


@dataclass(frozen=True, slots=True)
class FlatRange:
    """One range of guest-physical memory, from one line of a FlatView.

    The range contains the addresses ``start..start+size-1``.

    :ivar offset: The number of bytes from the start of the ``name`` memory region. For RAM, this is
        the offset in the RAM block.
    :ivar kvm: Whether a KVM memslot covers exactly this range (``kvm_accel_has_memory()``,
        accel/kvm/kvm-all.c).
    """

    start: int
    size: int
    kind: RangeKind
    nonvolatile: bool
    name: str
    offset: int
    kvm: bool

    @property
    def end(self) -> int:
        """The first guest-physical address after the range."""
        return self.start + self.size


# mtree_print_flatview() in system/memory.c. Names may contain spaces, '@' and parentheses.
_RANGE: Final = re.compile(
    r"  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio (-?[0-9]{1,10}), (nv-)?(ramd|romd|rom|ram|i/o)\): "
    r"(.*?)(?: @([0-9a-f]{16}))?((?: KVM)*)"
)
_SYSTEM_VIEW: Final = re.compile(r' AS "memory", root: system(?:, alias .*)?')


def parse_mtree(text: str) -> tuple[FlatRange, ...]:
    """Return the ranges of guest-physical memory in ``info mtree -f``, ascending.

    The text contains one FlatView for each distinct address space, in the order of a hash table.
    This function reads the FlatView of the ``memory`` address space with root ``system``. Other
    FlatViews have the same format but different addresses. The addresses in the ``device-memory``
    view are relative to the start of device memory. ``cpu-smm-0`` describes the memory in SMM.

    :param text: The reply to the HMP command, in lines that end with LF or CRLF.
    :raises LayoutError: If the view is missing, or if a line of the view is malformed or
        impossible.
    """
    lines = list(_lines(text, "info mtree -f"))
    index = 0
    while index < len(lines) and not _SYSTEM_VIEW.fullmatch(lines[index]):
        index += 1
    if index == len(lines):
        raise LayoutError(
            'the monitor\'s "info mtree -f" contains no view of the "memory" address space'
        )
    ranges: list[FlatRange] = []
    for line in lines[index + 1 :]:
        if not line.strip() or line.startswith("FlatView"):
            break
        if line.startswith((" AS ", " Root memory region:")):
            continue
        if line.strip() == "No rendered FlatView":
            raise LayoutError(
                "this QEMU has no machine (-M none)", "start QEMU with a machine type, e.g. -M q35"
            )
        found = _parse_range(line)
        if ranges and found.start < ranges[-1].end:
            raise _bad_line(line, "overlaps the range before it")
        ranges.append(found)
    if not ranges:
        raise LayoutError('the monitor\'s "info mtree -f" shows an empty "memory" address space')
    return tuple(ranges)


def _parse_range(line: str) -> FlatRange:
    match = _RANGE.fullmatch(line)
    if match is None:
        raise _bad_line(line, "is not a memory range")
    first, last = int(match[1], 16), int(match[2], 16)  # QEMU prints the inclusive end
    if last < first:
        raise _bad_line(line, "ends before it starts")
    if last >= MAX_GPA:
        raise _bad_line(line, "is beyond 52-bit physical addresses")
    offset = int(match[7], 16) if match[7] else 0
    if offset + (last - first) >= MAX_GPA:
        raise _bad_line(line, "has an impossible offset")
    return FlatRange(
        start=first,
        size=last - first + 1,
        kind=cast(RangeKind, match[5]),
        nonvolatile=match[4] is not None,
        name=match[6],
        offset=offset,
        # QEMU prints "KVM" once for each address space of the view for which KVM has a memory
        # listener.
        kvm=bool(match[8]),
    )


def _bad_line(line: str, why: str) -> LayoutError:
    return LayoutError(f'in "info mtree -f" the line {quote(line)} {why}')


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One QEMU RAM block, which is a contiguous mapping in QEMU's address space.

    ``page_size``, ``used`` and ``total`` are in bytes. ``hva`` is the host virtual address, or None
    before QEMU 8.1.
    """

    name: str
    page_size: int
    used: int
    total: int
    hva: int | None


_SIZE: Final = re.compile(r"(.*?)\s+([0-9]{1,4})\s(B|[KMGTPE]iB)")
_UNITS: Final = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "PiB": 50, "EiB": 60}
_HEX: Final = re.compile(r"0x[0-9a-f]{1,16}")


def parse_ramblocks(text: str) -> tuple[RamBlock, ...]:
    """Return the RAM blocks in the reply to ``info ramblock``.

    The reply to ``x-query-ramblock`` has the same format. The heading of the reply contains the
    names of the columns. QEMU 8.1 and later print the host address (``ram_block_format()``,
    system/physmem.c).

    :raises LayoutError: If the heading or a line has an unknown format.
    """
    lines = list(_lines(text, "info ramblock"))
    heading = 0
    while heading < len(lines) and not lines[heading].lstrip().startswith("Block Name"):
        heading += 1
    if heading == len(lines):
        raise LayoutError('the monitor\'s "info ramblock" contains no heading')
    columns = re.split(r"\s{2,}", lines[heading].strip())
    if columns[:2] != ["Block Name", "PSize"] or not {"Used", "Total"} <= set(columns):
        raise LayoutError(f'"info ramblock" contains unknown columns {quote(lines[heading])}')
    tail = columns[2:]
    blocks = []
    for line in lines[heading + 1 :]:
        if line.strip():
            blocks.append(_parse_ramblock(line, tail))
    return tuple(blocks)


def _parse_ramblock(line: str, columns: Sequence[str]) -> RamBlock:
    cells = line.rsplit(maxsplit=len(columns))
    values = dict(zip(columns, cells[1:], strict=False))
    match = _SIZE.fullmatch(" " + cells[0])
    hexes = {key: values.get(key, "") for key in ("Used", "Total")}
    if "HVA" in columns:
        hexes["HVA"] = values.get("HVA", "")
    if match is None or not all(_HEX.fullmatch(cell) for cell in hexes.values()):
        raise LayoutError(
            f'"info ramblock" contains the line {quote(line)}, which has an unknown format'
        )
    page_size = int(match[2]) << _UNITS[match[3]]
    used, total = int(hexes["Used"], 16), int(hexes["Total"], 16)
    hva = int(hexes["HVA"], 16) if "HVA" in hexes else None
    if not PAGE_SIZE <= page_size <= 1 << 30 or page_size & (page_size - 1):
        raise LayoutError(f'"info ramblock" contains an impossible page size in {quote(line)}')
    if used > total or total >= MAX_GPA or (hva is not None and hva + total >= MAX_HVA):
        raise LayoutError(f'"info ramblock" contains an impossible size in {quote(line)}')
    return RamBlock(match[1].strip(), page_size, used, total, hva)


_GPA2HVA: Final = re.compile(
    r"Host virtual address for (0x[0-9a-f]{1,16}) \((.*)\) is (0x[0-9a-f]{1,16})"
)


def parse_gpa2hva(text: str) -> tuple[str, int]:
    """Return the memory region's name and the host address from ``gpa2hva``.

    :raises LayoutError: If the guest-physical address is not mapped, or if it is not RAM
        (``gpa2hva()``, monitor/hmp-cmds-target.c).
    """
    text = text.strip()
    match = _GPA2HVA.fullmatch(text) if len(text) <= MAX_LINE else None
    if match is None:
        raise LayoutError(f"gpa2hva returned {quote(text)}")
    hva = int(match[3], 16)
    if not 0 < hva < MAX_HVA:
        raise LayoutError(f"gpa2hva returned an impossible address {quote(text)}")
    return match[2], hva


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One guest NUMA node, with the sizes of its boot RAM and plugged RAM in bytes."""

    node: int
    base: int
    plugged: int


_NUMA_SIZE: Final = re.compile(r"node ([0-9]{1,4}) (size|plugged): ([0-9]{1,12}) MB")


def parse_numa(text: str) -> tuple[NumaNode, ...]:
    """Return the guest's NUMA nodes in the reply to ``info numa``.

    The result is empty if the guest has no NUMA nodes.

    :raises LayoutError: If a node has more plugged memory than total memory.
    """
    sizes: dict[int, dict[str, int]] = {}
    for line in _lines(text, "info numa"):
        match = _NUMA_SIZE.fullmatch(line.strip())
        if match is not None:
            sizes.setdefault(int(match[1]), {})[match[2]] = int(match[3]) << 20
    nodes = []
    for node, found in sorted(sizes.items()):
        # "size" includes "plugged" (query_numa_node_mem(), hw/core/numa.c).
        base = found.get("size", 0) - found.get("plugged", 0)
        if base < 0:
            raise LayoutError(
                f'"info numa" reports more plugged memory than total memory on node {node}'
            )
        nodes.append(NumaNode(node, base, found.get("plugged", 0)))
    return tuple(nodes)
