# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon for fleets: libvirt's events, journald's log, and metrics for Prometheus.

It observes: faults and stage-2 entries of every running domain, and what its plugin has done.
With ``act`` it also does what the policies ask for after a start, a restore or a migration;
that is a moment later than the hook, and needs no place in libvirt's own processes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..agents.plugin import Control, find_control_socket
from ..errors import FailedError, InputError, QemuPrefaultError, UnsupportedError
from . import domain_xml
from .connection import connect, default_uri, module
from .installation import program_words
from .policy import Moment, When, read
from .qemu_process import find_qemu
from .window import read_counters, total_faults

log = logging.getLogger("qemu-prefault")

TEXTFILE_SECONDS: Final = 15.0
RECONNECT_SECONDS: Final = 2.0
OUTCOMES: Final = {0: "verified", 1: "failed", 3: "partial", 4: "unsupported", 5: "refused"}


@dataclass(frozen=True, slots=True)
class Happened:
    """A guest has been started, has come, or has gone: ``moment`` None."""

    uuid: str
    name: str
    what: str
    moment: Moment | None


def run(uri: str | None, *, listen: str | None, textfile: Path | None, act: bool) -> None:
    """Watch until SIGTERM.

    :raise UnsupportedError: libvirt-python, or prometheus_client for metrics, is missing.
    """
    _log_to_stderr()
    module()
    watcher = Watcher(default_uri(uri), act)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        if listen or textfile:
            metrics = Metrics(watcher)
            if listen:
                metrics.listen(listen)
            if textfile:
                stack.enter_context(metrics.kept_in(textfile))
        watcher.run()


class Watcher:
    """The connection, and the work that follows from its events.

    :ivar running: names of the domains that run, by UUID.
    """

    def __init__(self, uri: str, act: bool) -> None:
        self.uri = uri
        self.running: dict[str, str] = {}
        self.connected = False
        self.on_run: list[Any] = []
        self._act = act
        self._queue: queue.Queue[Happened | None] = queue.Queue()
        self._libvirt = module()

    def run(self) -> None:
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
                log.warning("libvirt does not answer, trying again: %s", _brief(error))
                time.sleep(RECONNECT_SECONDS)
                continue
            self.connected = True
            log.info("watching %s, %d domains run", self.uri, len(self.running))
            while (happened := self._queue.get()) is not None:
                self._handle(connection, happened)
            self.connected = False
            log.warning("the connection to %s is lost", self.uri)

    def _run_events(self) -> None:
        while True:
            self._libvirt.virEventRunDefaultImpl()

    def _on_event(self, _conn: Any, domain: Any, event: int, detail: int, _: Any) -> None:
        moments = {
            (self._libvirt.VIR_DOMAIN_EVENT_STARTED, 0): ("booted", Moment.START),
            (self._libvirt.VIR_DOMAIN_EVENT_STARTED, 2): ("restored", Moment.RESTORE),
            (self._libvirt.VIR_DOMAIN_EVENT_STARTED, 1): ("is migrating in", None),
            (self._libvirt.VIR_DOMAIN_EVENT_RESUMED, 1): ("has migrated in", Moment.MIGRATE),
        }
        what, moment = moments.get((event, detail), ("", None))
        if event == self._libvirt.VIR_DOMAIN_EVENT_STOPPED:
            what = "has ended"
        if what:
            self._queue.put(Happened(domain.UUIDString(), domain.name(), what, moment))

    def _handle(self, connection: Any, happened: Happened) -> None:
        log.info("%s %s", happened.name, happened.what)
        if happened.what == "has ended":
            self.running.pop(happened.uuid, None)
            return
        self.running[happened.uuid] = happened.name
        if not self._act or happened.moment is None:
            return
        try:
            xml = connection.lookupByUUIDString(happened.uuid).XMLDesc(0).encode()
            policy = read(domain_xml.describe(xml))
        except (QemuPrefaultError, self._libvirt.libvirtError) as error:
            log.warning("%s: %s", happened.name, _brief(error))
            return
        when = policy.at(happened.moment)
        if when is not When.OFF:
            arguments = (happened, when, policy.populate)
            threading.Thread(target=self._prefault, args=arguments, daemon=True).start()

    def _prefault(self, happened: Happened, when: When, populate: str) -> None:
        words = [*program_words(), "--domain", happened.uuid, "--populate", populate, "--json"]
        if when is When.FOLLOW:
            words.append("--follow")
        environment = {**os.environ, "LIBVIRT_DEFAULT_URI": self.uri}
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        for line in child.stdout:
            with suppress(ValueError):
                self._told(happened, json.loads(line))
        child.wait()
        self._count(happened, OUTCOMES.get(child.returncode, "failed"))

    def _told(self, happened: Happened, report: dict[str, Any]) -> None:
        if "error" in report:
            log.warning("%s: %s", happened.name, report["error"]["cause"])
            return
        done = report["bytes"]["prefaulted"] if "sections" in report else report.get("bytes", 0)
        seconds = report["seconds"]
        spent = seconds["prefault"] if isinstance(seconds, dict) else seconds
        paused = seconds["paused"] if isinstance(seconds, dict) else report.get("paused", 0.0)
        log.info(
            "%s: %d MiB prefaulted in %.2f s, paused for %.2f s",
            *(happened.name, done >> 20, spent, paused),
        )
        for hear in self.on_run:
            hear(happened, done, spent, paused)

    def _count(self, happened: Happened, outcome: str) -> None:
        for hear in self.on_run:
            hear(happened, outcome=outcome)


