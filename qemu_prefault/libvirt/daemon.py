# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``libvirt watch`` daemon, which logs domain events and exports metrics.

For every running domain, the metrics are the faults, the stage-2 entries and the plugin's counters.
With ``act``, the daemon also performs the configured action after a start, a restore or a
migration. The daemon acts later than the hook, but does not delay libvirt.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from ..errors import QemuPrefaultError
from ..logs import LineHandler, escape_unhandled_records, line_start
from ..text import install_hooks
from . import domain_xml
from .connection import connect, default_uri, module
from .events import DomainEvent, log
from .hook_config import LifecycleEvent, When, read
from .install import program_words
from .metrics import Metrics

#: Seconds between two attempts to connect to libvirt.
RECONNECT_SECONDS: Final = 2.0
#: Maximum length of a line that a run prints, in characters.
LONGEST_REPORT: Final = 4 << 20
#: The "outcome" label of the metrics, by the exit status of a run.
OUTCOMES: Final = {0: "verified", 1: "failed", 3: "partial", 4: "unsupported", 5: "refused"}


def run(uri: str | None, *, listen: str | None, textfile: Path | None, act: bool) -> None:
    """Handle the events of all domains until SIGTERM arrives.

    :param uri: The URI of the libvirt connection, or None for the default URI.
    :param listen: The ``ADDRESS:PORT`` at which to serve metrics, or None.
    :param textfile: The file to which to write metrics, or None.
    :param act: Whether to perform the actions that the hook configuration requests.
    :raises UnsupportedError: If libvirt-python is not installed, or if metrics are requested and
        prometheus_client is not installed.
    """
    _log_to_stderr()
    module()
    daemon = Daemon(default_uri(uri), act)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        if listen or textfile:
            metrics = Metrics(daemon)
            if listen:
                metrics.listen(listen)
            if textfile:
                stack.enter_context(metrics.kept_in(textfile))
        daemon.run()


