# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the Bochs that emulates an Intel CPU with EPT.

Debian's Bochs stops at a debugger prompt, needs a graphical library, and has errors in its VMX. The
lab therefore builds Bochs from the upstream source in Debian's source package, with the series in
patches/bochs. Each patch explains its reason. Firmware and GRUB are Debian's.
"""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_prefault.errors import InputError

from . import cache, image, source_package
from .steps import need, run_step

log = logging.getLogger(__name__)

RELEASE: Final = "3.0"
_SUITE: Final = "trixie"
_CONFIGURE: Final = (
    "--with-nogui",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-avx",
    "--enable-evex",
    "--enable-memtype",
    "--enable-protection-keys",
    "--enable-cet",
    "--enable-uintr",
    "--enable-all-optimizations",
    "--enable-pci",
    "--disable-debugger",
    "--disable-gdb-stub",
    # Its SIGALRM can arrive when Bochs exits and has already freed what the handler uses.
    "--disable-show-ips",
    "--disable-plugins",
    "--disable-large-ramfile",
    "--disable-docbook",
    "CFLAGS=-O3",
    "CXXFLAGS=-O3 -fomit-frame-pointer -fno-strict-aliasing",
)
_FIRMWARE: Final = {
    "BIOS": "./usr/share/bochs/BIOS-bochs-latest",
    "vgabios.bin": "./usr/share/vgabios/vgabios.bin",
    "boot.img": "./usr/lib/grub/i386-pc/boot.img",
}
_PACKAGES: Final = ("bochsbios", "vgabios", "grub-common", "grub-pc-bin")
_GRUB_MODULES: Final = ("biosdisk", "part_msdos", "ext2", "normal", "linux", "configfile")
_GRUB_CONFIGURATION: Final = "configfile (hd0,msdos1)/boot/grub/grub.cfg\n"


@dataclass(frozen=True)
class Bochs:
    """A directory with a built Bochs, its firmware, and GRUB."""

    directory: Path

    @property
    def program(self) -> Path:
        return self.directory / "bochs"

    @property
    def bios(self) -> Path:
        return self.directory / "BIOS"

    @property
    def vga_bios(self) -> Path:
        return self.directory / "vgabios.bin"


def series(patches: Path) -> list[Path]:
    """Return the patches for Bochs, in the order in which they apply.

    :raises InputError: If the directory has no patches for this release.
    """
    found = sorted((patches / "bochs" / RELEASE).glob("*.patch"))
    if not found:
        raise InputError(
            f"{patches} has no series for Bochs {RELEASE}",
            "run the command in the root of a checkout",
        )
    return found


def build(patches: Path = Path("patches"), *, jobs: int = 0) -> Bochs:
    """Return Bochs, built unless cached.

    :param patches: The checkout's ``patches`` directory.
    :param jobs: The number of parallel compilers. 0 means one per CPU.
    :raises ImageError: If a build step failed. The error includes the step's output.
    """
    applied = series(patches)

    def fill(directory: Path) -> None:
        compiler, make = need("g++", "g++"), need("make", "make")
        log.info("building Bochs %s for the cache (about 4 minutes on one CPU)", RELEASE)
        _fetch_firmware(directory)
        with tempfile.TemporaryDirectory(dir=cache.subdirectory("scratch")) as name:
            source = source_package.unpack(
                Path(name), _SUITE, "bochs", lambda v: v.startswith(RELEASE), upstream=True
            )
            source_package.apply_patches(source, applied)
            run_step(["./configure", f"CXX={compiler}", *_CONFIGURE], "configuring Bochs", source)
            run_step([make, f"-j{jobs or os.cpu_count() or 1}"], "compiling Bochs", source)
            run_step(["strip", "-o", str(directory / "bochs"), "bochs"], "stripping Bochs", source)

    key = cache.key_of(_SUITE, *_CONFIGURE, *_PACKAGES, *_GRUB_MODULES, _GRUB_CONFIGURATION,
                       *(path.read_bytes() for path in applied), "1")  # fmt: skip
    return Bochs(cache.entry("bochs", key, fill))


def _fetch_firmware(directory: Path) -> None:
    """Fetch the firmware, and create GRUB's core image.

    GRUB and its libraries are not installed on this host.
    """
    tree = directory / "tree"
    tree.mkdir()
    tar_path = directory / "tree.tar"
    image.mmdebstrap(tar_path, _SUITE, "--variant=extract", "--include=" + ",".join(_PACKAGES))
    with tarfile.open(tar_path) as tar:
        for name, member in _FIRMWARE.items():
            (directory / name).write_bytes(image.read_member(tar, member))
    run_step(
        ["tar", "-xf", str(tar_path), "-C", str(tree), "--no-same-owner", "--exclude=./dev"],
        "unpacking GRUB",
    )
    configuration = directory / "grub.cfg"
    configuration.write_text(_GRUB_CONFIGURATION)
    argv = _foreign(tree, "usr/bin/grub-mkimage")
    argv += [
        "-d",
        str(tree / "usr/lib/grub/i386-pc"),
        "-O",
        "i386-pc",
        "-p",
        "(hd0,msdos1)/boot/grub",
    ]
    argv += ["-c", str(configuration), "-o", str(directory / "core.img"), *_GRUB_MODULES]
    run_step(argv, "creating GRUB's core image")
    tar_path.unlink()
    configuration.unlink()
    shutil.rmtree(tree)


def _foreign(tree: Path, program: str) -> list[str]:
    """Return the beginning of a command that runs a program with its own release's libraries."""
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(libraries), str(tree / program)]
