# SPDX-License-Identifier: GPL-2.0-or-later
"""Test prefaulting at each lifecycle event, with whole distributions as guests.

Run ``avocado run avocado/distro.py -m avocado/variants.yaml``, or ``make avocado``, which also
provides the images and a KVM that can prefault. Each test writes its figures to its log and,
as JSON, to its whiteboard.

The guests use 4K pages unless a profile selects transparent huge pages or hugetlb. With 2 MiB
pages, a guest takes too few faults to measure the effect.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avocado import fail_on
from guests import DATA_MIB, DATA_PAGES, MIB, TOOL_SECONDS, PrefaultTest, Sample, Stopwatch

from qemu_prefault.errors import QemuPrefaultError
from qemu_prefault_lab.system import SystemGuest, distro_directory, make_overlay

DIMM_MIB = 128  # Linux adds memory in blocks of this size
#: The maximum fraction of a test's faults on memory that may remain with prefaulting.
MOST = 0.01
MOST_OF_A_BOOT = 0.0005
# OVMF reads option ROMs, whose pages are absent, and memory right after it has closed TSEG.
MOST_OF_A_UEFI_BOOT = 0.001
#: The same for a guest that starts before its memory is prefaulted.
MOST_OF_A_BACKGROUND_BOOT = 0.05
#: Rounds of test_start. Each round boots one guest for each way to start.
ROUNDS = 5
WAYS_TO_START: dict[str, list[str]] = {
    "start=wait": ["start=wait"],
    "start=background": ["start=background"],
    "vcpu=borrow": ["vcpu=borrow"],
}


@dataclass(frozen=True)
class Saved:
    """The files of a saved guest.

    The guest has booted, root is logged in, and its memory holds a file with known contents.
    """

    directory: Path
    boot: Sample
    checksum: str

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def overlay(self) -> Path:
        return self.directory / "overlay"


class DistroTest(PrefaultTest):
    """Tests for six lifecycle events, with one distribution on one kind of machine."""

    def prepare(self) -> None:
        self.distro = self.boot_files = self.params.get("distro", default="debian13")
        if not (distro_directory(self.distro) / "disk").exists():
            self.cancel(f"no image of {self.distro} exists. Run make avocado to build it.")

    def blank(self, name: str = "overlay") -> Path:
        overlay = Path(self.workdir) / name
        make_overlay(distro_directory(self.distro) / "disk", overlay)
        return overlay

    def boot(self, **options: Any) -> tuple[SystemGuest, Sample]:
        """Boot a new guest, log in, and return the guest and its boot's measurements."""
        guest = self.start(self.blank(), **options)
        stopwatch = Stopwatch(guest, from_its_start=True)
        guest.wait_login()
        sample = stopwatch.sample()
        guest.log_in()
        self.check_health(guest)
        return guest, sample

    def saved_directory(self) -> Path:
        common = os.environ.get("AVOCADO_TESTS_COMMON_TMPDIR") or self.workdir
        name = "-".join([self.distro, *(str(value) for value in self.hardware.values())])
        return Path(common) / name.replace("/", "_")

    def save(self, guest: SystemGuest, boot: Sample) -> None:
        """Save a guest that booted without prefaulting, for all tests in this job."""
        directory = self.saved_directory()
        directory.mkdir(exist_ok=True)
        guest.fill("data", DATA_MIB)
        checksum = guest.checksum("data")
        guest.shell("sync")
        guest.save(directory / "state", timeout=TOOL_SECONDS)
        shutil.copy(self.overlay_of(guest), directory / "overlay")
        (directory / "saved.json").write_text(
            json.dumps({"boot": asdict(boot), "checksum": checksum})
        )

    def overlay_of(self, guest: SystemGuest) -> Path:
        return Path(next(arg for arg in guest.argv if arg.startswith("file=/")).split(",")[0][5:])

    def saved(self) -> Saved:
        """Return the saved guest, and boot and save it if this job has not done so yet."""
        directory = self.saved_directory()
        if not (directory / "saved.json").exists():
            guest, boot = self.boot()
            self.save(guest, boot)
            guest.kill()
        found = json.loads((directory / "saved.json").read_text())
        return Saved(directory, Sample(**found["boot"]), found["checksum"])

    def copy_of(self, saved: Saved, name: str = "copy") -> Path:
        overlay = Path(self.workdir) / name
        shutil.copy(saved.overlay, overlay)
        return overlay

    def restored(self, saved: Saved, **options: Any) -> SystemGuest:
        """Return a restored guest, which is paused and has empty stage-2 tables."""
        overlay = self.copy_of(saved, f"copy-{len(self.guests)}")
        guest = self.start(overlay, incoming=saved.state, paused=True, **options)
        guest.wait_restored(timeout=TOOL_SECONDS)
        return guest

    def check_data(self, guest: SystemGuest, saved: Saved) -> None:
        """Check that the file in the guest's memory is unchanged."""
        self.assertEqual(guest.checksum("data"), saved.checksum)

    @fail_on(QemuPrefaultError)
    def test_attach(self) -> None:
        """Prefault a running guest, which then writes to new memory."""
        guest, boot = self.boot()
        stopwatch = Stopwatch(guest)
        guest.fill("before", DATA_MIB)
        without = stopwatch.sample()
        self.prefault(guest)
        self.assertEqual(guest.status(), "running")
        stopwatch = Stopwatch(guest)
        guest.fill("after", DATA_MIB)
        self.spared("attach", without, stopwatch.sample(), DATA_PAGES // 2, MOST)
        self.assertEqual(guest.checksum("before"), guest.checksum("after"))
        self.check_health(guest)
        if not (self.saved_directory() / "saved.json").exists():
            guest.shell("rm /dev/shm/before /dev/shm/after")
            self.save(guest, boot)

    @fail_on(QemuPrefaultError)
    def test_boot(self) -> None:
        """Boot to the login prompt with the plugin, and compare the numbers of faults."""
        saved = self.saved()
        guest, with_ = self.boot(plugin=[])
        self.wait_kept(guest)
        uefi = self.hardware["firmware"] == "ovmf"
        most = MOST_OF_A_UEFI_BOOT if uefi else MOST_OF_A_BOOT
        self.spared("boot", saved.boot, with_, DATA_PAGES, most)

    @fail_on(QemuPrefaultError)
    def test_start(self) -> None:
        """Boot to the login prompt without and with the plugin, in interleaved rounds."""
        for number in range(ROUNDS):
            guest, without = self.boot()
            guest.kill()
            for way, options in WAYS_TO_START.items():
                guest, with_ = self.boot(plugin=options)
                guest.kill()
                background = way == "start=background"
                most = MOST_OF_A_BACKGROUND_BOOT if background else MOST_OF_A_BOOT
                self.spared(f"{way}, round {number + 1}", without, with_, DATA_PAGES, most)

    @fail_on(QemuPrefaultError)
    def test_reset(self) -> None:
        """Reset a guest whose QEMU has loaded the plugin."""
        saved = self.saved()
        guest = self.restored(saved, plugin=[])
        guest.qmp("cont")
        self.check_data(guest, saved)
        self.wait_kept(guest)
        guest.reboot()
        stopwatch = Stopwatch(guest)
        guest.wait_login()
        with_ = stopwatch.sample()
        guest.log_in()
        self.check_health(guest)
        self.wait_kept(guest)
        self.spared("reset", saved.boot, with_, DATA_PAGES, MOST_OF_A_BOOT)

    @fail_on(QemuPrefaultError)
    def test_restore(self) -> None:
        """Read a file in the memory of a restored guest."""
        saved = self.saved()
        guest = self.restored(saved)
        stopwatch = Stopwatch(guest, from_its_start=True)
        guest.qmp("cont")
        self.check_data(guest, saved)
        without = stopwatch.sample()
        guest.kill()

        guest = self.start(self.copy_of(saved), incoming="defer")
        tool = self.start_tool(guest, "--incoming")
        tool.wait_ready()
        guest.qmp("migrate-incoming", timeout=TOOL_SECONDS, uri=f"file:{saved.state}")
        tool.finish(TOOL_SECONDS).complete()
        stopwatch = Stopwatch(guest, from_its_start=True)
        self.check_data(guest, saved)
        self.spared("restore", without, stopwatch.sample(), DATA_PAGES, MOST)
        self.check_health(guest)

    @fail_on(QemuPrefaultError)
    def test_migrate(self) -> None:
        """Live-migrate a guest while it writes to its memory."""
        saved = self.saved()
        samples = []
        for prefault in (False, True):
            source = self.restored(saved)
            source.qmp("cont")
            # Start the loop in a subshell. If it were a job of the shell itself, the shell would
            # print a message when the loop ends.
            source.shell("(while :; do date; done >/dev/shm/dates & echo $! >/dev/shm/worker)")
            source.qmp("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=20_000)
            uri = f"unix:{source.directory}/migration"  # self.workdir is too long for a socket
            target = self.start(self.overlay_of(source), incoming=uri)
            if prefault:
                tool = self.start_tool(target, "--incoming")
                tool.wait_ready()
            source.qmp("migrate", uri=uri)
            source.wait_migrated(timeout=TOOL_SECONDS)
            source.kill()
            if prefault:
                tool.finish(TOOL_SECONDS).complete()
            target.wait_running()
            stopwatch = Stopwatch(target, from_its_start=True)
            self.check_data(target, saved)
            samples.append(stopwatch.sample())
            target.shell("kill $(cat /dev/shm/worker)")
            self.check_health(target)
            target.kill()
        without, with_ = samples
        self.spared("migrate", without, with_, DATA_PAGES, MOST)

    @fail_on(QemuPrefaultError)
    def test_hotplug(self) -> None:
        """Plug two DIMMs, and prefault only the second one before the guest writes to it."""
        if not self.can_plug:
            self.cancel(f"{self.hardware['machine']} has no slots for memory hotplug")
        saved = self.saved()
        guest = self.restored(saved)
        self.prefault(guest, "--cont")
        guest.shell("mount -o remount,size=90% /dev/shm")
        samples = []
        for number, prefault in enumerate((False, True)):
            total = self.memory_of(guest)
            size = DIMM_MIB * MIB
            guest.qmp("object-add", qom_type="memory-backend-ram", id=f"mem{number}", size=size)
            guest.qmp("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"mem{number}")
            # The guest reports the result with ACPI's _OST method.
            info: dict[str, Any] = {}
            while info.get("device") != f"dimm{number}":
                info = guest.wait_event("ACPI_DEVICE_OST", timeout=TOOL_SECONDS)["data"]["info"]
            self.assertEqual(info["status"], 0, info)
            self.assertGreater(self.memory_of(guest), total)
            if prefault:
                self.prefault(guest)
            stopwatch = Stopwatch(guest)
            guest.fill("plugged", DIMM_MIB - 16)
            samples.append(stopwatch.sample())
            guest.shell("rm /dev/shm/plugged")
        without, with_ = samples
        self.spared("hotplug", without, with_, (DIMM_MIB - 32) << 8, MOST)
        self.check_data(guest, saved)
        self.check_health(guest)

    def memory_of(self, guest: SystemGuest) -> int:
        return int(guest.shell("awk '/MemTotal/ { print $2 }' /proc/meminfo")) << 10
