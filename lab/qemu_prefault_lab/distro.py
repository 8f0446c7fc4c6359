# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of whole distributions, for guests with their own kernel and systemd.

The lab builds these images from the Debian archive, like its own images
(:mod:`qemu_prefault_lab.image`). In the lab's own images, packages are only unpacked. In the images
of distributions, packages are fully installed: the maintainer scripts have run, and
initramfs-tools has generated the initramfs.
"""

from __future__ import annotations

import json
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path

from qemu_prefault.errors import InputError

from . import cache, image

log = logging.getLogger(__name__)

#: The root password in all distributions.
PASSWORD = "prefault"

_HOOK = Path(__file__).parent / "distro-hook.sh"
_PACKAGES = ("dbus", "initramfs-tools", "kmod", "linux-image-cloud-amd64", "login", "passwd",
             "procps", "systemd-sysv", "udev")  # fmt: skip
# Omit the drivers for hardware that these guests lack. They take up most of a kernel package.
_WITHOUT = tuple(
    f"/{prefix}lib/modules/*/kernel/{part}/*"
    for prefix in ("", "usr/")
    for part in ("drivers/gpu", "drivers/infiniband", "drivers/media", "drivers/net", "sound")
)


@dataclass(frozen=True)
class Distro:
    """A distribution release, with its suites in the order in which they are tried."""

    name: str
    suites: tuple[str, ...]


DISTROS = {
    distro.name: distro
    for distro in (
        Distro("debian12", ("bookworm",)),
        Distro("debian13", ("trixie",)),
        Distro("sid", ("sid", "sid", "testing")),
    )
}


@dataclass(frozen=True)
class DistroImage:
    """A directory with the built image of a distribution.

    :ivar suite: The Debian suite from which the lab built the image.
    :ivar kernel_release: The release of the distribution's kernel.
    """

    directory: Path
    suite: str
    kernel_release: str

    @property
    def disk(self) -> Path:
        """The raw ext4 image without partitions, to which guests never write."""
        return self.directory / "disk.ext4"

    @property
    def boot(self) -> Path:
        """The directory with ``vmlinuz``, ``vmlinux`` and ``initrd``, which QEMU boots."""
        return self.directory / "boot"


def distro_named(name: str) -> Distro:
    """Return the distribution with this name."""
    try:
        return DISTROS[name]
    except KeyError:
        raise InputError(f"no distribution {name!r}", f"choose from {', '.join(DISTROS)}") from None


def build(distro: Distro) -> DistroImage:
    """Return the disk and boot files of a distribution, built unless cached."""
    host = image.tcg_host()
    key = cache.key_of(*distro.suites, *_PACKAGES, *_WITHOUT, _HOOK.read_bytes(), PASSWORD, "1")

    def fill(directory: Path) -> None:
        log.info("building the %s guest for the cache", distro.name)
        tar_path = directory / "disk.tar"
        options = ["--variant=minbase", "--include=" + ",".join(_PACKAGES)]
        options += [f"--dpkgopt=path-exclude={pattern}" for pattern in _WITHOUT]
        options += [f"--{stage}-hook=sh '{_HOOK}' {stage} \"$1\" {PASSWORD}"
                    for stage in ("essential", "customize")]  # fmt: skip
        suite = image.mmdebstrap_any(tar_path, distro.suites, *options)
        boot = directory / "boot"
        boot.mkdir()
        with tarfile.open(tar_path) as tar:
            kernel = next(n for n in tar.getnames() if n.startswith("./boot/vmlinuz-"))
            release = kernel.removeprefix("./boot/vmlinuz-")
            bzimage = image.read_member(tar, kernel)
            initrd = image.read_member(tar, f"./boot/initrd.img-{release}")
        (boot / "vmlinuz").write_bytes(bzimage)
        (boot / "vmlinux").write_bytes(image.extract_vmlinux(bzimage, host))
        (boot / "initrd").write_bytes(initrd)
        image.ext4_of_tar(tar_path, directory / "disk.ext4")
        tar_path.unlink()
        manifest = {"suite": suite, "kernel_release": release}
        (directory / "manifest.json").write_text(json.dumps(manifest))

    directory = cache.entry(f"distro-{distro.name}", key, fill)
    return DistroImage(directory, **json.loads((directory / "manifest.json").read_text()))


def boot_disk(built: DistroImage) -> Path:
    """Return a raw ext4 image of the boot files, built unless cached."""

    def fill(directory: Path) -> None:
        image.ext4_of_tree(built.boot, directory / "boot.ext4")

    name = built.directory.name
    return cache.entry(f"distro-boot-{name.split('-')[1]}", cache.key_of(name), fill) / "boot.ext4"
