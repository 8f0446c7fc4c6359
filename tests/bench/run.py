# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the measurements, and write docs/benchmarks.md and docs/images/faults.svg.

``make bench`` calls this script. The script prints the results. It writes the page only if the
cache contains results for every part that the page needs. The exit status is 1 if a value exceeds
its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qemu_prefault_lab import open_machine
from qemu_prefault_lab.cache import subdirectory
from qemu_prefault_lab.image import compile_static
from qemu_prefault_lab.patched import build as build_qemu

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent.parent / "docs" / "benchmarks.md"
PYTHON = sys.executable
TOOL = [PYTHON, "-m", "qemu_prefault"]
REPETITIONS = 10
GUEST_MIB = (256, 1024, 4096, 16384)
# Read VmHWM, the peak since exec. ru_maxrss would include the memory of the process before exec
# (exec_mmap() in fs/exec.c).
MEASURED_TOOL = """
import atexit, sys
def peak():
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
atexit.register(peak)
from qemu_prefault.__main__ import main
main()
"""


def log(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


@contextmanager
def qemu(mib: int) -> Iterator[str]:
    """Start a paused QEMU without KVM, and yield the path of its QMP socket.

    QEMU runs on this machine. The guest does not access its memory.
    """
    with tempfile.TemporaryDirectory() as scratch:
        socket = f"{scratch}/qmp"
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-accel", "tcg",
             "-m", str(mib), "-qmp", f"unix:{socket},server=on,wait=off"],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while not os.path.exists(socket) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield socket
        finally:
            process.kill()
            process.wait()