class Metrics:
    """What Prometheus is told.

    :raise UnsupportedError: prometheus_client is not installed.
    """

    def __init__(self, watcher: Watcher) -> None:
        try:
            import prometheus_client  # noqa: PLC0415
            from prometheus_client import core  # noqa: PLC0415
        except ImportError:
            raise UnsupportedError(
                "metrics take prometheus_client, which is not installed",
                "apt-get install python3-prometheus-client, or pip install "
                "'qemu-prefault[libvirt]'",
                code="no-prometheus",
            ) from None
        self._client, self._core = prometheus_client, core
        self._watcher = watcher
        self.registry = prometheus_client.CollectorRegistry()
        counter = prometheus_client.Counter
        options: dict[str, Any] = {"registry": self.registry, "namespace": "qemu_prefault"}
        self._runs = counter(
            "runs", "Runs that were asked for", ["domain", "moment", "outcome"], **options
        )
        self._bytes = counter("prefaulted_bytes", "Prefaulted by runs", ["domain"], **options)
        self._seconds = counter("seconds", "Spent in the ioctl by runs", ["domain"], **options)
        self._paused = counter("paused_seconds", "Guest kept from running", ["domain"], **options)
        watcher.on_run.append(self._count)
        self.registry.register(self)

    def _count(
        self,
        happened: Happened,
        done: int = 0,
        seconds: float = 0.0,
        paused: float = 0.0,
        outcome: str = "",
    ) -> None:
        if outcome:
            self._runs.labels(happened.name, str(happened.moment), outcome).inc()
        self._bytes.labels(happened.name).inc(done)
        self._seconds.labels(happened.name).inc(seconds)
        self._paused.labels(happened.name).inc(paused)

    def describe(self) -> list[Any]:
        """Nothing is known before it is asked for."""
        return []

    def collect(self) -> Iterator[Any]:
        """Look at every running domain; called for each scrape."""
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        up = gauge("qemu_prefault_libvirt_up", "Whether libvirt answers")
        up.add_metric([], float(self._watcher.connected))
        leaves = gauge(
            "qemu_prefault_stage2_bytes", "Mapped in stage 2", labels=["domain", "page_size"]
        )
        faults = counter("qemu_prefault_stage2_faults", "KVM's pf_taken", labels=["domain"])
        plugin = gauge("qemu_prefault_plugin", "Whether its QEMU has the plugin", labels=["domain"])
        pending = gauge("qemu_prefault_plugin_pending_bytes", "To be done", labels=["domain"])
        done = counter("qemu_prefault_plugin_prefaulted_bytes", "By the plugin", labels=["domain"])
        again = counter("qemu_prefault_plugin_again_bytes", "Done again", labels=["domain"])
        wrong = counter("qemu_prefault_plugin_errors", "Of the ioctl", labels=["domain"])
        for uuid, name in list(self._watcher.running.items()):
            try:
                process = find_qemu(name, uuid)
                stage2, taken = read_counters(process), total_faults(process)
                status = self._ask(process)
            except QemuPrefaultError:
                continue  # it has just ended
            if stage2 is not None:
                leaves.add_metric([name, "4k"], stage2.pages_4k << 12)
                leaves.add_metric([name, "2m"], stage2.pages_2m << 21)
                leaves.add_metric([name, "1g"], stage2.pages_1g << 30)
            if taken is not None:
                faults.add_metric([name], taken)
            plugin.add_metric([name], status is not None)
            if status is not None:
                pending.add_metric([name], status["pending"])
                done.add_metric([name], status["counters"]["prefaulted"])
                again.add_metric([name], status["counters"]["again"])
                wrong.add_metric([name], status["counters"]["errors"])
        yield from (up, leaves, faults, plugin, pending, done, again, wrong)

    @staticmethod
    def _ask(process: Any) -> dict[str, Any] | None:
        socket = find_control_socket(process)
        if socket is None:
            return None

        async def ask() -> dict[str, Any]:
            async with Control.open(socket, process.pid) as control:
                return await control.ask("status")

        return asyncio.run(ask())

    def listen(self, address: str) -> None:
        """Serve them over HTTP.

        :raise InputError: that is no address. :raise FailedError: it is not free.
        """
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"{address!r} is no ADDRESS:PORT", "write e.g. 127.0.0.1:9469")
        try:
            self._client.start_http_server(int(port), host or "0.0.0.0", self.registry)
        except OSError as error:
            raise FailedError(
                f"{address} cannot be listened on: {error.strerror}",
                f"see: ss -ltnp sport = {port}",
            ) from error
        log.info("metrics at http://%s/metrics", address)

    @contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Write them to a file over and over; it is removed in the end, lest old figures stay."""
        ended = threading.Event()

        def write() -> None:
            while not ended.is_set():
                try:
                    self._client.write_to_textfile(str(path), self.registry)
                except OSError as error:
                    log.warning("%s cannot be written: %s", path, error.strerror)
                ended.wait(TEXTFILE_SECONDS)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            path.unlink(missing_ok=True)


def _brief(error: Exception) -> str:
    return error.cause if isinstance(error, QemuPrefaultError) else str(error)


class _Formatter(logging.Formatter):
    """systemd takes a priority in angle brackets (sd-daemon(3)); a terminal wants the time."""

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
