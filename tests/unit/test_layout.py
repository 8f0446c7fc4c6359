# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the layout parsers on captured output of several QEMU releases."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qemu_prefault.errors import LayoutError
from qemu_prefault.qemu.hmp import (
    FlatRange,
    NumaNode,
    RamBlock,
    RangeKind,
    parse_gpa2hva,
    parse_mtree,
    parse_numa,
    parse_ramblocks,
)
from qemu_prefault.qemu.memory_map import (
    MemoryDevice,
    MemorySection,
    build_sections,
    firmware_ahead,
    huge_alignment,
    memdev_nodes,
    parse_memdevs,
    parse_memory_devices,
)

DATA = Path(__file__).parents[1] / "data" / "monitor"
CAPTURES = sorted(path.name for path in DATA.glob("*.txt"))
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def capture(name: str) -> dict[str, str]:
    """Return the captured replies of one QEMU, as a mapping from command to reply."""
    text = (DATA / name).read_text()
    parts = re.split(r"^### (?:HMP|QMP) (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def sections_of(name: str) -> tuple[MemorySection, ...]:
    answers = capture(name)
    return build_sections(
        parse_mtree(answers["info mtree -f"]),
        parse_ramblocks(answers["info ramblock"]),
        parse_memdevs(json.loads(answers["query-memdev"])["return"]),
        parse_memory_devices(json.loads(answers["query-memory-devices"])["return"]),
        {},
    )


PC_ROMS = [
    (0xC0000, 0x20000, "pc.rom", "rom"),
    (0xE0000, 0x20000, "pc.bios", "rom"),
    (0xFFFC0000, 0x40000, "pc.bios", "rom"),
]

EXPECTED = {
    "kvm-microvm-256.txt": (
        [
            (0, 0xE0000, 0x7FD2AFE00000, "microvm.ram", None),
            (MIB, 255 * MIB, 0x7FD2AFF00000, "microvm.ram", None),
        ],
        [
            (0xE0000, 0x20000, "pc.bios", "device-memory"),
            (0xFFFE0000, 0x20000, "pc.bios", "device-memory"),
        ],
    ),
    "kvm-pc-256.txt": (
        [
            (0, 0xC0000, 0x7F7CD7E00000, "pc.ram", None),
            (MIB, 255 * MIB, 0x7F7CD7F00000, "pc.ram", None),
        ],
        PC_ROMS,
    ),
    "kvm-pc-5g.txt": (
        [
            (0, 0xC0000, 0x7FDCABE00000, "pc.ram", None),
            (MIB, 3 * GIB - MIB, 0x7FDCABF00000, "pc.ram", None),
            (4 * GIB, 2 * GIB, 0x7FDD6BE00000, "pc.ram", None),
        ],
        PC_ROMS,
    ),
    "kvm-pc-dimm.txt": (
        [
            (0, 0xC0000, 0x7F43B3E00000, "pc.ram", None),
            (MIB, GIB - MIB, 0x7F43B3F00000, "pc.ram", None),
            (4 * GIB, 512 * MIB, 0x7F43FBE00000, "dm0", "dimm"),
        ],
        PC_ROMS,
    ),
    "kvm-q35-256.txt": (
        [
            (0, 0xC0000, 0x7FCBAFE00000, "pc.ram", None),
            (MIB, 255 * MIB, 0x7FCBAFF00000, "pc.ram", None),
        ],
        PC_ROMS,
    ),
    "kvm-q35-5g.txt": (
        [
            (0, 0xC0000, 0x7F03BBE00000, "pc.ram", None),
            (MIB, 2 * GIB - MIB, 0x7F03BBF00000, "pc.ram", None),
            (4 * GIB, 3 * GIB, 0x7F043BE00000, "pc.ram", None),
        ],
        PC_ROMS,
    ),
    "kvm-q35-memfd.txt": (
        [
            (0, 0xC0000, 0x7FD8FFFFF000, "m0", None),
            (MIB, GIB - MIB, 0x7FD9000FF000, "m0", None),
        ],
        PC_ROMS,
    ),
    "kvm-q35-virtio-mem.txt": (
        [
            (0, 0xC0000, 0x7F660BE00000, "pc.ram", None),
            (MIB, GIB - MIB, 0x7F660BF00000, "pc.ram", None),
            (4 * GIB, 2 * GIB, 0x7F6653FFF000, "vm0", "virtio-mem"),
        ],
        PC_ROMS,
    ),
    "tcg-pc-256.txt": (
        [
            (0, 0xC0000, 0x7F53A3E00000, "pc.ram", None),
            (MIB, 255 * MIB, 0x7F53A3F00000, "pc.ram", None),
        ],
        PC_ROMS,
    ),
}


def test_every_capture_has_an_expectation() -> None:
    assert sorted(EXPECTED) == CAPTURES


@pytest.mark.parametrize("name", CAPTURES)
def test_sections_of_each_capture(name: str) -> None:
    sections = sections_of(name)
    ram = [(s.gpa, s.size, s.hva, s.memdev, s.device) for s in sections if s.skipped is None]
    rest = [(s.gpa, s.size, s.name, s.skip_code) for s in sections if s.skipped is not None]
    assert (ram, rest) == EXPECTED[name]
    assert [s.gpa for s in sections] == sorted(s.gpa for s in sections)
    assert {s.page_size for s in sections} == {4096}


@pytest.mark.parametrize("name", CAPTURES)
def test_line_endings_are_ignored(name: str) -> None:
    text = capture(name)["info mtree -f"]
    assert parse_mtree(text.replace("\n", "\r\n")) == parse_mtree(text)
    blocks = capture(name)["info ramblock"]
    assert parse_ramblocks(blocks.replace("\n", "\r\n")) == parse_ramblocks(blocks)


@pytest.mark.parametrize("name", CAPTURES)
def test_gpa2hva_supplies_missing_host_addresses(name: str) -> None:
    """Parse replies without the HVA and RO columns, which QEMU 7.2 does not print."""
    answers = capture(name)
    width = answers["info ramblock"].index("Total") + len("Total")
    old = "\n".join(line[:width] for line in answers["info ramblock"].split("\n"))
    assert "HVA" not in old
    blocks = parse_ramblocks(old)
    assert {block.hva for block in blocks} == {None}
    assert [b.name for b in blocks] == [b.name for b in parse_ramblocks(answers["info ramblock"])]
    want = sections_of(name)
    got = build_sections(
        parse_mtree(answers["info mtree -f"]),
        blocks,
        parse_memdevs(json.loads(answers["query-memdev"])["return"]),
        parse_memory_devices(json.loads(answers["query-memory-devices"])["return"]),
        {section.gpa: section.hva for section in want},
    )
    assert got == want


def test_section_has_backend_attributes() -> None:
    ram = {s.memdev: s for s in sections_of("kvm-q35-virtio-mem.txt") if s.skipped is None}
    assert (ram["vm0"].share, ram["vm0"].reserve, ram["vm0"].node) == (True, False, 0)
    assert (ram["pc.ram"].share, ram["pc.ram"].reserve, ram["pc.ram"].node) == (False, True, None)


# --- mtree ---

VIEW = 'FlatView #1\n AS "memory", root: system\n Root memory region: system\n'


def view(*lines: str) -> str:
    return VIEW + "".join(f"  {line}\n" for line in lines) + "\n"


def test_decoy_views_are_ignored() -> None:
    text = (
        'FlatView #0\n AS "device-memory", root: device-memory\n Root memory region: dm0\n'
        "  0000000000000000-000000001fffffff (prio 0, ram): dm0\n\n"
        'FlatView #1\n AS "cpu-smm-0", root: memory\n Root memory region: memory\n'
        "  0000000000000000-000000001fffffff (prio 0, ram): decoy\n\n"
        + view("0000000000000000-0000000000000fff (prio 0, ram): m0 KVM")
        + 'FlatView #3\n AS "I/O", root: io\n'
    )
    assert parse_mtree(text) == (FlatRange(0, 4096, "ram", False, "m0", 0, True),)


@pytest.mark.parametrize(
    ("rest", "want"),
    [
        ("(prio 0, ram): pc.ram @0000000000100000 KVM", ("ram", False, "pc.ram", MIB, True)),
        ("(prio 0, ram): pc.ram KVM KVM", ("ram", False, "pc.ram", 0, True)),
        ("(prio -1, nv-ram): nv0", ("ram", True, "nv0", 0, False)),
        (
            "(prio 1, ramd): 0000:00:1a.0 BAR 0 mmaps[0] KVM",
            ("ramd", False, "0000:00:1a.0 BAR 0 mmaps[0]", 0, True),
        ),
        ("(prio 0, romd): system.flash0 KVM", ("romd", False, "system.flash0", 0, True)),
        ("(prio 0, rom): /rom@etc/acpi KVM", ("rom", False, "/rom@etc/acpi", 0, True)),
        ("(prio 0, i/o): a @b @0000000000000010", ("i/o", False, "a @b", 16, False)),
        ("(prio 4096, i/o): ", ("i/o", False, "", 0, False)),
    ],
)
def test_line_forms(rest: str, want: tuple[RangeKind, bool, str, int, bool]) -> None:
    (found,) = parse_mtree(view(f"0000000000100000-00000000001fffff {rest}"))
    assert found == FlatRange(MIB, MIB, *want)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no view"),
        ("FlatView #0\n", "no view"),
        (' AS "memory", root: system\n  No rendered FlatView\n', "has no machine"),
        (VIEW, "empty"),
        (view("garbage"), "'  garbage' is not a memory range"),
        (view("0000000000001000-0000000000000fff (prio 0, ram): a"), "ends before it starts"),
        (view("0000000000000000-0010000000000000 (prio 0, ram): a"), "52-bit"),
        (view("0000000000000000-0000000000000fff (prio 0, ram): a @ffffffffffffffff"), "offset"),
        (view("0000000000000000-0000000000000fff (prio 0, ram): a",
              "0000000000000fff-0000000000001fff (prio 0, ram): b"), "overlaps"),
        (view("0000000000002000-0000000000002fff (prio 0, ram): a",
              "0000000000000000-0000000000000fff (prio 0, ram): b"), "overlaps"),
        (view("0" * 2000), "2002 characters"),
    ],
)  # fmt: skip
def test_impossible_map_error_names_the_line(text: str, why: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse_mtree(text)
    assert why in str(caught.value)
    assert caught.value.code == "layout"


# --- ramblock, gpa2hva, numa ---

RAMBLOCK_72 = (
    "              Block Name    PSize              Offset               Used              Total\n"
    "        0000:00:01.0/vm0    2 MiB  0x0000000000000000 0x0000000020000000 0x0000000020000000\n"
    "                            4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\n"
    "    a name with (spaces)    1 GiB  0x0000000000000000 0x0000000040000000 0x0000000040000000\n"
)


def test_qemu_7_2_ramblocks() -> None:
    assert parse_ramblocks(RAMBLOCK_72) == (
        RamBlock("0000:00:01.0/vm0", 2 * MIB, 512 * MIB, 512 * MIB, None),
        RamBlock("", 4096, 256 * MIB, 256 * MIB, None),  # virtio-pmem's name is empty
        RamBlock("a name with (spaces)", GIB, GIB, GIB, None),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Block Name\n",
        "Block Name  PSize  Offset\n",
        "Block Name  PSize  Offset  Used  Total\npc.ram\n",
        "Block Name  PSize  Offset  Used  Total\npc.ram 3 KiB 0x0 0x0 0x0\n",
        "Block Name  PSize  Offset  Used  Total\npc.ram 4 KiB 0x0 0x2 0x1\n",
        "Block Name  PSize  Offset  Used  Total\npc.ram 4 KiB 0x0 x 0x1\n",
        "Block Name  PSize  Offset  Used  Total  HVA  RO\npc.ram 4 KiB 0x0 0x1 0x1 rw\n",
    ],
)
def test_impossible_ramblocks(text: str) -> None:
    with pytest.raises(LayoutError):
        parse_ramblocks(text)