class Daemon:
    """Connects to libvirt, and handles the events of its domains.

    :ivar running: Names of the running domains, by UUID.
    :ivar connected: Whether the daemon is connected to libvirt.
    :ivar on_run: Functions to call with the result of each run.
    """

    def __init__(self, uri: str, act: bool) -> None:
        self.uri = uri
        self.running: dict[str, str] = {}
        self.connected = False
        self.on_run: list[Callable[..., None]] = []
        self._act = act
        self._queue: queue.Queue[DomainEvent | None] = queue.Queue()
        self._libvirt = module()

    def run(self) -> None:
        """Handle events, and reconnect to libvirt if the connection is lost.

        This method never returns.
        """
        self._libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._run_events, daemon=True).start()
        said = ""
        while True:
            try:
                self._handle_events(self._connect())
                problem = f"the connection to {self.uri} is lost"
            except (QemuPrefaultError, self._libvirt.libvirtError) as error:
                problem = f"libvirt does not respond, so the daemon retries: {_brief(error)}"
            except Exception as error:
                problem = f"the daemon failed, and connects again: {_brief(error)}"
            if self.connected or problem != said:
                log.warning("%s", problem)
            self.connected, said = False, problem
            time.sleep(RECONNECT_SECONDS)

    def _connect(self) -> Any:
        connection = connect(self.uri)
        connection.setKeepAlive(5, 3)
        connection.registerCloseCallback(lambda *_: self._queue.put(None), None)
        connection.domainEventRegisterAny(
            None, self._libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None
        )
        self.running = {
            domain.UUIDString(): domain.name()
            for domain in connection.listAllDomains(self._libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        }
        return connection

    def _handle_events(self, connection: Any) -> None:
        self.connected = True
        log.info("watching %s, where %d domains run", self.uri, len(self.running))
        while (event := self._queue.get()) is not None:
            try:
                self._handle(connection, event)
            except Exception as error:
                log.warning("%s: %s", event.name, _brief(error))

    def _run_events(self) -> None:
        said = ""
        while True:
            try:
                self._libvirt.virEventRunDefaultImpl()
            except Exception as error:
                if said != (said := _brief(error)):
                    log.error("libvirt's event loop failed, and runs again: %s", said)
                time.sleep(RECONNECT_SECONDS)

    def _on_event(self, _conn: Any, domain: Any, event: int, detail: int, _: Any) -> None:
        try:
            self._enqueue(domain, event, detail)
        except Exception as error:
            log.warning("an event could not be read: %s", _brief(error))

    def _enqueue(self, domain: Any, event: int, detail: int) -> None:
        lifecycle = {
            (self._libvirt.VIR_DOMAIN_EVENT_STARTED, 0): ("booted", LifecycleEvent.START),
            (self._libvirt.VIR_DOMAIN_EVENT_STARTED, 2): ("restored", LifecycleEvent.RESTORE),
            (self._libvirt.VIR_DOMAIN_EVENT_STARTED, 1): ("is migrating in", None),
            (self._libvirt.VIR_DOMAIN_EVENT_RESUMED, 1): (
                "has migrated in",
                LifecycleEvent.MIGRATE,
            ),
        }
        what, moment = lifecycle.get((event, detail), ("", None))
        if event == self._libvirt.VIR_DOMAIN_EVENT_STOPPED:
            what = "has ended"
        if what:
            self._queue.put(DomainEvent(domain.UUIDString(), domain.name(), what, moment))

    def _handle(self, connection: Any, event: DomainEvent) -> None:
        log.info("%s %s", event.name, event.what)
        if event.what == "has ended":
            self.running.pop(event.uuid, None)
            return
        self.running[event.uuid] = event.name
        if not self._act or event.moment is None:
            return
        xml = connection.lookupByUUIDString(event.uuid).XMLDesc(0).encode()
        policy = read(domain_xml.describe(xml))
        when = policy.at(event.moment)
        if when is not When.OFF:
            arguments = (event, when, policy.populate)
            threading.Thread(target=self._prefault, args=arguments, daemon=True).start()

    def _prefault(self, event: DomainEvent, when: When, populate: str) -> None:
        outcome = "failed"
        try:
            outcome = OUTCOMES.get(self._run_tool(event, when, populate), outcome)
        except Exception as error:
            log.warning("%s: %s", event.name, _brief(error))
        self._count(event, outcome)

    def _run_tool(self, event: DomainEvent, when: When, populate: str) -> int:
        """Prefault a domain in another process, and return the exit status of this process."""
        words = [*program_words(), "--domain", event.uuid, "--populate", populate, "--json"]
        if when is When.FOLLOW:
            words.append("--follow")
        environment = {**os.environ, "LIBVIRT_DEFAULT_URI": self.uri}
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        assert child.stdout is not None
        while line := child.stdout.readline(LONGEST_REPORT):
            try:
                self._told(event, json.loads(line))
            except Exception as error:
                log.warning("%s: a malformed report: %s", event.name, _brief(error))
        return child.wait()

    def _told(self, event: DomainEvent, report: dict[str, Any]) -> None:
        if "error" in report:
            log.warning("%s: %s", event.name, report["error"]["cause"])
            return
        done = report["bytes"]["prefaulted"] if "sections" in report else report.get("bytes", 0)
        seconds = report["seconds"]
        spent = seconds["prefault"] if isinstance(seconds, dict) else seconds
        paused = seconds["paused"] if isinstance(seconds, dict) else report.get("paused", 0.0)
        done, spent, paused = int(done), float(spent), float(paused)
        if not (0 <= done < 1 << 64 and 0 <= spent < math.inf and 0 <= paused < math.inf):
            raise ValueError("a number is out of range")
        log.info(
            "%s: %d MiB prefaulted in %.2f s, paused for %.2f s",
            *(event.name, done >> 20, spent, paused),
        )
        for hear in self.on_run:
            hear(event, done, spent, paused)

    def _count(self, event: DomainEvent, outcome: str) -> None:
        for hear in self.on_run:
            hear(event, outcome=outcome)


def _brief(error: Exception) -> str:
    return error.cause if isinstance(error, QemuPrefaultError) else str(error) or repr(error)


def _log_to_stderr() -> None:
    install_hooks()
    escape_unhandled_records()
    log.addHandler(LineHandler(before=line_start))
    log.setLevel(logging.INFO)
