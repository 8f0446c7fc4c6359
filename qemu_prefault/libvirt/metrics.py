# SPDX-License-Identifier: GPL-2.0-or-later
"""Export Prometheus metrics of every running domain."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import Code, UnsupportedError
from ..text import printable
from . import http
from .events import DomainEvent, log
from .sampler import Sampler, describe_error

#: Seconds between two writes of the metrics file.
TEXTFILE_SECONDS: Final = 15.0


class Watched(Protocol):
    """The attributes of the daemon that :class:`Metrics` uses.

    :ivar running: Names of the running domains, by UUID.
    :ivar connected: Whether the daemon is connected to libvirt.
    :ivar on_run: Functions to call with the result of each run.
    """

    running: dict[str, str]
    connected: bool
    on_run: list[Callable[..., None]]


class Metrics:
    """A registry of all metrics.

    All scrapes within :data:`.sampler.INTERVAL` get the same values.

    :raises UnsupportedError: If prometheus_client is not installed.
    """

    def __init__(self, daemon: Watched) -> None:
        try:
            import prometheus_client  # noqa: PLC0415
            from prometheus_client import core  # noqa: PLC0415
        except ImportError:
            raise UnsupportedError(
                "metrics need prometheus_client, which is not installed",
                "install it: apt-get install python3-prometheus-client, or pip install "
                "'qemu-prefault[libvirt]'",
                code=Code.NO_PROMETHEUS,
            ) from None
        self._client, self._core = prometheus_client, core
        self._daemon = daemon
        self._sampler = Sampler(lambda: dict(daemon.running))
        self.registry = prometheus_client.CollectorRegistry()
        counter = prometheus_client.Counter
        options: dict[str, Any] = {"registry": self.registry, "namespace": "qemu_prefault"}
        self._runs = counter("runs", "Runs of --act", ["domain", "moment", "outcome"], **options)
        self._bytes = counter("prefaulted_bytes", "Bytes prefaulted by runs", ["domain"], **options)
        self._seconds = counter(
            "seconds", "Seconds that runs spent in the ioctl", ["domain"], **options
        )
        self._paused = counter(
            "paused_seconds",
            "Total time that runs paused the guest, in seconds",
            ["domain"],
            **options,
        )
        daemon.on_run.append(self._count)
        self.registry.register(self)

    def _count(
        self,
        event: DomainEvent,
        done: int = 0,
        seconds: float = 0.0,
        paused: float = 0.0,
        outcome: str = "",
    ) -> None:
        if outcome:
            self._runs.labels(printable(event.name), str(event.moment), outcome).inc()
        for counter, amount in (
            (self._bytes, done),
            (self._seconds, seconds),
            (self._paused, paused),
        ):
            counter.labels(printable(event.name)).inc(amount)

    def describe(self) -> list[Any]:
        """Return an empty list, so that register() does not call collect()."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of all running domains, for one scrape."""
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        connected = gauge("qemu_prefault_libvirt_up", "Whether the daemon is connected to libvirt")
        connected.add_metric([], float(self._daemon.connected))
        leaves = gauge(
            "qemu_prefault_stage2_bytes", "Bytes that stage 2 maps", labels=["domain", "page_size"]
        )
        faults = counter(
            "qemu_prefault_stage2_faults", "Stage-2 faults (KVM's pf_taken)", labels=["domain"]
        )
        plugin = gauge(
            "qemu_prefault_plugin", "Whether QEMU has loaded the plugin", labels=["domain"]
        )
        pending = gauge(
            "qemu_prefault_plugin_pending_bytes", "Bytes still to prefault", labels=["domain"]
        )
        done = counter(
            "qemu_prefault_plugin_prefaulted_bytes", "Bytes prefaulted", labels=["domain"]
        )
        again = counter(
            "qemu_prefault_plugin_again_bytes", "Bytes prefaulted again", labels=["domain"]
        )
        wrong = counter("qemu_prefault_plugin_errors", "Errors from the ioctl", labels=["domain"])
        up = gauge(
            "qemu_prefault_domain_up",
            "Whether the daemon could read all metrics of the domain",
            labels=["domain"],
        )
        for sample in self._sampler.samples():
            labels = [printable(sample.name)]
            up.add_metric(labels, float(not sample.problem))
            if sample.leaves is not None:
                leaves.add_metric([*labels, "4k"], sample.leaves.pages_4k << 12)
                leaves.add_metric([*labels, "2m"], sample.leaves.pages_2m << 21)
                leaves.add_metric([*labels, "1g"], sample.leaves.pages_1g << 30)
            if sample.faults is not None:
                faults.add_metric(labels, sample.faults)
            if sample.has_plugin is not None:
                plugin.add_metric(labels, float(sample.has_plugin))
            if sample.plugin is not None:
                pending.add_metric(labels, sample.plugin.pending)
                done.add_metric(labels, sample.plugin.prefaulted)
                again.add_metric(labels, sample.plugin.again)
                wrong.add_metric(labels, sample.plugin.errors)
        yield from (connected, up, leaves, faults, plugin, pending, done, again, wrong)

    def listen(self, address: str) -> None:
        """Serve the metrics over HTTP.

        :param address: ``ADDRESS:PORT``, as for :func:`.http.bind`.
        :raises InputError: If the address is malformed.
        :raises FailedError: If the process cannot listen on the address.
        """
        listener = http.bind(address)
        http.serve(listener, self._client.make_wsgi_app(self.registry))
        host, port = listener.getsockname()[:2]
        log.info("metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)

    @contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Write the metrics to a file every 15 seconds until the block ends.

        The file is then removed.
        """
        ended = threading.Event()

        def write() -> None:
            said = ""
            while not ended.is_set():
                problem = self._write(path)
                if problem and problem != said:
                    log.warning("%s cannot be written: %s", path, problem)
                said = problem
                ended.wait(TEXTFILE_SECONDS)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            path.unlink(missing_ok=True)

    def _write(self, path: Path) -> str:
        """Replace the file, and return the reason if that fails."""
        new = None
        try:
            text = self._client.generate_latest(self.registry)
            # The name is random, and the file is created with O_EXCL. Other users may be allowed
            # to create files in this directory.
            with tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=f".{path.name}.", delete=False
            ) as file:
                new = Path(file.name)
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
            os.replace(new, path)
        except Exception as error:
            if new is not None:
                with suppress(OSError):
                    new.unlink()
            reason = error.strerror if isinstance(error, OSError) else None
            return reason or describe_error(error)
        return ""