def test_gpa2hva() -> None:
    answer = "Host virtual address for 0x100000 (pc.ram) is 0x7f745bf00000\r\n"
    assert parse_gpa2hva(answer) == ("pc.ram", 0x7F745BF00000)
    for bad in (
        "",
        "No memory is mapped at address 0x100000",
        "Memory at address 0xfee00000 is not RAM",
        "Host virtual address for 0x0 (pc.ram) is 0x0",
        "Host virtual address for 0x0 (pc.ram) is 0xffffffffffffffff",
    ):
        with pytest.raises(LayoutError):
            parse_gpa2hva(bad)


INFO_NUMA = (
    "2 nodes\r\nnode 0 cpus: 0\r\nnode 0 size: 512 MB\r\nnode 0 plugged: 0 MB\r\n"
    "node 1 cpus: 1\r\nnode 1 size: 1024 MB\r\nnode 1 plugged: 512 MB\r\n"
)


def test_numa() -> None:
    assert parse_numa(INFO_NUMA) == (NumaNode(0, 512 * MIB, 0), NumaNode(1, 512 * MIB, 512 * MIB))
    assert parse_numa("0 nodes\r\n") == ()
    with pytest.raises(LayoutError):
        parse_numa("node 0 size: 1 MB\nnode 0 plugged: 2 MB\n")


