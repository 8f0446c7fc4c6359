# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of the lab: ``python -m qemu_prefault_lab``."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from qemu_prefault.errors import FailedError, QemuPrefaultError

from . import cache
from .errors import LAB_FAILED
from .launch import VARIANTS, build_image, open_machine, start_lab
from .machine import Machine
from .patched import SUITES, uefi_emulator
from .patched import build as build_qemu
from .patched import check as check_series

_VARIANT = click.option(
    "--variant", type=click.Choice(VARIANTS), default="trixie", show_default=True,
    help="The Debian release to run as L1. Bochs emulates an Intel CPU for ept and ept-sid.",
)  # fmt: skip
_NPT = click.option(
    "--npt/--no-npt",
    default=True,
    help="Use nested paging (NPT or EPT) or shadow paging in L1. The ioctl needs nested paging.",
)
_MODULE_PARAMETERS = click.option(
    "--module-parameter",
    "module_parameters",
    metavar="MODULE.NAME=VALUE",
    multiple=True,
    help="Set a parameter of a module in L1, such as kvm_intel.eptad=0 (implies --nested).",
)
_TDP_MMU = click.option(
    "--tdp-mmu/--no-tdp-mmu",
    default=None,
    help="Set kvm.tdp_mmu in L1 to Y or N (default: the kernel's).",
)
_NESTED = click.option(
    "--nested", is_flag=True, help="Use the lab even if this host's own KVM can prefault."
)
_NUMA = click.option(
    "--numa", is_flag=True, help="Give L1 two NUMA nodes, of 3 and 1 GiB (implies --nested)."
)
_COMMAND = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_NUMA_NODES_MIB = (3072, 1024)
# The directory in L1 for copies of the checkout's files.
_CHECKOUT = "/root/tests"


class _Group(click.Group):
    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except QemuPrefaultError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(LAB_FAILED)


@click.group(cls=_Group)
@click.option("-v", "--verbose", is_flag=True, help="Print more.")
def main(verbose: bool) -> None:
    """Run the real prefault ioctl in the lab, without hardware virtualization."""
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="lab: %(message)s", stream=sys.stderr)


@main.command("build")
@click.argument("variants", nargs=-1, type=click.Choice(VARIANTS))
def build_command(variants: tuple[str, ...]) -> None:
    """Build the images of VARIANTS (default: trixie), unless they are cached."""
    for name in variants or ("trixie",):
        started = time.monotonic()
        image = build_image(name)
        seconds = time.monotonic() - started
        click.echo(f"{name}: {image.suite}, kernel {image.kernel_release}, {seconds:.1f} s")


@main.command("qemu")
@click.option("--release", type=click.Choice(list(SUITES)), default="10.0", show_default=True)
@click.option("--tcg-fix/--no-tcg-fix", default=True, show_default=True, help="patches/qemu-tcg*.")
@click.option("--jobs", default=0, help="Number of parallel compilers (default: one per CPU).")
@click.option("--check", is_flag=True, help="Only run QEMU's checkpatch and QEMU's own tests.")
@click.argument("patches", type=click.Path(path_type=Path, exists=True), default="patches")
def qemu_command(release: str, tcg_fix: bool, jobs: int, check: bool, patches: Path) -> None:
    """Build QEMU with the series in PATCHES, unless cached, and print its path."""
    if check:
        for line in check_series(patches, release, jobs=jobs):
            click.echo(line)
        return
    click.echo(build_qemu(patches, release, tcg=tcg_fix, jobs=jobs).binary)


@main.command("prune")
@click.option("--days", default=7.0, show_default=True, help="Number of days without use.")
def prune_command(days: float) -> None:
    """Remove images and snapshots that have not been used for a number of days."""
    for path in cache.prune(days):
        click.echo(path)


def _pass_on(fd: int, data: bytes) -> None:
    stream = sys.stdout.buffer if fd == 1 else sys.stderr.buffer
    stream.write(data)
    stream.flush()


