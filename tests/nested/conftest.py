# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests with the real ioctl, in the lab or on a capable host."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pytest

from qemu_prefault_lab.guest import Defaults, Guest, defaults, patched_qemu, thp
from support.guest import (
    OTHER_MIB,
    GuestOptions,
    MakeGuest,
    MakeSavedState,
    SetThp,
    check_memory,
)

if TYPE_CHECKING:
    from qemu_prefault_lab.libvirtd import LabDomain, Libvirtd, Syslog
    from support.libvirt import DomainOptions, MakeDomain, WriteHookConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=100, help="number of times to kill the tool")
    parser.addoption("--boots", type=int, default=6, help="number of guests in a campaign")
    parser.addoption(
        "--agents", help="a list of agents to test, from attach,plugin,qmp (default: attach)"
    )
    parser.addoption("--seed", type=int, default=0, help="seed of random choices (0: random)")
    parser.addoption("--minutes", type=float, default=2, help="duration of a soak")
    parser.addoption("--iteration", type=int, help="run only this iteration of a soak")
    parser.addoption("--ledger", type=Path, help="results file from which to resume a soak")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if wanted := metafunc.config.getoption("agents"):
        marker = metafunc.definition.get_closest_marker("agents")
        names = [name for name in wanted.split(",") if marker is None or name in marker.args]
        metafunc.parametrize("agent", names, indirect=True)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Print and return the seed of the test's random delays and choices.

    If ``--seed`` is 0, the default, the seed itself is random.
    """
    wanted: int = request.config.getoption("seed")
    value = wanted or random.SystemRandom().getrandbits(32)
    print(f"\n--seed {value}")
    return value


@pytest.fixture(autouse=True)
def agent(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with one of the agents that ``--agents`` selects."""
    name: str = getattr(request, "param", "attach")
    before = Defaults(defaults.qemu, defaults.plugin)
    if name == "plugin":
        defaults.plugin = ["keep=off"]
    elif name == "qmp":
        if (command := patched_qemu()) is None:
            pytest.skip("no patched QEMU is installed (lab pytest --qemu installs one)")
        defaults.qemu = command
    yield name
    defaults.qemu, defaults.plugin = before.qemu, before.plugin


@pytest.fixture(scope="session", autouse=True)
def four_kilobyte_pages() -> Iterator[None]:
    """Disable transparent huge pages, because they leave too few faults to compare."""
    before = thp("never")
    yield
    thp(before)


@pytest.fixture
def set_thp() -> Iterator[SetThp]:
    """Return a function that sets the transparent huge page mode until the test ends."""
    yield thp
    thp("never")


@pytest.fixture(scope="session")
def make_saved_state(
    four_kilobyte_pages: None, tmp_path_factory: pytest.TempPathFactory
) -> MakeSavedState:
    """Return a function that saves a guest and returns the file's path.

    The function boots and saves each kind of guest once per QEMU binary. The patched QEMU has fewer
    devices, so it cannot restore a guest that Debian's QEMU has saved.
    """
    states: dict[tuple[int, int, bool, str], Path] = {}

    def state(smp: int, workload_mib: int, kvm: bool) -> Path:
        key = (smp, workload_mib, kvm, defaults.qemu[0])
        if key not in states:
            path = tmp_path_factory.mktemp("state") / "saved"
            memory = workload_mib + OTHER_MIB
            with Guest(smp=smp, workload_mib=workload_mib, memory_mib=memory, kvm=kvm) as guest:
                guest.wait_ready()
                check_memory(guest)
                guest.save(path)
            states[key] = path
        return states[key]

    return state


@pytest.fixture
def make_restored_guest(make_saved_state: MakeSavedState) -> Iterator[MakeGuest]:
    """Return a function that restores paused guests, which have empty stage-2 tables."""
    guests: list[Guest] = []

    def restore(**options: Unpack[GuestOptions]) -> Guest:
        smp = options.setdefault("smp", 1)
        workload_mib = options.setdefault("workload_mib", 32)
        kvm = options.setdefault("kvm", False)
        options["memory_mib"] = workload_mib + OTHER_MIB
        options["incoming"] = make_saved_state(smp, workload_mib, kvm)
        options["paused"] = True
        guest = Guest(**options)
        guests.append(guest)
        guest.wait_restored()
        return guest

    yield restore
    for guest in guests:
        guest.kill()


# --- fixtures for libvirt, which only the lab's "libvirt" variant contains ---


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    from qemu_prefault_lab.libvirtd import Libvirtd  # noqa: PLC0415
    from support.libvirt import tool_output  # noqa: PLC0415

    tool_output("libvirt", "install", "--hook")
    with Libvirtd() as daemon:
        yield daemon


@pytest.fixture
def make_domain(libvirtd: Libvirtd) -> Iterator[MakeDomain]:
    """Return a function that defines domains whose guests write some memory."""
    from qemu_prefault_lab.libvirtd import LabDomain  # noqa: PLC0415
    from support.libvirt import WORKLOAD_MIB  # noqa: PLC0415

    made: list[LabDomain] = []

    def make(name: str, **options: Unpack[DomainOptions]) -> LabDomain:
        options.setdefault("workload_mib", WORKLOAD_MIB)
        made.append(LabDomain(libvirtd, name, **options))
        return made[-1]

    yield make
    for item in made:
        item.destroy()


@pytest.fixture
def syslog() -> Iterator[Syslog]:
    from qemu_prefault_lab.libvirtd import Syslog  # noqa: PLC0415

    with Syslog() as log:
        yield log


@pytest.fixture
def write_hook_config() -> Iterator[WriteHookConfig]:
    """Return a function that writes the hook's configuration file."""
    from qemu_prefault.libvirt.install import CONFIG  # noqa: PLC0415

    CONFIG.parent.mkdir(exist_ok=True)

    def write(text: str) -> None:
        CONFIG.write_text(text)

    yield write
    CONFIG.unlink(missing_ok=True)