def memdev(name: str, size: object = 512 * MIB, **more: object) -> dict[str, object]:
    return {"id": name, "size": size, "share": False, "reserve": True, "host-nodes": [], **more}


def test_nodes_of_boot_backends_follow_address_order() -> None:
    ranges = parse_mtree(
        view(
            "0000000000000000-00000000000bffff (prio 0, ram): a KVM",
            "0000000000100000-000000001fffffff (prio 0, ram): a @0000000000100000 KVM",
            "0000000020000000-000000003fffffff (prio 0, ram): b KVM",
            "0000000100000000-000000011fffffff (prio 0, ram): d KVM",
        )
    )
    memdevs = parse_memdevs([memdev("b"), memdev("d"), memdev("a"), memdev("unused")])
    dimm = MemoryDevice("dimm", "dimm0", "d", 4 * GIB, 512 * MIB, 1)
    nodes = parse_numa(INFO_NUMA)
    assert memdev_nodes(ranges, memdevs, [dimm], nodes) == {"a": 0, "b": 1, "d": 1}
    # If the sizes do not match, only the nodes of DIMMs are certain.
    swapped = (NumaNode(0, GIB, 0), nodes[1])
    assert memdev_nodes(ranges, memdevs, [dimm], swapped) == {"d": 1}
    assert memdev_nodes(ranges, memdevs, [], ()) == {}