@main.command("run", context_settings=_COMMAND)
@_VARIANT
@_NPT
@_TDP_MMU
@_MODULE_PARAMETERS
@_NUMA
@_NESTED
@click.option("--timeout", default=3600.0, show_default=True, help="Time limit in seconds.")
@click.option("--wheel", "wheels", multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--source", is_flag=True, help="Install this source tree if --wheel is absent.")
@click.argument("command", nargs=-1, required=True)
def run_command(
    *,
    variant: str,
    npt: bool,
    tdp_mmu: bool | None,
    module_parameters: tuple[str, ...],
    numa: bool,
    nested: bool,
    timeout: float,
    wheels: tuple[Path, ...],
    source: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in the lab, forward its output, and exit with its status."""
    nodes = _NUMA_NODES_MIB if numa else ()
    with open_machine(
        variant,
        nested=nested,
        npt=npt,
        tdp_mmu=tdp_mmu,
        nodes_mib=nodes,
        module_parameters=module_parameters,
    ) as machine:
        if wheels or source:
            _install(machine, wheels)
        result = machine.run(command, timeout=timeout, check=False, on_output=_pass_on)
    sys.exit(result.returncode if result.returncode >= 0 else 128 - result.returncode)


def _install(machine: Machine, wheels: Sequence[Path]) -> None:
    if wheels:
        machine.install(wheels)
    else:
        machine.install_source()


@main.command("boots")
@_VARIANT
@_NPT
@click.option("--restore", is_flag=True, help="Restore the snapshot instead of booting.")
@click.argument("count", type=click.IntRange(min=1))
def boots_command(variant: str, npt: bool, restore: bool, count: int) -> None:
    """Boot the lab, run a command in it and power it off, COUNT times."""
    failures = 0
    times: list[float] = []
    click.echo("boot    ready s  command s    off s  kernel")
    for number in range(1, count + 1):
        started = time.monotonic()
        try:
            with start_lab(variant, npt=npt, snapshot=restore) as lab:
                ready = time.monotonic()
                kernel = lab.run(["uname", "-r"], timeout=60).text.strip()
                done = time.monotonic()
                lab.power_off()
                off = time.monotonic()
        except FailedError as error:
            failures += 1
            click.echo(f"{number:4}  FAILED: {error}")
            continue
        times.append(ready - started)
        click.echo(
            f"{number:4} {ready - started:10.2f} {done - ready:10.2f} {off - done:8.2f}  {kernel}"
        )
    if times:
        click.echo(f"ready: {min(times):.2f} to {max(times):.2f} s, "
                   f"median {statistics.median(times):.2f} s")  # fmt: skip
    click.echo(f"{count - failures} of {count} boots succeeded")
    sys.exit(1 if failures else 0)


def _put_tests(machine: Machine, path: Path) -> str:
    """Copy a test file or a directory to L1, and return the path of the copy.

    The function also copies the conftest.py in the directory of a test file.
    """
    resolved, checkout = path.resolve(), Path.cwd()
    inside = resolved.is_relative_to(checkout)
    target = f"{_CHECKOUT}/{resolved.relative_to(checkout) if inside else path.name}"
    machine.put(path, target)
    fixtures = path.with_name("conftest.py")
    if path.is_file() and fixtures.exists():
        machine.put(fixtures, str(Path(target).with_name("conftest.py")))
    return target


@main.command("pytest", context_settings=_COMMAND)
@_VARIANT
@_NPT
@_TDP_MMU
@_MODULE_PARAMETERS
@_NUMA
@_NESTED
@click.option("--wheel", "wheels", multiple=True, type=click.Path(path_type=Path, exists=True),
              help="Install this wheel instead of this source tree.")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML to this file.")
@click.option("--timeout", default=3600.0, show_default=True, help="Time limit in seconds.")
@click.option("--qemu", "release", type=click.Choice(list(SUITES)), is_flag=False,
              flag_value="10.0",
              help="Install this release of the patched QEMU (10.0 if omitted).")  # fmt: skip
@click.option("--uefi", is_flag=True,
              help="Emulate L1 with the patched QEMU, which can run UEFI guests.")  # fmt: skip
@click.option("--env", "variables", metavar="NAME=VALUE", multiple=True,
              help="Set an environment variable for the tests.")  # fmt: skip
@click.argument("arguments", nargs=-1, required=True)
def pytest_command(
    *,
    variant: str,
    npt: bool,
    tdp_mmu: bool | None,
    module_parameters: tuple[str, ...],
    numa: bool,
    nested: bool,
    wheels: tuple[Path, ...],
    junit: Path | None,
    timeout: float,
    release: str | None,
    uefi: bool,
    variables: tuple[str, ...],
    arguments: tuple[str, ...],
) -> None:
    """Copy the paths in ARGUMENTS into the lab and run pytest there with ARGUMENTS.

    The copies have the same relative paths as in the checkout. The command also copies the
    checkout's pyproject.toml, tests/support and qmp_scripts, because wheels do not contain these
    files.
    """
    patched = build_qemu(Path("patches"), release) if release else None
    emulator = partial(uefi_emulator, Path("patches")) if uefi else None
    nodes = _NUMA_NODES_MIB if numa else ()
    with open_machine(
        variant,
        nested=nested,
        npt=npt,
        tdp_mmu=tdp_mmu,
        nodes_mib=nodes,
        module_parameters=module_parameters,
        emulator=emulator,
    ) as machine:
        _install(machine, wheels)
        env = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if patched is not None:
            env |= patched.put_on(machine)
        for shared in ("pyproject.toml", "tests/support", "qmp_scripts"):
            if Path(shared).exists():
                machine.put(Path(shared), f"{_CHECKOUT}/{shared}")
        words = []
        for argument in arguments:
            path, separator, test = argument.partition("::")
            if not argument.startswith("-") and Path(path).exists():
                words.append(_put_tests(machine, Path(path)) + separator + test)
            else:
                words.append(argument)
        report = f"{_CHECKOUT}/junit.xml"
        # --timeout limits all tests together, so disable pytest's limit for each test.
        argv = ["python3", "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={_CHECKOUT}",
                "-o", "timeout=0", "-W", "ignore::pytest.PytestConfigWarning",
                f"--junit-xml={report}", *words]  # fmt: skip
        for item in variables:
            name, _, env[name] = item.partition("=")
        result = machine.run(argv, timeout=timeout, check=False, env=env, on_output=_pass_on)
        if junit is not None:
            machine.get(report, junit)
    sys.exit(result.returncode if result.returncode >= 0 else 1)


if __name__ == "__main__":
    main()
