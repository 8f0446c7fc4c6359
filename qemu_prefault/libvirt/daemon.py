# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``libvirt watch`` daemon, which logs domain events and exports metrics.

For every running domain, the metrics are the faults, the stage-2 entries and the plugin's counters.
With ``act``, the daemon also performs the configured action after a start, a restore or a
migration. The daemon acts later than the hook, but does not delay libvirt.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from ..errors import QemuPrefaultError
from . import domain_xml
from .connection import connect, default_uri, module
from .events import DomainEvent, log
from .hook_config import LifecycleEvent, When, read
from .install import program_words
from .metrics import Metrics

#: Seconds between two attempts to connect to libvirt.
RECONNECT_SECONDS: Final = 2.0
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
        while True:
            try:
                connection = connect(self.uri)
                connection.setKeepAlive(5, 3)
                connection.registerCloseCallback(lambda *_: self._queue.put(None), None)
                connection.domainEventRegisterAny(
                    None, self._libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None
                )
                self.running = {
                    domain.UUIDString(): domain.name()
                    for domain in connection.listAllDomains(
                        self._libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
                    )
                }
            except (QemuPrefaultError, self._libvirt.libvirtError) as error:
                log.warning("libvirt does not respond, so the daemon retries: %s", _brief(error))
                time.sleep(RECONNECT_SECONDS)
                continue
            self.connected = True
            log.info("watching %s, where %d domains run", self.uri, len(self.running))
            while (event := self._queue.get()) is not None:
                self._handle(connection, event)
            self.connected = False
            log.warning("the connection to %s is lost", self.uri)

    def _run_events(self) -> None:
        while True:
            self._libvirt.virEventRunDefaultImpl()

    def _on_event(self, _conn: Any, domain: Any, event: int, detail: int, _: Any) -> None:
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
        try:
            xml = connection.lookupByUUIDString(event.uuid).XMLDesc(0).encode()
            policy = read(domain_xml.describe(xml))
        except (QemuPrefaultError, self._libvirt.libvirtError) as error:
            log.warning("%s: %s", event.name, _brief(error))
            return
        when = policy.at(event.moment)
        if when is not When.OFF:
            arguments = (event, when, policy.populate)
            threading.Thread(target=self._prefault, args=arguments, daemon=True).start()

    def _prefault(self, event: DomainEvent, when: When, populate: str) -> None:
        words = [*program_words(), "--domain", event.uuid, "--populate", populate, "--json"]
        if when is When.FOLLOW:
            words.append("--follow")
        environment = {**os.environ, "LIBVIRT_DEFAULT_URI": self.uri}
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        for line in child.stdout:
            with suppress(ValueError):
                self._told(event, json.loads(line))
        child.wait()
        self._count(event, OUTCOMES.get(child.returncode, "failed"))

    def _told(self, event: DomainEvent, report: dict[str, Any]) -> None:
        if "error" in report:
            log.warning("%s: %s", event.name, report["error"]["cause"])
            return
        done = report["bytes"]["prefaulted"] if "sections" in report else report.get("bytes", 0)
        seconds = report["seconds"]
        spent = seconds["prefault"] if isinstance(seconds, dict) else seconds
        paused = seconds["paused"] if isinstance(seconds, dict) else report.get("paused", 0.0)
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
    return error.cause if isinstance(error, QemuPrefaultError) else str(error)


class _Formatter(logging.Formatter):
    """Adds a prefix to each line.

    If stderr is connected to the journal, the prefix is the priority (sd-daemon(3)). Otherwise it
    is the time.
    """

    _PRIORITY: Final = {logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "JOURNAL_STREAM" in os.environ:
            return f"<{self._PRIORITY.get(record.levelno, 6)}>{text}"
        return f"{time.strftime('%H:%M:%S')} {text}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