# --- JSON ---


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [1],
        [[]],
        [{"id": 1}],
        [{"id": "a"}],
        [memdev("a", size=-1)],
        [memdev("a", size=True)],
        [memdev("a", share="no")],
        [memdev("a") | {"host-nodes": [-1]}],
        [memdev("a"), memdev("a")],
        [memdev("a", size=10**5000)],
    ],
)
def test_invalid_memdevs(value: object) -> None:
    with pytest.raises(LayoutError):
        parse_memdevs(value)


def test_memory_devices_of_each_kind() -> None:
    found = parse_memory_devices(
        [
            {"type": "virtio-pmem",
             "data": {"memdev": "/objects/p", "memaddr": 4096, "size": 8192, "id": "x"}},
            {"type": "virtio-mem",
             "data": {"memdev": "/objects/v", "memaddr": 1, "size": 2, "max-size": 3, "node": 1,
                      "block-size": 4, "requested-size": 5}},
            {"type": "hv-balloon", "data": {"max-size": 0, "size": 0}},
        ]
    )  # fmt: skip
    assert found == (
        MemoryDevice("virtio-pmem", "x", "p", 4096, 8192, None),
        MemoryDevice("virtio-mem", None, "v", 1, 3, 1, plugged=2, requested=5),
        MemoryDevice("hv-balloon", None, None, None, 0, None, plugged=0),
    )


# --- build_sections ---


def build(
    *lines: str, hva: int | None = 0x7F0000000000, kvm: bool | None = None
) -> tuple[MemorySection, ...]:
    blocks = [RamBlock("m0", 4096, GIB, GIB, hva)]
    memdevs = parse_memdevs([memdev("m0", GIB)])
    return build_sections(parse_mtree(view(*lines)), blocks, memdevs, [], {}, kvm=kvm)


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ("(prio 0, ram): m0 KVM", None),
        ("(prio 0, nv-ram): m0 KVM", None),
        ("(prio 0, ram): /objects/m0 KVM", None),
        ("(prio 0, ram): m0", "no-memslot"),
        ("(prio 0, rom): m0 KVM", "read-only-backend"),
        ("(prio 0, rom): pc.bios KVM", "rom"),
        ("(prio 1, ram): vga.vram KVM", "device-memory"),
        ("(prio 1, ram): /devices/m0 KVM", "device-memory"),
        ("(prio 0, romd): system.flash0 KVM", "rom-device"),
        ("(prio 0, ramd): 0000:00:1a.0 BAR 0 mmaps[0] KVM", "vfio-bar"),
        ("(prio 0, ram): m0 @0000000000000010 KVM", "unaligned"),
    ],
)
def test_skip_codes(rest: str, code: str | None) -> None:
    (section,) = build(f"0000000000100000-00000000001fffff {rest}", kvm=True)
    assert section.skip_code == code
    assert (section.skipped is None) == (code is None)


def test_read_only_ram_below_1_mib_is_pam() -> None:
    (section,) = build("00000000000c0000-00000000000fffff (prio 1, rom): m0 @00000000000c0000 KVM")
    assert section.skip_code == "read-only" and "PAM" in str(section.skipped)
    (section,) = build("0000000000000000-000000000009ffff (prio 0, rom): m0 KVM")
    assert section.skip_code == "read-only-backend"


def test_io_is_not_a_section() -> None:
    assert build("00000000fee00000-00000000feefffff (prio 4096, i/o): kvm-apic-msi KVM") == ()