def wall_seconds(argv: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - started


def compare(argv: Sequence[str], base: Sequence[str]) -> tuple[float, float, float]:
    """Return two commands' median durations in seconds, and the ratio of the two."""
    wall_seconds(argv), wall_seconds(base)  # fill the page cache
    pairs = [(wall_seconds(argv), wall_seconds(base)) for _ in range(REPETITIONS)]
    one, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return one, other, one / other


def peak_kib(*arguments: str) -> int:
    result = subprocess.run(
        [PYTHON, "-c", MEASURED_TOOL, *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    return int(next(x for x in result.stderr.splitlines() if x.startswith("VmHWM")).split()[1])


def measure_host() -> dict[str, Any]:
    log("measuring start-up times")
    with qemu(256) as socket:
        dry = [*TOOL, "--qmp", socket, "--populate-only", "--dry-run"]
        found: dict[str, Any] = {
            "dry": compare(dry, [PYTHON, "-c", "import asyncio, click"]),
            "help": compare([*TOOL, "--help"], [PYTHON, "-c", "import click"]),
            "memory": [],
        }
    for mib in GUEST_MIB:
        log(f"measuring the tool's memory with a guest of {mib} MiB")
        with qemu(mib) as socket:
            common = ("--qmp", socket, "--populate-only")
            found["memory"].append(
                (mib, peak_kib(*common, "--dry-run"), peak_kib(*common, "--range", "0+128M"))
            )
    return found


def measure_in_lab(
    script: str, *arguments: str, variant: str = "trixie", patched: bool = False
) -> dict[str, Any]:
    """Run a script in the lab or on this machine, and return its results.

    :param script: The name of a file in this directory. The last line of its output must be JSON.
    :param patched: Also install the patched QEMU on the machine that runs the script.
    """
    qemu = build_qemu(HERE.parent.parent / "patches") if patched else None
    wheels = [Path(wheel) for wheel in os.environ["QEMU_PREFAULT_WHEELS"].split()]
    loop = compile_static(HERE / "loop.c")
    with open_machine(variant) as machine:
        machine.install(wheels)
        machine.put(loop, "/root/bench/loop")
        machine.put(HERE / script, f"/root/bench/{script}")
        machine.put(HERE.parent / "support", "/root/bench/support")
        command = ["python3", f"/root/bench/{script}", "/root/bench/loop", *arguments]
        env = {} if qemu is None else qemu.put_on(machine)
        result = machine.run(command, timeout=7200, env=env)
        return {
            "kernel": machine.run(["uname", "-r"]).text.strip(),
            "qemu": machine.run(["qemu-system-x86_64", "--version"]).text.split()[3],
            "results": json.loads(result.text.splitlines()[-1]),
        }


#: The measurements. Each takes minutes and can be run separately.
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "host": measure_host,
    "restore": lambda: measure_in_lab("restore.py"),
    "incoming": lambda: measure_in_lab("incoming.py"),
    "plugin": lambda: measure_in_lab("plugin.py"),
    "running": lambda: measure_in_lab("running.py"),
    "agents": lambda: measure_in_lab("agents.py", patched=True),
    "plugin-sid": lambda: measure_in_lab("plugin.py", "nothing", "plugin", variant="sid"),
}

#: Parts that may be absent from the page, because they need the patched QEMU or another image.
OPTIONAL = ("agents", "plugin-sid", "running")


def measure(wanted: Sequence[str]) -> dict[str, Any]:
    """Return the results of all parts.

    :param wanted: The parts to measure. The results for the other parts come from the cache.
    """
    found = {}
    for name, part in PARTS.items():
        kept = subdirectory("bench") / f"{name}.json"
        if name in wanted:
            log(name)
            result = part()
            kept.write_text(json.dumps(result))
        if kept.exists():
            found[name] = json.loads(kept.read_text())
    return found


def median(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


#: For each limit: the name of the value, the value, the limit, and whether the limit is met.
Bars = list[tuple[str, str, str, bool]]


def plugin_bars(where: str, boots: dict[str, list[dict[str, Any]]]) -> Bars:
    nothing, plugin = boots["nothing"], boots["plugin"]
    faults = 100 * median(plugin, "faults") / median(nothing, "faults")
    share = 100 * statistics.median(row["again_seconds"] / row["seconds"] for row in plugin)
    time = median_ratio(plugin, nothing)
    # Divide by the faults of the first boot, because microvm's second boot takes nearly none.
    second = 100 * median(second_boots(plugin), "faults") / median(nothing, "faults")
    return [
        (f"{where}: faults of a boot, share of those without the plugin", f"{faults:.3f} %",
         "<= 0.05 %", faults <= 0.05),
        (f"{where}: faults of the second boot, share of the first boot's without the plugin",
         f"{second:.3f} %", "<= 0.05 %", second <= 0.05),
        (f"{where}: time until 256 MiB are written / the same without the plugin", f"{time:.2f}",
         "<= 0.7", time <= 0.7),
        (f"{where}: time spent on prefaulting again, share of the boot", f"{share:.2f} %", "<= 2 %",
         share <= 2),
        *(idle_bar(where, boots, *of) for of in IDLE if "keep=off" in boots),
    ]  # fmt: skip


#: The values that an idle plugin must not change: the key, the name in the table, and the
#: tolerance. The tolerance for memory allows for the plugin's own memory.
IDLE = (
    ("seconds", "seconds until 256 MiB are written", 0),
    ("exits", "exits except for interrupts", 0),
    ("anonymous_mib", "QEMU's anonymous memory in MiB", 1),
)


def idle_bar(
    where: str, boots: dict[str, list[dict[str, Any]]], key: str, name: str, more: float
) -> tuple[str, str, str, bool]:
    """Return a limit for a value measured with the idle plugin.

    The limit is the maximum value measured without the plugin.
    """
    most = max(row[key] for row in boots["nothing"]) + more
    off = median(boots["keep=off"], key)
    bar = f"<= {most:,.1f}, the maximum without the plugin" + (f" + {more:g}" if more else "")
    return f"{where}: `keep=off`: {name}", f"{off:,.1f}", bar, off <= most


def second_boots(boots: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    return [row["second"] for row in boots]


def median_ratio(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> float:
    """Return the median of each round's ratio between two durations.

    The function compares durations from the same round, because the host's load is similar within
    a round.
    """
    return statistics.median(
        float(row["seconds"]) / float(other["seconds"])
        for row, other in zip(rows, base, strict=True)
    )


def plugin_section(part: dict[str, Any]) -> tuple[list[str], Bars]:
    """Return the section about the plugin on one kernel, and its limits."""
    plugin, release = part["results"], part["kernel"].partition("-")[0]
    bars = [
        bar
        for machine, boots in plugin["4k"].items()
        for bar in plugin_bars(f"{machine}, {release}", boots)
    ]
    lines = [
        "",
        f"## The plugin, on kernel {part['kernel']}, QEMU {part['qemu']}",
        "",
        "A guest with 384 MiB of 4K pages boots and writes 256 MiB. Each value is the median of "
        f"{len(next(iter(plugin['4k'].values()))['nothing'])} rounds. A round measures each row of "
        "a machine type once. *seconds* is the time from the start of QEMU until the guest has "
        "written the memory, and includes prefaulting. *ratio* is the median of the rounds' ratios "
        "to *nothing*. *again* is the time that the plugin spent on prefaulting memory again. "
        "QEMU's `prealloc=on` option fills the host's page tables and leaves the stage-2 tables "
        "empty.",
        "",
        "| machine | option | seconds | ratio | stage-2 faults | second boot s | "
        "second boot faults | populate s | again s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for machine, boots in plugin["4k"].items():
        for way, rows in boots.items():
            cells = [machine, way, f"{median(rows, 'seconds'):.1f}",
                     f"{median_ratio(rows, boots['nothing']):.2f}",
                     f"{median(rows, 'faults'):,.0f}"]  # fmt: skip
            if "second" in rows[0]:
                cells += [f"{median(second_boots(rows), 'seconds'):.1f}",
                          f"{median(second_boots(rows), 'faults'):,.0f}"]  # fmt: skip
            if way == "plugin":
                cells += [f"{median(rows, 'populate_seconds'):.2f}",
                          f"{median(rows, 'again_seconds'):.3f}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells + [''] * (9 - len(cells)))} |")
    lines += [
        "",
        "With transparent huge pages, a boot takes fewer faults, and the plugin avoids most of "
        "them:",
        "",
        "| machine | faults without the plugin | faults with the plugin |",
        "|---|--:|--:|",
    ]
    for machine, faults in plugin["thp"].items():
        lines.append(f"| {machine} | {faults['nothing']:,} | {faults['plugin']:,} |")
        share = 100 * faults["plugin"] / faults["nothing"]
        what = f"{machine}, {release}, THP: faults of a boot, share of those without the plugin"
        bars.append((what, f"{share:.1f} %", "<= 3 %", share <= 3))
    return lines, bars


def incoming_section(part: dict[str, Any]) -> tuple[list[str], Bars]:
    """Return the section about live migration, and its limits."""
    rounds: Sequence[dict[str, Any]] = part["results"]
    nothing, tool = ([row[way] for row in rounds] for way in ("nothing", "qemu-prefault"))
    share = 100 * median(tool, "faults") / median(nothing, "faults")
    fast = statistics.median(row["first"] / row["steady"] for row in tool)
    added = statistics.median(row["qemu-prefault"]["added"] / row["loop"] for row in rounds)
    bars = [
        ("live migration: stage-2 faults on the destination, share of those without the tool",
         f"{share:.3f} %", "<= 1 %", share <= 1),
        ("live migration: first pass / steady pass on the destination", f"{fast:.2f}", "<= 1.5",
         fast <= 1.5),
        ("live migration: blackout that the tool adds / bare ioctl over the same 512 MiB",
         f"{added:.3f}", "<= 1.2", added <= 1.2),
    ]  # fmt: skip
    lines = [
        "",
        "## Live migration",
        "",
        "A guest with 512 MiB of 4K pages writes 384 MiB repeatedly and migrates within one host. "
        f"Each value is the median of {len(rounds)} rounds. A round measures each row once.",
        "",
        "- *blackout* is the time between the STOP event on the source and the RESUME event on the "
        "destination, according to QEMU's timestamps. *blackout* varies, because the guest writes "
        "faster than QEMU can send.",
        "- *added* is the part of *blackout* after the destination has reported that all RAM is "
        "loaded.",
        "- *first pass* and *steady pass* are the guest's first and second pass over its memory "
        "after another migration, in which the guest does not write until the migration has "
        "ended.",
        "",
        "| on the destination | stage-2 faults | first pass s | steady pass s | blackout s | "
        "added s | prefault s | bare ioctl s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rows in (("nothing", nothing), ("`--incoming`", tool)):
        cells = [name, f"{median(rows, 'faults'):,.0f}", f"{median(rows, 'first'):.3f}",
                 f"{median(rows, 'steady'):.3f}", f"{median(rows, 'blackout'):.2f}"]  # fmt: skip
        if rows is tool:
            cells += [f"{median(rows, 'added'):.3f}", f"{median(rows, 'prefault'):.3f}",
                      f"{median(rounds, 'loop'):.3f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells + [''] * (8 - len(cells)))} |")
    return lines, bars


def running_section(part: dict[str, Any]) -> tuple[list[str], Bars]:
    """Return the section about running guests, and its limit."""
    ways = part["results"]
    longer = 1000 * (median(ways["plugin"], "gap") - median(ways["idle"], "gap"))
    bars = [
        ("running guest: longest gap while the tool prefaults through the plugin, beyond that of a "
         "guest without the tool", f"{longer:.1f} ms", "<= 15 ms", longer <= 15),
    ]  # fmt: skip
    lines = [
        "",
        "## Running guests",
        "",
        "A guest with 512 MiB of 4K pages writes the same 4 MiB all the time, while the tool "
        "prefaults its other memory. *gap* is the longest time between the ends of two passes over "
        "the 4 MiB, on the guest's clock, which stops during a pause. *faults* counts the faults "
        "in which KVM maps a page when the guest then uses 384 MiB. Each value is the median of "
        f"{len(ways['idle'])} interleaved rounds. *idle* runs no tool.",
        "",
        "| way | gap s | paused s | faults | whole run s |",
        "|---|--:|--:|--:|--:|",
    ]
    for way, rows in ways.items():
        cells = [way, *(f"{median(rows, key):.3f}" for key in ("gap", "paused"))]
        cells += [f"{median(rows, 'faults'):,.0f}", f"{median(rows, 'seconds'):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines, bars


def agents_section(part: dict[str, Any]) -> tuple[list[str], Bars]:
    """Return the section that compares the agents, and an empty list of limits."""
    ways = part["results"]
    lines = [
        "",
        "## Comparison of the agents",
        "",
        "A guest (microvm) with 352 MiB of 4K pages has written 256 MiB and is restored. Each "
        f"value is the median of {len(ways['nothing'])} rounds. A round measures each row once. "
        "*nothing*, *attach* and *plugin* use Debian's QEMU. *qmp*, *job* and *prefault=on* use "
        "the [patched QEMU](usage/patched-qemu.md). *job* is QEMU's job without the tool. "
        "*blackout* is the time from the end of the restore to the guest's first instruction, "
        "without the start of Python.",
        "",
        "| agent or option | stage-2 faults | first pass s | steady pass s | prefault s | "
        "blackout s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way, rows in ways.items():
        cells = [way, f"{median(rows, 'faults'):,.0f}"]
        cells += [f"{median(rows, key):.3f}" for key in ("first", "steady", "prefault", "blackout")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines, []


def restore_section(part: dict[str, Any]) -> tuple[list[str], Bars]:
    """Return the sections about a restored guest, and their limits."""
    lab = part["results"]
    nothing, tool = lab["restore"]["nothing"], lab["restore"]["qemu-prefault"]
    share = 100 * median(tool, "faults") / median(nothing, "faults")
    slow = [row["first"] / row["steady"] for row in nothing]
    fast = [row["first"] / row["steady"] for row in tool]
    ratios = [pair["tool"] / pair["loop"] for pair in lab["loop"]]
    bars = [
        ("restore: stage-2 faults of the first pass over 256 MiB, share of those without the tool",
         f"{share:.3f} %", "<= 0.1 %", share <= 0.1),
        ("restore: first pass / steady pass, with the tool", f"{statistics.median(fast):.2f}",
         "<= 1.5", statistics.median(fast) <= 1.5),
        ("`seconds.prefault` / time of a bare C loop, 1 GiB of 4K pages, one vCPU",
         f"{statistics.median(ratios):.3f}", "<= 1.1", statistics.median(ratios) <= 1.1),
    ]  # fmt: skip
    lines = [
        "",
        "## First pass after a restore",
        "",
        "A guest with 4K pages has written 256 MiB and is restored. *first pass* is the guest's "
        "first pass over this memory, and *steady pass* is the median of the following passes. "
        f"Each value is the median of {len(tool)} rounds. A round measures each row once. *ratio* "
        "is *first pass* divided by *steady pass*.",
        "",
        "| done before the guest is resumed | stage-2 faults | first pass s | steady pass s | "
        "ratio | populate s | prefault s |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| nothing | {median(nothing, 'faults'):,.0f} | {median(nothing, 'first'):.3f} | "
        f"{median(nothing, 'steady'):.3f} | {statistics.median(slow):.0f} | | |",
        f"| qemu-prefault | {median(tool, 'faults'):,.0f} | {median(tool, 'first'):.3f} | "
        f"{median(tool, 'steady'):.3f} | {statistics.median(fast):.2f} | "
        f"{median(tool, 'populate'):.3f} | {median(tool, 'prefault'):.3f} |",
        "",
        "## Comparison with a bare loop",
        "",
        "`tests/bench/loop.c` is a minimal VMM that issues the ioctl for the same chunks of "
        "32 MiB. The table shows seconds per GiB of 4K pages with one vCPU. For each row, both "
        "programs run once. Their order alternates from row to row:",
        "",
        "| qemu-prefault | loop | ratio |",
        "|--:|--:|--:|",
        *(f"| {p['tool']:.3f} | {p['loop']:.3f} | {p['tool'] / p['loop']:.3f} |"
          for p in lab["loop"]),
        "",
        f"The fastest time of qemu-prefault is {min(p['tool'] for p in lab['loop']):.3f}. The "
        f"fastest time of the loop is {min(p['loop'] for p in lab['loop']):.3f}. Their ratio is "
        f"{min(p['tool'] for p in lab['loop']) / min(p['loop'] for p in lab['loop']):.3f}. "
        "The lab has one CPU, so other work of the tool increases the tool's time, especially on "
        "a busy host.",
        "",
        "## Other work of the tool",
        "",
        "The tool runs three times in succession on one restored guest of 352 MiB in the lab. "
        "`total` does not include the start of Python:",
        "",
        "| run | populate s | prefault s | total s |",
        "|---|--:|--:|--:|",
        *(f"| {name} | {s['populate']:.3f} | {s['prefault']:.3f} | {s['total']:.3f} |"
          for name, s in lab["repeated"].items()),
    ]  # fmt: skip
    return lines, bars


def host_section(host: dict[str, Any]) -> tuple[list[str], Bars]:
    """Return the sections about start-up time and memory, and their limits."""
    peaks = [max(row[1:]) for row in host["memory"]]
    growth = (max(peaks) - min(peaks)) / 1024
    bars = [
        ("`--dry-run` / `python -c 'import asyncio, click'`", f"{host['dry'][2]:.2f}", "<= 3",
         host["dry"][2] <= 3),
        ("`--help` / `python -c 'import click'`", f"{host['help'][2]:.2f}", "<= 2",
         host["help"][2] <= 2),
        ("difference of the tool's peak memory between guests of 256 MiB to 16 GiB",
         f"{growth:.1f} MiB", "<= 2 MiB", growth <= 2),
    ]  # fmt: skip
    lines = [
        "",
        "## Start-up time of the tool",
        "",
        "The next table shows the start-up time of two commands on the machine that runs "
        f"`make bench`. Each value is the median of {REPETITIONS} runs, in seconds of wall time:",
        "",
        "| command | s | compared with | s |",
        "|---|--:|---|--:|",
        f"| `--populate-only --dry-run` | {host['dry'][0]:.3f} | `import asyncio, click` | "
        f"{host['dry'][1]:.3f} |",
        f"| `--help` | {host['help'][0]:.3f} | `import click` | {host['help'][1]:.3f} |",
        "",
        "## Memory of the tool",
        "",
        "This table shows the tool's peak resident set (VmHWM) with `--populate-only` on the "
        "machine that runs `make bench`. The guests have not accessed their memory:",
        "",
        "| guest | `--dry-run` over all memory | `--range 0+128M` |",
        "|--:|--:|--:|",
        *(f"| {mib} MiB | {dry / 1024:.1f} MiB | {ranged / 1024:.1f} MiB |"
          for mib, dry, ranged in host["memory"]),
    ]  # fmt: skip
    return lines, bars


#: For each part, the function that returns the part's sections, in the page's order.
SECTIONS: dict[str, Callable[[dict[str, Any]], tuple[list[str], Bars]]] = {
    "restore": restore_section,
    "host": host_section,
    "incoming": incoming_section,
    "plugin": plugin_section,
    "plugin-sid": plugin_section,
    "running": running_section,
    "agents": agents_section,
}


def report(found: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the text of docs/benchmarks.md, and the names of the missed limits.

    :param found: The results by name of the part. The text contains only the sections of these
        parts.
    """
    lines: list[str] = []
    bars: Bars = []
    for name, section in SECTIONS.items():
        if name in found:
            more_lines, more_bars = section(found[name])
            lines += more_lines
            bars += more_bars
    lab = next((part for part in found.values() if "kernel" in part), None)
    guests = (
        f"The kernel is {lab['kernel']} and QEMU is {lab['qemu']}, unless a section names others. "
        if lab
        else ""
    )
    text = [
        "# Benchmarks",
        "",
        "`make bench` writes this page. If the KVM of the machine that runs `make bench` can "
        "prefault, the guests run on this machine. Otherwise they run in the nested lab. "
        f"{guests}The counts of each run are exact. They differ slightly between runs, because the "
        "guest's own behaviour differs. Compare seconds from the lab only within one table.",
        "",
        "| quantity | measured | limit | result |",
        "|---|--:|--:|---|",
        *(f"| {what} | {got} | {bar} | {'met' if ok else '**missed**'} |"
          for what, got, bar, ok in bars),
        *lines,
    ]  # fmt: skip
    return "\n".join(text) + "\n", [what for what, _, _, ok in bars if not ok]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure, and write docs/benchmarks.md.")
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[*PARTS, []],  # argparse checks an empty list against the choices
        metavar="PART",
        help=f"measure only these parts ({', '.join(PARTS)}), and read the other parts from "
        "the cache. If the cache lacks a part, print the results and do not write the page. "
        "Default: all parts.",
    )
    wanted = parser.parse_args().parts or list(PARTS)
    found = measure(wanted)
    absent = [name for name in PARTS if name not in found and name not in OPTIONAL]
    if absent:
        text, missed = report({name: found[name] for name in wanted})
        log(f"docs/benchmarks.md is unchanged, because the cache lacks {', '.join(absent)}")
    else:
        text, missed = report(found)
        TARGET.write_text(text)
        subprocess.run([PYTHON, HERE / "picture.py"], check=True)
    print(text)
    for what in missed:
        log(f"limit missed: {what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
