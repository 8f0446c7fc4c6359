# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot cloud images of other distributions to their login prompt.

The tests use the published images unchanged, with their own boot loader and kernel, and do not log
in. If an image cannot be downloaded, its test is cancelled and reports the reason.
"""

from __future__ import annotations

from pathlib import Path

from avocado import fail_on
from cloud_images import NoImageError, base_image
from guests import DATA_PAGES, PrefaultTest, Sample, Stopwatch

from qemu_prefault.errors import QemuPrefaultError
from qemu_prefault_lab.system import distro_directory, make_overlay


class CloudTest(PrefaultTest):
    """A test that boots one image twice: once without the plugin and once with it."""

    def prepare(self) -> None:
        self.distro = self.params.get("cloud", default="Fedora")
        self.boot_files = None
        # The lab has no network, so run.py has downloaded the images on the host.
        fetched = distro_directory("cloud")
        if fetched.is_dir():
            self.base_image = fetched / self.distro
            if not self.base_image.exists():
                self.cancel((fetched / f"{self.distro}.missing").read_text().strip())
            return
        try:
            self.base_image = base_image(self.distro, self.cache_dirs[0])
        except NoImageError as error:
            self.cancel(str(error))

    def boot_image(self, plugin: list[str] | None) -> Sample:
        overlay = Path(self.workdir) / f"overlay-{len(self.guests)}"
        make_overlay(self.base_image, overlay, "qcow2")
        guest = self.start(overlay, plugin=plugin)
        stopwatch = Stopwatch(guest, from_its_start=True)
        guest.wait_login()
        sample = stopwatch.sample()
        guest.kill()
        return sample

    @fail_on(QemuPrefaultError)
    def test_boot(self) -> None:
        """Check that a guest takes few faults on memory if it boots with the plugin."""
        without = self.boot_image(None)
        self.spared("boot", without, self.boot_image([]), DATA_PAGES, 0.01)