def test_range_beyond_its_block_is_rejected() -> None:
    line = "0000000000000000-0000000040000fff (prio 0, ram): m0 KVM"
    with pytest.raises(LayoutError, match="beyond its RAM block"):
        build(line)


def test_overlapping_host_ranges_are_rejected() -> None:
    with pytest.raises(LayoutError, match="shares memory"):
        build(
            "0000000000000000-0000000000001fff (prio 0, ram): m0 KVM",
            "0000000000002000-0000000000003fff (prio 0, ram): m0 @0000000000001000 KVM",
        )


def test_gpa2hva_and_ramblock_must_agree() -> None:
    ranges = parse_mtree(view("0000000000000000-0000000000000fff (prio 0, ram): m0 KVM"))
    blocks, memdevs = [RamBlock("m0", 4096, GIB, GIB, 0x1000)], parse_memdevs([memdev("m0", GIB)])
    assert build_sections(ranges, blocks, memdevs, [], {0: 0x1000})[0].hva == 0x1000
    with pytest.raises(LayoutError, match="gpa2hva"):
        build_sections(ranges, blocks, memdevs, [], {0: 0x2000})


def test_section_without_address_or_block_is_skipped() -> None:
    line = "0000000000000000-0000000000000fff (prio 0, ram): m0 KVM"
    assert [section.skip_code for section in build(line, hva=None)] == ["no-host-address"]
    ranges, memdevs = parse_mtree(view(line)), parse_memdevs([memdev("m0", GIB)])
    assert build_sections(ranges, [], memdevs, [], {0: 4096})[0].skip_code == "no-ram-block"
    nameless = [RamBlock("", 4096, GIB, GIB, None)]
    assert build_sections(ranges, nameless, memdevs, [], {0: 4096})[0].skip_code is None


@pytest.mark.parametrize("hva", [0x7F0000000001, (1 << 56) - GIB])
def test_impossible_host_addresses_are_rejected(hva: int) -> None:
    ranges = parse_mtree(view("0000000000000000-0000000000000fff (prio 0, ram): m0 KVM"))
    blocks, memdevs = [RamBlock("m0", 4096, GIB, GIB, None)], parse_memdevs([memdev("m0", GIB)])
    if hva % 4096 == 0:
        hva += GIB - 4096
    with pytest.raises(LayoutError, match="impossible host address"):
        build_sections(ranges, blocks, memdevs, [], {0: hva})


# --- firmware state ---

LOW = "0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM"
HIGH = "0000000000100000-000000000fffffff (prio 0, ram): pc.ram @0000000000100000 KVM"
FLASH = "00000000ffc00000-00000000ffffffff (prio 0, romd): system.flash0 KVM"


@pytest.mark.parametrize(
    ("lines", "ahead"),
    [
        ([LOW, "00000000000e0000-00000000000fffff (prio 0, rom): pc.bios KVM", HIGH], True),
        ([LOW, "00000000000f0000-00000000000fffff (prio 0, rom): pc.ram @00000000000f0000", HIGH],
         False),
        (["0000000000000000-000000000fffffff (prio 0, ram): pc.ram KVM"], True),
        ([LOW, "00000000000e0000-00000000000fffff (prio 0, ram): pc.bios KVM", HIGH], False),
        ([LOW, "00000000000e0000-00000000000fffff (prio 0, rom): isa-bios KVM", HIGH, FLASH], None),
        (["0000000000000000-000000000fffffff (prio 0, ram): pc.ram KVM", FLASH], None),
        ([LOW, "00000000000f0000-00000000000fffff (prio 0, rom): pc.ram @00000000000f0000", FLASH],
         False),
        ([LOW, HIGH], None),
        ([HIGH], None),
        ([LOW, "00000000000f0000-00000000000fffff (prio 0, i/o): x"], None),
    ],
)  # fmt: skip
def test_firmware_ahead(lines: list[str], ahead: bool | None) -> None:
    assert firmware_ahead(parse_mtree(view(*lines))) is ahead


@pytest.mark.parametrize("name", CAPTURES)
def test_captures_precede_firmware(name: str) -> None:
    ahead = firmware_ahead(parse_mtree(capture(name)["info mtree -f"]))
    assert ahead is ("microvm" not in name)


def test_memfd_is_never_huge() -> None:
    for name, huge in (("kvm-pc-5g.txt", True), ("kvm-q35-memfd.txt", False)):
        ram = [s for s in sections_of(name) if s.skipped is None]
        assert {huge_alignment(section, 2 * MIB) for section in ram} == {huge}
        assert {huge_alignment(section, GIB) for section in ram} == {False}
        assert {huge_alignment(section, 4 * KIB) for section in ram} == {True}
