# SPDX-License-Identifier: GPL-2.0-or-later
"""The patched QEMU: Debian's source, our series (patches/), the smallest useful configuration.

It is built on this machine, cached like everything the lab needs, and runs in L1: it links only
what Debian's own QEMU there brings along. Debian's firmware is used (`-L`), for the source
package has none.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_prefault.errors import InputError

from . import cache
from .errors import ImageError
from .image import _need

log = logging.getLogger(__name__)

SUITES: Final = {"10.0": "trixie", "10.2": "sid"}
_MIRROR: Final = "http://deb.debian.org/debian"
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
# The versions that QEMU's pythondeps.toml asks for; Debian 12's meson is too old.
_PYTHON_PACKAGES: Final = ("meson==1.5.0", "pycotap==1.3.1")
_DEVICES: Final = "prefault"
_DEVICES_MAK: Final = """\
CONFIG_PCI_DEVICES=n
CONFIG_I440FX=y
CONFIG_Q35=y
CONFIG_MICROVM=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_MEM=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_SERIAL=y
CONFIG_ISA_DEBUG=y
CONFIG_NVDIMM=y
CONFIG_VGA_PCI=y
"""
_CONFIGURE: Final = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    f"--with-devices-x86_64={_DEVICES}",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-seccomp",
    "--enable-fdt=system",
    "--audio-drv-list=",
    "--disable-docs",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-install-blobs",
    # Compiling takes half as long; what is measured is in the kernel.
    "--disable-debug-info",
    "-Doptimization=1",
    "--cc=ccache gcc",
)


@dataclass(frozen=True)
class PatchedQemu:
    """A QEMU that was built, and two of its own tests.

    :ivar qtest: of the new command. :ivar svm_test: a kernel for an emulated CPU, which tells
        whether reads of control registers are intercepted; None without patches/qemu-tcg.
    """

    binary: Path
    qtest: Path
    svm_test: Path | None


def series(patches: Path, release: str, tcg: bool) -> list[Path]:
    """The patches for a release, in order.

    :param tcg: with the fix of TCG, too.
    :raise InputError: there are none.
    """
    found = sorted((patches / "qemu" / release).glob("*.patch"))
    if tcg:
        found += sorted((patches / "qemu-tcg" / release).glob("*.patch"))
    if not found:
        raise InputError(
            f"{patches} has no series for QEMU {release}",
            "run this from the checkout; it has patches/qemu",
        )
    return found


def build(patches: Path, release: str = "10.0", *, tcg: bool = True, jobs: int = 0) -> PatchedQemu:
    """Build it unless it is cached.

    :param patches: the checkout's directory of that name.
    :param release: of QEMU: a key of :data:`SUITES`.
    :param jobs: compilers at a time; 0: one for each CPU.
    :raise ImageError: a step failed; its output is told.
    """
    applied = series(patches, release, tcg)

    def fill(directory: Path) -> None:
        # The same place each time, so that ccache finds what an earlier series compiled.
        work = cache.cache_dir() / "scratch" / f"qemu-{release}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        source = _source(work, release)
        for patch in applied:
            log.info("applying %s", patch.name)
            arguments = [
                "--forward",
                "--fuzz=0",
                "-p1",
                "-d",
                str(source),
                "-i",
                str(patch.resolve()),
            ]
            _step([_need("patch", "patch"), *arguments], f"applying {patch.name}")
        _compile(work, source, jobs or os.cpu_count() or 1)
        for name in ("qemu-system-x86_64", "tests/qtest/kvm-prefault-test"):
            target = directory / Path(name).name
            shutil.copy(work / "build" / name, target)
        if tcg:
            _compile_svm_test(source, directory / "svm-cr-read")
        shutil.rmtree(work, ignore_errors=True)

    recipe = repr((SUITES[release], _CONFIGURE, _DEVICES_MAK, _PYTHON_PACKAGES))
    key = cache.key_of(recipe, *(path.read_bytes() for path in applied))
    entry = cache.entry("qemu", key, fill)
    return PatchedQemu(
        entry / "qemu-system-x86_64",
        entry / "kvm-prefault-test",
        entry / "svm-cr-read" if tcg else None,
    )


def _source(work: Path, release: str) -> Path:
    """Debian's source of that release, as its suite has it now."""
    apt = work / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    # Only this one suite: what the host itself has enabled is nobody's business here.
    (apt / "sources.list").write_text(
        f"deb-src [check-valid-until=no signed-by={_KEYRING}] {_MIRROR} {SUITES[release]} main\n"
    )
    options = [
        *("-o", f"Dir::Etc::SourceList={apt}/sources.list"),
        *("-o", "Dir::Etc::SourceParts=/dev/null"),
        *("-o", f"Dir::State::Lists={apt}/lists"),
        *("-o", f"Dir::Cache={apt}"),
        *("-o", "APT::Sandbox::User="),
        *("-o", "Acquire::Languages=none"),
        *("-o", "Acquire::Retries=3"),
    ]
    log.info("getting the source of QEMU %s (Debian %s)", release, SUITES[release])
    _step(["apt-get", *options, "-qq", "update"], "apt-get update")
    versions = [
        line.split(maxsplit=1)[1]
        for line in _step(["apt-cache", *options, "showsrc", "qemu"], "apt-cache").splitlines()
        if line.startswith("Version:")
    ]
    fitting = [version for version in versions if f":{release}." in version]
    if not fitting:
        raise ImageError(
            f"Debian {SUITES[release]} has no source of QEMU {release}, only {versions}",
            "the series may apply to it nonetheless: see patches/qemu",
        )
    _step(
        ["apt-get", *options, "-qq", "source", "--download-only", f"qemu={fitting[-1]}"],
        f"downloading the source of QEMU {fitting[-1]}",
        work,
    )
    description = next(work.glob("*.dsc"))
    # apt has checked it.
    arguments = ["--no-check", "-x", description.name, "source"]
    _step([_need("dpkg-source", "dpkg-dev"), *arguments], "unpacking it", work)
    return work / "source"


