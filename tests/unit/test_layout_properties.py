# SPDX-License-Identifier: GPL-2.0-or-later
"""Test properties of the layout parsers that hold for any input.

The properties are lossless round trips, a single exception type, and linear time.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_prefault.errors import LayoutError
from qemu_prefault.qemu.hmp import (
    FlatRange,
    RamBlock,
    RangeKind,
    parse_gpa2hva,
    parse_mtree,
    parse_numa,
    parse_ramblocks,
)
from qemu_prefault.qemu.memory_map import (
    build_sections,
    firmware_ahead,
    memdev_nodes,
    parse_memdevs,
    parse_memory_devices,
)

DATA = Path(__file__).parents[1] / "data" / "monitor"
PAGE = 4096

# Names that QEMU may print between "): " and the offset. They contain no line ends, and do not end
# like the fields that follow a name.
names: st.SearchStrategy[str] = st.text(
    st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30
).filter(lambda name: re.search(r"( KVM| @[0-9a-f]{16})$", name) is None)
KINDS: list[RangeKind] = ["ram", "rom", "romd", "ramd", "i/o"]


@st.composite
def flat_views(draw: st.DrawFn) -> tuple[FlatRange, ...]:
    ranges = []
    gpa = 0
    for _ in range(draw(st.integers(1, 8))):
        gpa += draw(st.integers(0, 1 << 30))
        size = draw(st.integers(1, 1 << 40))
        kind = draw(st.sampled_from(KINDS))
        offset = draw(st.integers(0, 1 << 40))
        ranges.append(
            FlatRange(
                gpa, size, kind, draw(st.booleans()), draw(names), offset, draw(st.booleans())
            )
        )
        gpa += size
    return tuple(ranges)


def render(ranges: tuple[FlatRange, ...], newline: str = "\n") -> str:
    """Return the text that mtree_print_flatview() would print for these ranges."""
    lines = ["FlatView #0", ' AS "memory", root: system', " Root memory region: system"]
    for item in ranges:
        lines.append(
            f"  {item.start:016x}-{item.end - 1:016x} (prio 0, "
            f"{'nv-' * item.nonvolatile}{item.kind}): {item.name}"
            + (f" @{item.offset:016x}" if item.offset else "")
            + " KVM" * item.kvm
        )
    return newline.join([*lines, "", ""])


@given(flat_views(), st.sampled_from(["\n", "\r\n"]))
def test_mtree_round_trip(ranges: tuple[FlatRange, ...], newline: str) -> None:
    assert parse_mtree(render(ranges, newline)) == ranges


@given(
    st.lists(
        st.builds(
            RamBlock,
            name=names.map(str.strip).filter(bool).filter(lambda n: "  " not in n),
            page_size=st.sampled_from([4096, 2 << 20, 1 << 30]),
            used=st.integers(0, 1 << 20),
            total=st.integers(1 << 20, 1 << 40),
            hva=st.integers(1, 1 << 47),
        ),
        max_size=6,
    )
)
def test_ramblock_round_trip(blocks: list[RamBlock]) -> None:
    sizes = {4096: "4 KiB", 2 << 20: "2 MiB", 1 << 30: "1 GiB"}
    lines = [f"{'Block Name':>24} {'PSize':>8}  {'Offset':>18} {'Used':>18} {'Total':>18} "
             f"{'HVA':>18}  RO"]  # fmt: skip
    lines += [
        f"{b.name:>24} {sizes[b.page_size]:>8}  {0:#018x} {b.used:#018x} {b.total:#018x} "
        f"{b.hva:#018x}  rw"
        for b in blocks
    ]
    assert parse_ramblocks("\n".join(lines)) == tuple(blocks)


@given(st.text())
def test_arbitrary_text_raises_only_layout_errors(text: str) -> None:
    head = 'FlatView #0\n AS "memory", root: system\n'
    for parse in (parse_mtree, parse_ramblocks, parse_gpa2hva, parse_numa):
        for dressed in (text, head + text, "Block Name  PSize  Used  Total\n" + text):
            with contextlib.suppress(LayoutError):
                parse(dressed)


keys = st.sampled_from(
    [
        *("id", "size", "share", "reserve", "prealloc", "host-nodes", "policy", "type", "data"),
        *("memdev", "addr", "memaddr", "max-size", "node", "block-size", "requested-size"),
    ]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["dimm", "virtio-mem", "/objects/m0"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(keys | st.text(max_size=4), inner, max_size=8)
    ),
    max_leaves=20,
)


@given(json_values | st.lists(st.dictionaries(keys, json_values)))
def test_arbitrary_json_raises_only_layout_errors(value: object) -> None:
    for parse in (parse_memdevs, parse_memory_devices):
        with contextlib.suppress(LayoutError):
            parse(value)


@given(flat_views(), st.dictionaries(st.integers(0, 1 << 42), st.integers(-1, 1 << 60)))
def test_sections_of_arbitrary_views(ranges: tuple[FlatRange, ...], hva_of: dict[int, int]) -> None:
    """Check that sections have an aligned address and keep the order of their ranges."""
    memdevs = parse_memdevs([{"id": item.name, "size": PAGE} for item in ranges[:1]])
    blocks = [RamBlock(ranges[0].name, PAGE, 1 << 41, 1 << 41, None)]
    hva_of |= {item.start: item.start + (1 << 44) for item in ranges[::2]}
    try:
        sections = build_sections(ranges, blocks, memdevs, [], hva_of)
    except LayoutError:
        return
    assert [s.gpa for s in sections] == [item.start for item in ranges if item.kind != "i/o"]
    for section in sections:
        assert (section.skipped is None) == (section.skip_code is None)
        if section.skipped is None:
            assert section.hva > 0 and section.hva % PAGE == section.size % PAGE == 0


def split(text: str) -> dict[str, str]:
    parts = re.split(r"^### (?:HMP|QMP) (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=False))


def swallow(answers: dict[str, str]) -> bool:
    """Run all parsers on the replies and return whether they succeed."""
    try:
        ranges = parse_mtree(answers.get("info mtree -f", ""))
        blocks = parse_ramblocks(answers.get("info ramblock", ""))
        memdevs = parse_memdevs(json.loads(answers.get("query-memdev", "0")).get("return"))
        devices = parse_memory_devices(
            json.loads(answers.get("query-memory-devices", "0")).get("return")
        )
        firmware_ahead(ranges)
        memdev_nodes(ranges, memdevs, devices, ())
        build_sections(ranges, blocks, memdevs, devices, {})
    except (LayoutError, json.JSONDecodeError, AttributeError):  # this function raises the last two
        return False
    return True


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
        at = rng.randrange(len(text))
        choice = rng.randrange(6)
        if choice == 0:
            text = text[:at] + chr(rng.randrange(1, 256)) + text[at + 1 :]
        elif choice == 1:
            text = text[:at] + text[at + rng.randrange(1, 40) :]
        elif choice == 2:
            text = text[:at] + rng.choice("0f@ :-\n\r") * rng.randrange(1, 20) + text[at:]
        elif choice == 3:
            lines[here], lines[there] = lines[there], lines[here]
            text = "\n".join(lines)
        elif choice == 4:
            lines.insert(here, lines[there])
            text = "\n".join(lines)
        else:
            text = "\n".join(lines[:here] + lines[here + 1 :]) or "\n"
    return text


def test_mutated_captures_raise_only_layout_errors() -> None:
    """Mutate captured replies for five seconds.

    The seed is fixed, but the number of mutations depends on the machine's speed.
    """
    texts = [path.read_text() for path in sorted(DATA.glob("*.txt"))]
    assert all(swallow(split(text)) for text in texts)
    rng = random.Random(20261122)
    until = time.monotonic() + 5
    good = bad = 0
    while time.monotonic() < until:
        if swallow(split(mutate(rng.choice(texts), rng))):
            good += 1
        else:
            bad += 1
    assert good > 10 and bad > 10  # the mutations are neither too weak nor too strong


BIG = 1_000_000
LINE = ' AS "memory", root: system\n  0000000000000000-0000000000000fff (prio 0, ram): '
CASES: dict[str, tuple[Callable[[str], object], Callable[[int], str]]] = {
    "many ranges": (
        parse_mtree,
        lambda n: render(
            tuple(
                FlatRange(i * PAGE, PAGE, "ram", False, "m0", i * PAGE, True)
                for i in range(n // 80)
            )
        ),
    ),
    "many views": (parse_mtree, lambda n: 'FlatView #0\n AS "x", root: y\n\n' * (n // 30)),
    # Repeat the suffix " KVM" before other text, which makes the pattern backtrack.
    "many suffixes": (parse_mtree, lambda n: LINE + " KVM" * (n // 40) + "x\n"),
    "many lines of suffixes": (parse_mtree, lambda n: (LINE + " KVM" * 200 + "x\n") * (n // 900)),
    "many blocks": (
        parse_ramblocks,
        lambda n: (
            "Block Name  PSize  Offset  Used  Total\n"
            + f"{'m0':>24}    4 KiB  {0:#018x} {0:#018x} {0:#018x}\n" * (n // 90)
        ),
    ),
    "blanks": (parse_ramblocks, lambda n: "Block Name  PSize" + " " * n),
    "gpa2hva": (parse_gpa2hva, lambda n: "Host virtual address for 0x0 (" + ") is 0x" * (n // 7)),
    "numa": (parse_numa, lambda n: "node 0 size: 1 MB\n" * (n // 18)),
}


@pytest.mark.parametrize("case", CASES)
def test_parsing_takes_linear_time(case: str) -> None:
    """Check that parsing ten times the input takes at most 30 times as long.

    With linear time, parsing takes ten times as long. The factor of three allows for noise.
    """
    parse, make = CASES[case]

    def seconds(size: int) -> float:
        text = make(size)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            with contextlib.suppress(LayoutError):
                parse(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(BIG) < max(30 * seconds(BIG // 10), 0.05)
