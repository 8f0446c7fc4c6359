# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the unit that the hook starts, and the daemon's unit, with a real systemd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemu_prefault_lab.libvirtd import LabDomain, Libvirtd, Systemd, wait_until
from support.libvirt import MakeDomain, read_metrics, tool_output

pytestmark = [pytest.mark.libvirt, pytest.mark.full]


@pytest.fixture(scope="module")
def systemd() -> Iterator[Systemd]:
    with Systemd() as started:
        yield started


@pytest.fixture(scope="module")
def libvirtd(systemd: Systemd) -> Iterator[Libvirtd]:
    tool_output("libvirt", "install", "--hook", "--watch")
    with Libvirtd(systemd=systemd) as daemon:
        yield daemon


class Unit:
    """The transient unit that the hook started for a guest."""

    def __init__(self, systemd: Systemd, guest: LabDomain) -> None:
        self._systemd = systemd
        begin = f"qemu-prefault-{guest.uuid}-"
        names = {word for word in self._journal().split() if word.startswith(begin)}
        assert len(names) == 1, (names, self._journal("-n", "50"))
        self.name = names.pop()

    def _journal(self, *arguments: str) -> str:
        return self._systemd.run("journalctl", "--no-pager", "--output=cat", *arguments)

    def log(self) -> str:
        return self._journal("--unit", self.name)

    def state(self) -> str:
        words = ("systemctl", "show", "--value", "--property=LoadState,ActiveState", self.name)
        return " ".join(self._systemd.run(*words).split())


@pytest.mark.parametrize("when", ["later", "follow"])
def test_hook_starts_transient_unit(make_domain: MakeDomain, systemd: Systemd, when: str) -> None:
    metadata = f"<metadata><p:hook xmlns:p='urn:qemu-prefault:1' start='{when}'/></metadata>"
    guest = make_domain(f"unit-{when}", metadata=metadata)
    guest.start()
    guest.wait_ready()
    unit = Unit(systemd, guest)
    wait_until(lambda: {"later": "verified: all", "follow": "(started)"}[when] in unit.log(),
               "the run is logged")  # fmt: skip
    assert guest.state == "running"
    guest.check_memory()
    if when == "follow":
        assert unit.state() == "loaded active"
        guest.virsh("destroy")
    wait_until(lambda: unit.state() == "not-found inactive", "the unit is removed")
    assert "Traceback" not in unit.log()


def test_daemon_unit(make_domain: MakeDomain, systemd: Systemd) -> None:
    guest = make_domain("fleet", workload_mib=0)
    guest.start()

    def show(what: str) -> str:
        words = ("systemctl", "show", "--value", f"--property={what}", "qemu-prefault-watch")
        return systemd.run(*words).strip()

    systemd.run("systemctl", "enable", "--now", "qemu-prefault-watch")
    wait_until(
        lambda: 'qemu_prefault_plugin{domain="fleet"} 0.0' in read_metrics(), "the daemon is up"
    )
    log = systemd.run("journalctl", "--unit", "qemu-prefault-watch", "--output=json")
    assert '"PRIORITY":"6"' in log and "watching qemu:///system" in log
    systemd.run("systemctl", "kill", "--signal=KILL", "qemu-prefault-watch")
    wait_until(lambda: show("NRestarts") == "1", "the unit is restarted")
    wait_until(lambda: "qemu_prefault_libvirt_up 1.0" in read_metrics(), "the daemon is up again")
    systemd.run("systemctl", "disable", "--now", "qemu-prefault-watch")
    assert (show("ActiveState"), show("Result")) == ("inactive", "success")
    assert read_metrics() == ""