def _compile(work: Path, source: Path, jobs: int) -> None:
    # In the environment of a package build, Python's own settings would leak into QEMU's.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment |= {
        "CCACHE_DIR": str(cache.cache_dir() / "ccache"),
        "CCACHE_BASEDIR": str(work),
        "CCACHE_NOHASHDIR": "1",
    }
    python = work / "python"
    interpreter = shutil.which("python3", path="/usr/bin") or sys.executable
    _step([interpreter, "-m", "venv", str(python)], "python3 -m venv")
    pip = [str(python / "bin" / "pip"), "-q", "install", *_PYTHON_PACKAGES]
    _step(pip, "installing meson", environment=environment)
    devices = source / "configs" / "devices" / "x86_64-softmmu" / f"{_DEVICES}.mak"
    devices.write_text(_DEVICES_MAK)
    tree = work / "build"
    tree.mkdir()
    log.info("configuring")
    configure = [str(source / "configure"), f"--python={python}/bin/python", *_CONFIGURE]
    _step(configure, "configuring QEMU", tree, environment)
    log.info("compiling, %d at a time", jobs)
    targets = ["qemu-system-x86_64", "tests/qtest/kvm-prefault-test"]
    ninja = [_need("ninja", "ninja-build"), f"-j{jobs}", *targets]
    _step(ninja, "compiling QEMU", tree, environment)


def _compile_svm_test(source: Path, target: Path) -> None:
    """As tests/tcg/x86_64/Makefile.softmmu-target does."""
    tests = source / "tests" / "tcg"
    boot = tests / "x86_64" / "system"
    _step(
        [
            *("gcc", "-nostdlib", "-static", "-no-pie", "-fno-pie", "-fno-stack-protector", "-O0"),
            *("-ffreestanding", "-I", str(tests / "minilib"), "-Wa,--noexecstack"),
            *(f"-Wl,-T{boot}/kernel.ld", "-Wl,-melf_x86_64", "-o", str(target)),
            *(str(boot / "svm-cr-read.c"), str(boot / "boot.S")),
            *(str(tests / "minilib" / "printf.c"), "-lgcc"),
        ],
        "compiling QEMU's test of SVM",
    )


def _step(
    argv: Sequence[str],
    what: str,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    result = subprocess.run(
        argv,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        lines = result.stdout.splitlines()[-25:]
        raise ImageError(
            f"{what} failed: {argv[0]} exited with {result.returncode}",
            "\n".join(f"    {line}" for line in lines),
        )
    return result.stdout
