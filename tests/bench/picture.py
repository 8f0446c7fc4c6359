# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw docs/images/faults.svg from the tables of docs/benchmarks.md.

``make bench`` draws the picture after it has written docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 760, 210, 90, 76, 50, 15

#: The picture has a background, so that it is readable in viewers that ignore the media query.
STYLE = """
    .page { fill: #ffffff } .text { fill: #1f2328 } .note { fill: #59636e }
    .without { fill: #9a6700 } .with { fill: #0969da }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117 } .text { fill: #f0f6fc } .note { fill: #9198a1 }
      .without { fill: #d29922 } .with { fill: #4493f8 }
    }
    text { font: 14px system-ui, "DejaVu Sans", sans-serif } .title { font-weight: 600 }
    .note, .value { font-size: 12px }
"""


@dataclass(frozen=True)
class Pair:
    """The stage-2 faults in one situation, without and with qemu-prefault."""

    name: str
    detail: str
    without: int
    prefaulted: int


def rows_of(page: str, heading: str) -> Iterator[list[str]]:
    """Yield the cells of each table row below the first heading with this prefix."""
    inside = False
    for line in page.splitlines():
        if line.startswith("## "):
            if inside:
                return
            inside = line.startswith(f"## {heading}")
        elif inside and line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def count(cell: str) -> int:
    return int(cell.replace(",", ""))


def read_pairs(page: str) -> list[Pair]:
    """Return the pairs of measurements that the picture shows.

    :param page: The text of docs/benchmarks.md.
    :raises StopIteration, ValueError: If a table differs from the form that run.py writes.
    """

    def two(heading: str, tool: str) -> tuple[int, int]:
        found = {row[0]: count(row[1]) for row in list(rows_of(page, heading))[1:]}
        return found["nothing"], found[tool]

    boots = {tuple(row[:2]): row for row in rows_of(page, "The plugin, on kernel") if len(row) > 3}
    pairs = [
        Pair("restore", "256 MiB", *two("First pass after a restore", "qemu-prefault")),
        Pair("live migration", "384 MiB, --incoming", *two("Live migration", "`--incoming`")),
    ]
    for machine in ("pc", "q35", "microvm"):
        plain, plugin = boots[machine, "nothing"], boots[machine, "plugin"]
        pairs.append(Pair(f"boot, {machine}", "256 MiB, plugin", count(plain[4]), count(plugin[4])))
    plain, plugin = boots["pc", "nothing"], boots["pc", "plugin"]
    pairs.append(Pair("reset, pc", "256 MiB, plugin", count(plain[6]), count(plugin[6])))
    return pairs


def draw(pairs: list[Pair]) -> str:
    """Return the picture as SVG, with two bars for each pair on one linear scale."""
    height = TOP + ROW * len(pairs) + 8
    scale = (WIDTH - LEFT - RIGHT) / max(pair.without for pair in pairs)
    summary = "; ".join(f"{p.name}: {p.without:,} without, {p.prefaulted:,} with" for p in pairs)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-labelledby="title desc">',
        '<title id="title">Stage-2 faults without and with qemu-prefault</title>',
        f'<desc id="desc">{escape(summary)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
        '<text class="text title" x="20" y="30">Stage-2 faults until the guest has written its '
        "memory once, with 4K pages</text>",
    ]
    x = 20
    for name, label in (("without", "without"), ("with", "with qemu-prefault")):
        lines += [
            f'<rect class="{name}" x="{x}" y="44" width="12" height="12"/>',
            f'<text class="note" x="{x + 18}" y="54">{label}</text>',
        ]
        x += 90
    for index, pair in enumerate(pairs):
        y = TOP + ROW * index
        lines += [
            f'<text class="text" x="20" y="{y + 14}">{escape(pair.name)}</text>',
            f'<text class="note" x="20" y="{y + 31}">{escape(pair.detail)}</text>',
        ]
        for name, value, top in (("without", pair.without, y), ("with", pair.prefaulted, y + 19)):
            length = max(1.5, value * scale)
            lines += [
                f'<rect class="{name}" x="{LEFT}" y="{top + 2}" width="{length:.1f}" '
                f'height="{BAR}"/>',
                f'<text class="text value" x="{LEFT + length + 8:.1f}" y="{top + 14}">'
                f"{value:,}</text>",
            ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def write(page: str) -> Path:
    """Draw the picture from the text of docs/benchmarks.md, and return its path."""
    target = DOCS / "images" / "faults.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(draw(read_pairs(page)))
    return target


if __name__ == "__main__":
    print(write((DOCS / "benchmarks.md").read_text()), file=sys.stderr)
