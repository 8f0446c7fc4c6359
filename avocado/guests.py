# SPDX-License-Identifier: GPL-2.0-or-later
"""The base class of the distribution tests, and the measurements of their guests."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from avocado import Test

from qemu_prefault_lab.guest import reserve_hugepages, thp
from qemu_prefault_lab.machine import NO_UEFI, kvm_can_prefault, uefi_aborts
from qemu_prefault_lab.system import SystemGuest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support import health
from support.tool import Tool

MIB = 1 << 20
DATA_MIB = 64
DATA_PAGES = DATA_MIB << 8
HUGEPAGES = 512  # enough for two guests
TOOL_SECONDS = 900.0
HEALTH_SECONDS = 900.0
PLUGGABLE = "slots=2,maxmem=2G"


@dataclass(frozen=True)
class Sample:
    """The duration of one phase of a guest, and the guest's faults in this phase.

    :ivar seconds: The wall-clock time in seconds.
    :ivar faults: The increase of KVM's ``pf_taken`` counter.
    :ivar emulated: The number of these faults that were accesses to device registers
        (``pf_emulate``). Prefaulting cannot avoid them.
    """

    seconds: float
    faults: int
    emulated: int

    @property
    def memory_faults(self) -> int:
        """The number of faults that were not accesses to device registers."""
        return self.faults - self.emulated

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.memory_faults} faults on memory"


class Stopwatch:
    """A measurement of time and a guest's faults that starts in the constructor."""

    def __init__(self, guest: SystemGuest, from_its_start: bool = False) -> None:
        self.guest = guest
        counters = {} if from_its_start else guest.stats()
        self.before = counters.get("pf_taken", 0), counters.get("pf_emulate", 0)
        self.started = time.monotonic()

    def sample(self) -> Sample:
        seconds = time.monotonic() - self.started
        counters = self.guest.stats()
        taken, emulated = self.before
        return Sample(
            round(seconds, 2), counters["pf_taken"] - taken, counters["pf_emulate"] - emulated
        )


class PrefaultTest(Test):
    """A test on the kind of virtual machine that the varianter's parameters select."""

    timeout = 7200
    distro: str
    boot_files: str | None

    def prepare(self) -> None:
        """Prepare the boot files, and set ``self.distro``, the name used in reports."""
        raise NotImplementedError

    def setUp(self) -> None:
        self.guests: list[SystemGuest] = []
        self.rows: list[dict[str, Any]] = []
        self.undo: list[Callable[[], object]] = []
        get = self.params.get
        self.hardware: dict[str, Any] = {
            "machine": get("machine", default="pc"),
            "backing": get("backing", default="ram"),
            "firmware": get("firmware", default="seabios"),
            "smp": int(get("vcpus", default=1)),
            "memory_mib": int(get("memory_mib", default=512)),
        }
        self.can_plug = not self.hardware["machine"].startswith("microvm")
        if self.can_plug:
            self.hardware["memory"] = PLUGGABLE
        self.pages = get("thp", default="never")
        self.hugetlb = self.hardware["backing"] == "hugetlb"
        self.prepare()
        if not kvm_can_prefault():
            self.cancel("this host's KVM cannot prefault. Run make avocado, which uses the lab.")
        if self.hardware["firmware"] == "ovmf" and uefi_aborts():
            self.cancel(NO_UEFI)
        self.undo.append(partial(thp, thp(self.pages)))
        if self.hugetlb:
            self.undo.append(partial(reserve_hugepages, 0))
            if reserve_hugepages(HUGEPAGES) < HUGEPAGES:
                self.cancel(f"the host does not have {HUGEPAGES} free hugetlb pages of 2 MiB")

    def tearDown(self) -> None:
        for guest in self.guests:
            log = guest.serial_log.decode(errors="replace").replace("\r", "")
            (Path(self.logdir) / f"console-{guest.pid}.log").write_text(log)
            guest.kill()
        for undo in self.undo:
            undo()
        self.whiteboard = json.dumps(self.rows)

    # Helpers for the tests.

    def start_tool(self, guest: SystemGuest, *arguments: str) -> Tool:
        """Start ``qemu-prefault --qmp … --json`` on a guest."""
        return Tool(["--qmp", str(guest.qmp_path), "--json", *arguments], fork=False)

    def prefault(self, guest: SystemGuest, *arguments: str) -> dict[str, Any]:
        """Run the tool, check the byte counts in its report, and return the report."""
        return self.start_tool(guest, *arguments).finish(TOOL_SECONDS).complete()

    def check_health(self, guest: SystemGuest) -> None:
        """Check that the guest's system is up, without failed units or kernel errors."""
        health.check_health(lambda command: guest.shell(command, HEALTH_SECONDS, check=False))

    def report(self, event: str, without: Sample | None, with_: Sample) -> None:
        """Log a row of the results table, and keep the row for the test's whiteboard."""
        row: dict[str, Any] = {"distro": self.distro, "moment": event, "pages": self.pages}
        row |= {key: self.hardware[key] for key in ("machine", "backing", "firmware", "smp")}
        row |= {"without": without and asdict(without), "with": asdict(with_)}
        self.rows.append(row)
        self.log.info("%s: %s: without: %s; with: %s", self.distro, event, without, with_)

    def start(self, overlay: Path, **options: Any) -> SystemGuest:
        """Start a guest. tearDown() saves the guest's console log and kills the guest."""
        guest = SystemGuest(self.boot_files, overlay, **self.hardware, **options)
        self.guests.append(guest)
        return guest

    def wait_kept(self, guest: SystemGuest) -> dict[str, Any]:
        """Wait until the plugin has prefaulted all memory and return the plugin's status."""
        deadline = time.monotonic() + TOOL_SECONDS
        while (status := guest.control("status"))["pending"]:
            self.assertLess(time.monotonic(), deadline, status)
            guest.shell("true")
        counters = status["counters"]
        self.assertEqual((counters["errors"], counters["stuck"]), (0, 0))
        return status

    def spared(self, event: str, without: Sample, with_: Sample, least: int, part: float) -> None:
        """Check that prefaulting leaves at most the fraction ``part`` of the faults.

        :param least: The minimum number of faults that the guest must take without prefaulting.
        """
        self.report(event, without, with_)
        if self.pages == "never" and not self.hugetlb:
            self.assertGreaterEqual(without.memory_faults, least)
            self.assertLessEqual(with_.memory_faults, part * without.memory_faults)
