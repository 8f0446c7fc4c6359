# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the demo that runs on the machine with KVM.

A guest with 4K pages writes 256 MiB for the first time. The scenario measures this guest with three
methods: no prefaulting, a bare ``KVM_PRE_FAULT_MEMORY`` over all guest RAM, and qemu-prefault. It
measures each method at boot and after a restore from a file. At boot, the memory is
untouched. After a restore, QEMU has just written the memory. ``python -m
qemu_prefault_lab.scenario`` prints events to stdout, one JSON object per line.
:mod:`qemu_prefault_lab.demo` displays these events.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from qemu_prefault import connect
from qemu_prefault.agents.base import Kind, Range
from qemu_prefault.agents.ptrace import PtraceAgent
from qemu_prefault.errors import FailedError, QemuPrefaultError, UnsupportedError

from .guest import Guest, mmu

WORKLOAD_MIB: Final = 256
MEMORY_MIB: Final = 352
# microvm's firmware does not make QEMU delete memslots, so tables that were filled before the first
# instruction remain filled.
MACHINE: Final = "microvm"
STEADY_PASSES: Final = 5

NOTHING, BARE, TOOL = WAYS = ("nothing", "bare ioctl", "qemu-prefault")


@dataclass(frozen=True)
class DemoCase:
    """One row of the demo's table."""

    moment: str
    way: str


CASES: Final = tuple(DemoCase(moment, way) for moment in ("boot", "restore") for way in WAYS)


@dataclass(frozen=True)
class Cost:
    """The durations of populating and prefaulting, in seconds."""

    populate: float = 0.0
    prefault: float = 0.0


@dataclass(frozen=True)
class Measured:
    """The result of a case, with durations in seconds.

    :ivar faults: The number of stage-2 faults (``pf_taken``) from power-on or ``cont`` to the end
        of the first pass.
    :ivar first_pass: The duration of the first pass, in which the guest writes its 256 MiB for the
        first time.
    :ivar steady_pass: The median duration of the following passes over the same memory.
    :ivar spent: The duration of prefaulting.
    """

    faults: int
    first_pass: float
    steady_pass: float
    spent: Cost


def tell(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Disable transparent huge pages for processes that are started within the block.

    Children inherit the setting of prctl(PR_SET_THP_DISABLE), and execve() keeps it. The prctl()
    does not change the machine's setting.
    """
    prctl = ctypes.CDLL(None).prctl

    def disable_huge_pages(flag: int) -> None:
        prctl(41, *(ctypes.c_ulong(value) for value in (flag, 0, 0, 0)))

    disable_huge_pages(1)
    try:
        yield
    finally:
        disable_huge_pages(0)


async def bare_ioctl(guest: Guest) -> Cost:
    """Call KVM_PRE_FAULT_MEMORY over all guest RAM without populating it first."""
    async with connect(str(guest.qmp_path)) as vm:
        agent = PtraceAgent(vm.process, await vm.vcpu_threads((), True))
        await agent.start()
        try:
            sections = [s for s in vm.state.sections if s.skipped is None]
            ranges = [Range(Kind.STAGE2, section.gpa, section.size) for section in sections]
            await agent.hold_vcpus()
            result = await agent.run({0: ranges}, lambda done: None)
        finally:
            await agent.close()
    return Cost(prefault=result.seconds)


def run_tool(guest: Guest) -> Cost:
    """Run the ``qemu-prefault`` command, as a user would."""
    argv = [sys.executable, "-m", "qemu_prefault", "--qmp", str(guest.qmp_path), "--json"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        raise FailedError(
            f"qemu-prefault exited with {result.returncode}", result.stderr or result.stdout
        )
    seconds = json.loads(result.stdout)["seconds"]
    return Cost(seconds["populate"], seconds["prefault"])


def prepare(guest: Guest, way: str) -> Cost:
    if way == BARE:
        return asyncio.run(bare_ioctl(guest))
    return run_tool(guest) if way == TOOL else Cost()


@contextlib.contextmanager
def counting(guest: Guest, row: int) -> Iterator[None]:
    """Report the fault counter periodically while the guest runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            tell("faults", row=row, faults=guest.stats()["pf_taken"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measure(case: DemoCase, row: int, state: Path) -> Measured:
    """Run one case, and return its measurements.

    The first case that boots a guest saves the guest to ``state``. The cases that restore a guest
    load this file.
    """
    restored = case.moment == "restore"
    tell("step", row=row, text="restoring" if restored else "starting")
    with small_pages():
        guest = Guest(
            machine=MACHINE,
            memory_mib=MEMORY_MIB,
            workload_mib=0 if restored else WORKLOAD_MIB,
            paused=True,
            incoming=state if restored else None,
        )
    with guest:
        if restored:
            guest.wait_restored()
        if case.way != NOTHING:
            tell("step", row=row, text="prefaulting")
        spent = prepare(guest, case.way)
        tell("step", row=row, text="first pass" if restored else "booting")
        before = guest.stats()["pf_taken"]
        guest.qmp("cont")
        with counting(guest, row):
            first = guest.command("pass") if restored else guest.wait_ready()
        faults = guest.stats()["pf_taken"] - before
        tell("step", row=row, text="steady passes")
        passes = [guest.command("pass") for _ in range(STEADY_PASSES)]
        if any(answer["bad"] for answer in (*([first] if restored else []), *passes)):
            raise FailedError("the guest's memory has changed", "please report this bug")
        if not restored and not state.exists():
            tell("step", row=row, text="saving the guest")
            guest.save(state)
    steady = statistics.median(float(answer["seconds"]) for answer in passes)
    return Measured(faults, float(first["seconds"]), steady, spent)


def run() -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise UnsupportedError(
            "qemu-system-x86_64 is not installed", "apt-get install qemu-system-x86"
        )
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True)
    tell("machine", kernel=os.uname().release, qemu=version.stdout.split()[3], mmu=mmu())
    with tempfile.TemporaryDirectory(prefix="qemu-prefault-demo-") as scratch:
        for row, case in enumerate(CASES):
            started = time.monotonic()
            measured = measure(case, row, Path(scratch) / "state")
            seconds = time.monotonic() - started
            tell("row", row=row, **asdict(case), **asdict(measured), seconds=round(seconds, 1))


def main() -> int:
    try:
        run()
    except QemuPrefaultError as error:
        tell("error", cause=error.cause, remedy=error.remedy)
        return int(error.exit_status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
