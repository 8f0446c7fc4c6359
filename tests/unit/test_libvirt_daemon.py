# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that no exception ends the daemon, and that one domain's errors affect only this domain.

libvirt-python is a stand-in here, which fails where a test wants it to. The tests in
tests/nested/test_libvirt.py use libvirtd.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from qemu_prefault.libvirt import daemon as daemon_module
from qemu_prefault.libvirt.daemon import Daemon
from qemu_prefault.libvirt.events import DomainEvent, log
from qemu_prefault.libvirt.hook_config import LifecycleEvent, When
from qemu_prefault.logs import LineHandler, line_start
from qemu_prefault_lab.wait import wait_for

UUID = "6f1d8f5a-8f0b-4f63-a3a5-0c8d0f5c8d1{}"
XML = """<domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid>
<metadata><p:x xmlns:p='urn:qemu-prefault:1' start='later'/></metadata></domain>"""


class LibvirtError(Exception):
    pass


@dataclass
class StandIn:
    """The functions of libvirt-python that the daemon uses.

    :ivar problems: Errors that the next calls of a function raise, by the function's name.
    """

    problems: dict[str, list[Exception]] = field(default_factory=dict)
    xml: dict[str, str] = field(default_factory=dict)
    opened: int = 0
    on_event: Callable[..., None] = print
    on_close: Callable[..., None] = print

    def _call(self, name: str) -> None:
        if self.problems.get(name):
            raise self.problems[name].pop(0)

    def module(self) -> types.ModuleType:
        found = types.ModuleType("libvirt")
        values: dict[str, Any] = {
            "libvirtError": LibvirtError,
            "registerErrorHandler": lambda *_: None,
            "virEventRegisterDefaultImpl": lambda: None,
            "virEventRunDefaultImpl": self._run_events,
            "open": lambda _uri: self._open(),
            "VIR_DOMAIN_EVENT_STARTED": 2,
            "VIR_DOMAIN_EVENT_RESUMED": 4,
            "VIR_DOMAIN_EVENT_STOPPED": 5,
            "VIR_DOMAIN_EVENT_ID_LIFECYCLE": 0,
            "VIR_CONNECT_LIST_DOMAINS_ACTIVE": 1,
        }
        vars(found).update(values)
        return found

    def _run_events(self) -> None:
        self._call("events")
        threading.Event().wait()

    def _open(self) -> StandIn:
        self._call("open")
        self.opened += 1
        return self

    def setKeepAlive(self, *_: object) -> None:
        pass

    def registerCloseCallback(self, callback: Callable[..., None], _: object) -> None:
        self.on_close = callback

    def domainEventRegisterAny(self, _a: Any, _b: Any, callback: Any, _c: Any) -> None:
        self.on_event = callback

    def listAllDomains(self, _flags: int) -> list[Any]:
        self._call("list")
        return []

    def lookupByUUIDString(self, uuid: str) -> Any:
        return types.SimpleNamespace(XMLDesc=lambda _flags: self.xml[uuid])

    def start(self, name: str, number: int) -> None:
        """Report that a domain has booted."""
        uuid = UUID.format(number)
        domain = types.SimpleNamespace(UUIDString=lambda: uuid, name=lambda: name)
        self.on_event(None, domain, 2, 0, None)


@pytest.fixture
def libvirt(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "libvirt", stand_in.module())
    monkeypatch.setattr(daemon_module, "RECONNECT_SECONDS", 0.01)
    return stand_in


def start_daemon(act: bool = False) -> Daemon:
    daemon = Daemon("test:///", act)
    threading.Thread(target=daemon.run, daemon=True).start()
    return daemon


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_every_error_is_survived_and_logged_once(
    libvirt: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    libvirt.problems["open"] = [ValueError("odd")] * 5 + [RecursionError("deep")]
    libvirt.problems["list"] = [TypeError("list")]
    libvirt.problems["events"] = [RuntimeError("loop")] * 5
    daemon = start_daemon()
    wait_for(lambda: daemon.connected, "the daemon connects", limit=60)
    wait_for(lambda: not libvirt.problems["events"], "the event loop runs", limit=60)
    found = messages(caplog)
    for text in ("odd", "deep", "list", "loop"):
        assert sum(text in line for line in found) == 1, found
    libvirt.on_close()
    wait_for(lambda: libvirt.opened == 3, "the daemon connects again", limit=60)


def test_one_domain_s_error_does_not_affect_another(
    libvirt: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(Daemon, "_prefault", lambda _self, event, *_: ran.append(event.name))
    daemon = start_daemon(act=True)
    wait_for(lambda: daemon.connected, "the daemon connects", limit=60)
    bad = ["<domain" * 5, "", "<a>" * 20_000, XML.replace("later", "x")]
    for number, xml in enumerate(bad):
        libvirt.xml[UUID.format(number)] = xml
        libvirt.start(f"bad{number}", number)
    libvirt.start("no XML", 8)
    libvirt.on_event(None, None, 2, 0, None)  # a domain without a name
    libvirt.xml[UUID.format(9)] = XML.format(name="good", uuid=UUID.format(9))
    libvirt.start("good", 9)
    wait_for(lambda: ran == ["good"], "the good domain is prefaulted", limit=60)
    for name in ("bad0", "bad1", "bad2", "bad3", "no XML"):
        assert any(line.startswith(f"{name}: ") for line in messages(caplog)), name
    assert daemon.connected


HOSTILE_REPORTS = [
    "1", "[]", "{}", "x", '{"error": 7}', '{"error": {}}', "[" * 60_000,
    '{"seconds": "x"}', '{"seconds": 1, "bytes": "y"}', '{"sections": [], "bytes": []}',
    '{"seconds": -1}', '{"seconds": NaN}', '{"seconds": 1, "bytes": 1%s}' % ("0" * 4000), "\udcff",
]  # fmt: skip


def test_hostile_report_is_a_failed_run(
    libvirt: StandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys\nsys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')\n"
        f"for line in {HOSTILE_REPORTS!r}:\n    print(line)\nsys.exit(3)"
    )
    words = [sys.executable, "-c", program]
    monkeypatch.setattr(daemon_module, "program_words", lambda: words)
    daemon = Daemon("test:///", True)
    outcomes: list[str] = []

    def hear(_event: DomainEvent, *_: object, outcome: str = "") -> None:
        outcomes.append(outcome)

    daemon.on_run.append(hear)
    event = DomainEvent(UUID.format(0), "hostile", "booted", LifecycleEvent.START)
    daemon._prefault(event, When.LATER, "auto")
    assert outcomes == ["partial"]
    assert len(messages(caplog)) == len(HOSTILE_REPORTS)
    assert all(line.startswith("hostile: ") for line in messages(caplog))
    monkeypatch.setattr(daemon_module, "program_words", lambda: ["/nowhere"])
    daemon._prefault(event, When.LATER, "auto")
    assert outcomes == ["partial", "failed"]


@pytest.mark.parametrize("journal", [True, False])
def test_log_lines_have_our_priority_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, journal: bool
) -> None:
    if journal:
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    else:
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    handler = LineHandler(before=line_start)
    log.addHandler(handler)
    monkeypatch.setattr(log, "propagate", False)  # pytest's handler raises formatting errors
    try:
        log.warning("%s: %s", "web1", "QEMU refused x: oops\n<0>Broadcast: failure\x1b]0;pwn\x07")
        log.warning("%s", "<0>" + "x<0>" * 100_000)
        log.warning("%d", "<0>\n<0>")
    finally:
        log.removeHandler(handler)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.isprintable() and len(line) < 3000
        assert line.startswith("<4>") is journal
        assert "<0>" not in line
