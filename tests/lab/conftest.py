# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that run where the real ioctl is: in the lab, or on a host with TDP."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict, Unpack

import pytest

from qemu_prefault_lab.guest import Defaults, Guest, defaults, patched_qemu, thp
from qemu_prefault_lab.tool import Result, Tool, resident_bytes, wait_for

if TYPE_CHECKING:
    from qemu_prefault_lab.libvirtd import Domain, Libvirtd, Syslog

OTHER_MIB = 96
"""What a guest has beside its workload's memory: its kernel, and memory it never touches."""
SNAPSHOT = {"tag": "s", "vmstate": "disk", "devices": ["disk"]}
"""Arguments of snapshot-save and snapshot-load, with the disk of :func:`add_disk`."""


class GuestOptions(TypedDict, total=False):
    """Keywords of :class:`Guest`, for helpers that pass them on."""

    machine: str
    accel: str
    memory_mib: int
    memory: str
    smp: int
    cpu: str | None
    backing: str | None
    paused: bool
    incoming: str | Path | None
    workload_mib: int
    kernel: str
    kernel_args: str
    args: Sequence[str]
    qemu: Sequence[str] | None
    kvm: bool
    ovmf: bool
    plugin: Sequence[str] | None
    preload: bool
    wrapper: Sequence[str]


class MakeGuest(Protocol):
    """A fixture that makes guests, and kills them when the test ends."""

    def __call__(self, **options: Unpack[GuestOptions]) -> Guest: ...


