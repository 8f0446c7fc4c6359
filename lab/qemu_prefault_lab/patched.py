# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a patched QEMU from Debian's source and the series in patches/.

The patched QEMU has a minimal configuration. The lab builds this QEMU on L0, caches it like the
images, and runs it in L1. The program links only to libraries on which the Debian QEMU in L1
depends. Debian's source package does not contain firmware, so the patched QEMU uses the firmware
from Debian's binary packages (``-L``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_prefault.errors import InputError

from . import cache, source_package
from .guest import FIRMWARE, PATCHED_QEMU_VARIABLE
from .machine import Machine
from .steps import need, run_step

log = logging.getLogger(__name__)

SUITES: Final = {"10.0": "trixie", "10.2": "sid"}
_ON_MACHINE: Final = "/root/qemu/qemu-system-x86_64"
_PYTHON_PACKAGES: Final = Path(__file__).parent / "qemu-build-requirements.txt"
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
# QEMU 10.2's ACPI code links only if CXL is enabled, because the stubs for a QEMU without CXL do
# not define cxl_fmws_get_all_sorted().
_MORE_DEVICES: Final = {
    "10.2": """\
CONFIG_PXB=y
CONFIG_PCIE_PORT=y
CONFIG_CXL=y
CONFIG_CXL_MEM_DEVICE=y
"""
}
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
    # These options halve the compile time. QEMU's speed does not matter, because the tests measure
    # the kernel.
    "--disable-debug-info",
    "-Doptimization=1",
    "--cc=ccache gcc",
)
_TARGETS: Final = ("qemu-system-x86_64", "tests/qtest/kvm-prefault-test")
_TCG_SERIES: Final = ("qemu-tcg", "qemu-tcg-cr8")
_SVM_TESTS: Final = ("svm-cr-read", "svm-cr8-write")
# Tests for the subsystems that the series change: QAPI, jobs, HMP, accelerator properties.
_TESTS: Final = (
    *("tests/qtest/qmp-cmd-test", "tests/qtest/test-hmp", "tests/qtest/qom-test"),
    *("tests/unit/test-blockjob", "tests/unit/test-blockjob-txn", "tests/unit/test-bdrv-drain"),
)


@dataclass(frozen=True)
class PatchedQemu:
    """A built QEMU and some of QEMU's own tests.

    :ivar qtest: The qtest program for the new QMP command.
    :ivar svm_tests: Kernels that test the TCG fixes, one per fix. Empty if QEMU is built without
        these fixes.
    """

    binary: Path
    qtest: Path
    svm_tests: tuple[Path, ...]

    def put_on(self, machine: Machine) -> dict[str, str]:
        """Copy QEMU and its tests to a machine.

        :returns: The environment variable for QEMU's path on the machine, and this path.
        """
        files = {"": self.binary, "-test": self.qtest}
        files |= {f"-{path.name}": path for path in self.svm_tests}
        for suffix, path in files.items():
            machine.put(path, _ON_MACHINE + suffix)
        return {PATCHED_QEMU_VARIABLE: _ON_MACHINE}


def series(patches: Path, release: str, tcg: bool) -> list[Path]:
    """Return the patches for a QEMU release, in the order in which they apply.

    :param tcg: Include the TCG fixes.
    :raises InputError: If the directory has no patches for this release.
    """
    found = sorted((patches / "qemu" / release).glob("*.patch"))
    for name in _TCG_SERIES if tcg else ():
        found += sorted((patches / name / release).glob("*.patch"))
    if not found:
        raise InputError(
            f"{patches} has no series for QEMU {release}",
            "run the command in the root of a checkout, and select a release in patches/qemu",
        )
    return found


def build(patches: Path, release: str = "10.0", *, tcg: bool = True, jobs: int = 0) -> PatchedQemu:
    """Return a patched QEMU, built unless cached.

    :param patches: The checkout's ``patches`` directory.
    :param release: QEMU's release, a key of :data:`SUITES`.
    :param jobs: The number of parallel compilers. 0 means one per CPU.
    :raises ImageError: If a build step failed. The error includes the step's output.
    """
    applied = series(patches, release, tcg)
    svm_tests = _SVM_TESTS if tcg else ()

    def fill(directory: Path) -> None:
        with _workspace(release) as work:
            source = _patched_source(work, release, applied)
            _compile(work, source, release, jobs, _TARGETS)
            for name in _TARGETS:
                target = directory / Path(name).name
                shutil.copy(work / "build" / name, target)
            for name in svm_tests:
                _compile_svm_test(source, directory / name)

    recipe = repr((SUITES[release], _CONFIGURE, _devices(release)))
    key = cache.key_of(
        recipe, _PYTHON_PACKAGES.read_bytes(), *(path.read_bytes() for path in applied)
    )
    entry = cache.entry("qemu", key, fill)
    return PatchedQemu(
        entry / "qemu-system-x86_64",
        entry / "kvm-prefault-test",
        tuple(entry / name for name in svm_tests),
    )