MakeSavedState = Callable[[int, int, bool], Path]
"""Called with the number of vCPUs, the MiB of the workload, and ``kvm``."""
SetThp = Callable[[str], str]
WriteHookConfig = Callable[[str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=100, help="how often to kill the tool")
    parser.addoption("--boots", type=int, default=6, help="guests of the plugin campaign")
    parser.addoption(
        "--agents", help="who acts in QEMU, each in turn: attach,plugin,qmp (default: attach)"
    )
    parser.addoption("--seed", type=int, default=0, help="of random moments; 0: a new one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only in make test-full")
    config.addinivalue_line("markers", "agents(*names): those it is about; default: any")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if wanted := metafunc.config.getoption("agents"):
        marker = metafunc.definition.get_closest_marker("agents")
        names = [name for name in wanted.split(",") if marker is None or name in marker.args]
        metafunc.parametrize("agent", names, indirect=True)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of this run's random moments: ``--seed``, or a new one, which is printed."""
    wanted: int = request.config.getoption("seed")
    value = wanted or random.SystemRandom().getrandbits(32)
    print(f"\n--seed {value}")
    return value


@pytest.fixture(autouse=True)
def agent(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who acts in the QEMUs of this test: see ``--agents``."""
    name: str = getattr(request, "param", "attach")
    before = Defaults(defaults.qemu, defaults.plugin)
    if name == "plugin":
        defaults.plugin = ["keep=off"]
    elif name == "qmp":
        if (command := patched_qemu()) is None:
            pytest.skip("there is no patched QEMU here: lab pytest --qemu")
        defaults.qemu = command
    yield name
    defaults.qemu, defaults.plugin = before.qemu, before.plugin


def start_tool(guest: Guest, *arguments: str) -> Tool:
    return Tool(["--qmp", str(guest.qmp_path), "--json", *arguments])


def prefault(guest: Guest, *arguments: str) -> Result:
    """Run ``qemu-prefault --qmp … --json`` on a guest."""
    return start_tool(guest, *arguments).finish()


def start_incoming_tool(guest: Guest, *options: str) -> Tool:
    """Start the tool with ``--incoming``; return when it awaits the guest, and populates."""
    tool = start_tool(guest, "--incoming", *options)
    wait_for(lambda: not tool.running() or tool.has_said("ready"), "a tool that awaits it")
    assert tool.running(), tool.finish()
    return tool


def wait_migrated(source: Guest) -> None:
    """Wait until an outgoing migration is completed."""
    while (status := source.wait_event("MIGRATION")["data"]["status"]) != "completed":
        assert status not in ("failed", "cancelled"), status


def faults(guest: Guest) -> int:
    """Stage-2 faults since QEMU started."""
    return guest.stats()["pf_taken"]


def check_memory(guest: Guest) -> None:
    """The guest answers, and finds in its memory what it wrote there."""
    assert guest.command("pass")["bad"] == 0


def faults_of_pass(guest: Guest) -> int:
    """Stage-2 faults of a running guest while it writes all of its memory."""
    before = faults(guest)
    check_memory(guest)
    return faults(guest) - before


class Follower:
    """``qemu-prefault --follow --json``. A context manager; entering it waits for the first run.

    :param target: ``--qmp PATH`` or ``--domain NAME``.
    """

    def __init__(self, *target: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qemu_prefault", *target, "--follow", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self.event()["why"] == "started"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def event(self) -> dict[str, Any]:
        """Wait for the next event."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it has ended with {self.process.wait()}"
        event: dict[str, Any] = json.loads(line)
        return event

    def prefaulted(self) -> dict[str, Any]:
        """Wait for the next run's event, and skip others."""
        while (event := self.event())["event"] != "prefaulted":
            pass
        return event


def mapped_bytes(guest: Guest) -> int:
    """Bytes in the stage-2 tables."""
    stats = guest.stats()
    return (stats["pages_4k"] << 12) + (stats["pages_2m"] << 21) + (stats["pages_1g"] << 30)


def plug_dimm(guest: Guest, size: int, name: str = "d0") -> None:
    """Plug the device ``dimm-NAME``, of a backend NAME; the guest takes it when it runs."""
    guest.qmp("object-add", qom_type="memory-backend-ram", id=name, size=size)
    guest.qmp("device_add", driver="pc-dimm", id=f"dimm-{name}", memdev=name)


def run_job(guest: Guest, command: str, **arguments: Any) -> None:
    guest.qmp(command, job_id="job", **arguments)
    while (job := guest.qmp("query-jobs")[0])["status"] != "concluded":
        guest.wait_event("JOB_STATUS_CHANGE")
    assert "error" not in job, job
    guest.qmp("job-dismiss", id="job")


def add_disk(guest: Guest, path: Path) -> None:
    """A qcow2 image, to keep snapshots in."""
    run_job(guest, "blockdev-create", options={"driver": "file", "filename": str(path), "size": 0})
    guest.qmp("blockdev-add", driver="file", node_name="file", filename=str(path))
    run_job(guest, "blockdev-create", options={"driver": "qcow2", "file": "file", "size": 1 << 20})
    guest.qmp("blockdev-add", driver="qcow2", node_name="disk", file="file")


@pytest.fixture(scope="session", autouse=True)
def four_kilobyte_pages() -> Iterator[None]:
    """With 2 MiB pages there is little to win, and so little to see."""
    before = thp("never")
    yield
    thp(before)


@pytest.fixture
def set_thp() -> Iterator[SetThp]:
    """Sets transparent huge pages, for this test only."""
    yield thp
    thp("never")


@pytest.fixture(scope="session")
def make_saved_state(
    four_kilobyte_pages: None, tmp_path_factory: pytest.TempPathFactory
) -> MakeSavedState:
    """States of guests that have written so many MiB; each kind is booted once.

    And by each QEMU: the patched one lacks devices that Debian's has.
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
    """Makes guests with their memory loaded, paused, and nothing in stage 2."""
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


def ram_hva(guest: Guest) -> int:
    """Where QEMU has the guest's first byte."""
    return int(guest.hmp("gpa2hva 0").split()[-1], 16)


def ram_resident(guest: Guest) -> int:
    """Bytes of the guest's RAM that are there; QEMU's own memory comes and goes."""
    return resident_bytes(guest.pid, ram_hva(guest))


def ram_checksum(guest: Guest, backend: str = "ram") -> int:
    """CRC of the guest's RAM, read from QEMU's memory behind its back."""
    size = next(m["size"] for m in guest.qmp("query-memdev") if m["id"] == backend)
    hva = ram_hva(guest)
    value = 0
    fd = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY)
    try:
        for at in range(0, size, 8 << 20):
            value = zlib.crc32(os.pread(fd, min(8 << 20, size - at), hva + at), value)
    finally:
        os.close(fd)
    return value


# -- libvirt: only in the lab's variant of that name, and by its tests ----------------------


class DomainOptions(TypedDict, total=False):
    """Keywords of :class:`qemu_prefault_lab.libvirtd.Domain`."""

    machine: str
    memory_mib: int
    workload_mib: int
    max_mib: int
    firmware_only: bool
    kernel_args: str
    metadata: str


class MakeDomain(Protocol):
    """A fixture that makes domains, and destroys them when the test ends."""

    def __call__(self, name: str, **options: Unpack[DomainOptions]) -> Domain: ...


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    from libvirt_tool import tool_output  # noqa: PLC0415

    from qemu_prefault_lab.libvirtd import Libvirtd  # noqa: PLC0415

    tool_output("libvirt", "install", "--hook")
    with Libvirtd() as daemon:
        yield daemon


@pytest.fixture
def make_domain(libvirtd: Libvirtd) -> Iterator[MakeDomain]:
    """Makes domains, of guests that write some memory."""
    from libvirt_tool import WORKLOAD_MIB  # noqa: PLC0415

    from qemu_prefault_lab.libvirtd import Domain  # noqa: PLC0415

    made: list[Domain] = []

    def make(name: str, **options: Unpack[DomainOptions]) -> Domain:
        options.setdefault("workload_mib", WORKLOAD_MIB)
        made.append(Domain(libvirtd, name, **options))
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
    """Writes the hook's configuration file."""
    from qemu_prefault.libvirt.installation import CONFIG  # noqa: PLC0415

    CONFIG.parent.mkdir(exist_ok=True)

    def write(text: str) -> None:
        CONFIG.write_text(text)

    yield write
    CONFIG.unlink(missing_ok=True)