def uefi_emulator(patches: Path) -> Path:
    """Return an emulator for L1 that can run UEFI guests, built unless cached."""
    return build(patches).binary


def check(patches: Path, release: str = "10.0", *, jobs: int = 0) -> list[str]:
    """Run checkpatch on the series, and QEMU's tests for the changed subsystems.

    :returns: A line for each check, with the check's result.
    :raises ImageError: If a check failed. The error includes the check's output.
    """
    applied = series(patches, release, tcg=True)
    told = []
    with _workspace(release) as work:
        source = _patched_source(work, release, applied)
        for patch in applied:
            # Ignore the warning about MAINTAINERS. Its patterns already match the new files.
            argv = ["perl", "scripts/checkpatch.pl", "--no-tree", str(patch.resolve())]
            output = run_step(argv, f"checkpatch of {patch}", source)
            total = next(line for line in output.splitlines() if line.startswith("total:"))
            told.append(f"{patch.name}: {total.removeprefix('total: ')}")
        _compile(work, source, release, jobs, [*_TARGETS, *_TESTS])
        tree = work / "build"
        qemu = work / "qemu-system-x86_64"  # the tests do not pass -L
        firmware = " ".join(f"-L {path}" for path in FIRMWARE)
        qemu.write_text(f'#!/bin/sh\nexec {tree}/qemu-system-x86_64 {firmware} "$@"\n')
        qemu.chmod(0o755)
        environment = {**os.environ, "QTEST_QEMU_BINARY": str(qemu), "G_TEST_SRCDIR": str(source)}
        for test in ("tests/qtest/kvm-prefault-test", *_TESTS):
            output = run_step([str(tree / test), "--tap"], test, tree, environment)
            passed = [line for line in output.splitlines() if line.startswith("ok ")]
            told.append(f"{test}: {len(passed)} passed")
    return told


@contextlib.contextmanager
def _workspace(release: str) -> Iterator[Path]:
    """Yield an empty directory.

    The path is the same each time, so that ccache finds the results of earlier builds.
    """
    with cache.locked(f"qemu-{release}"):
        work = cache.subdirectory("scratch") / f"qemu-{release}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        shutil.rmtree(work, ignore_errors=True)


def _patched_source(work: Path, release: str, patches: Sequence[Path]) -> Path:
    source = source_package.unpack(
        work, SUITES[release], "qemu", lambda version: f":{release}." in version
    )
    source_package.apply_patches(source, patches)
    return source


def _devices(release: str) -> str:
    return _DEVICES_MAK + _MORE_DEVICES.get(release, "")


def _compile(work: Path, source: Path, release: str, jobs: int, targets: Sequence[str]) -> None:
    # The caller's environment may contain variables that would affect the Python that builds QEMU.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment |= {
        "CCACHE_DIR": str(cache.subdirectory("ccache")),
        "CCACHE_BASEDIR": str(work),
        "CCACHE_NOHASHDIR": "1",
    }
    python = work / "python"
    interpreter = shutil.which("python3", path="/usr/bin") or sys.executable
    run_step([interpreter, "-m", "venv", str(python)], "python3 -m venv")
    pip = [str(python / "bin" / "pip"), "-q", "install", "--require-hashes"]
    pip += ["--only-binary", ":all:", "-r", str(_PYTHON_PACKAGES)]
    run_step(pip, "installing meson", environment=environment)
    devices = source / "configs" / "devices" / "x86_64-softmmu" / f"{_DEVICES}.mak"
    devices.write_text(_devices(release))
    tree = work / "build"
    tree.mkdir()
    log.info("configuring")
    configure = [str(source / "configure"), f"--python={python}/bin/python", *_CONFIGURE]
    run_step(configure, "configuring QEMU", tree, environment)
    jobs = jobs or os.cpu_count() or 1
    log.info("compiling with %d jobs", jobs)
    ninja = [need("ninja", "ninja-build"), f"-j{jobs}", *targets]
    run_step(ninja, "compiling QEMU", tree, environment)


def _compile_svm_test(source: Path, target: Path) -> None:
    """Compile one test kernel as tests/tcg/x86_64/Makefile.softmmu-target does."""
    tests = source / "tests" / "tcg"
    boot = tests / "x86_64" / "system"
    run_step(
        [
            *("gcc", "-nostdlib", "-static", "-no-pie", "-fno-pie", "-fno-stack-protector", "-O0"),
            *("-ffreestanding", "-I", str(tests / "minilib"), "-Wa,--noexecstack"),
            *(f"-Wl,-T{boot}/kernel.ld", "-Wl,-melf_x86_64", "-o", str(target)),
            *(str(boot / f"{target.name}.c"), str(boot / "boot.S")),
            *(str(tests / "minilib" / "printf.c"), "-lgcc"),
        ],
        f"compiling QEMU's {target.name}",
    )
