# SPDX-License-Identifier: GPL-2.0-or-later
"""Export Prometheus metrics of every running domain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from ..agents.plugin import Control, find_control_socket
from ..errors import Code, FailedError, InputError, QemuPrefaultError, UnsupportedError
from ..host.kvm import debugfs_faults, debugfs_leaves
from .events import DomainEvent, log
from .find_qemu import find_qemu

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
    """A registry that collects all metrics at each scrape.

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
            self._runs.labels(event.name, str(event.moment), outcome).inc()
        self._bytes.labels(event.name).inc(done)
        self._seconds.labels(event.name).inc(seconds)
        self._paused.labels(event.name).inc(paused)

    def describe(self) -> list[Any]:
        """Return an empty list, so that register() does not call collect()."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of all running domains, for one scrape."""
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        up = gauge("qemu_prefault_libvirt_up", "Whether the daemon is connected to libvirt")
        up.add_metric([], float(self._daemon.connected))
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
        for uuid, name in list(self._daemon.running.items()):
            try:
                process = find_qemu(name, uuid)
                stage2, taken = debugfs_leaves(process), debugfs_faults(process)
                status = self._ask(process)
            except QemuPrefaultError:
                continue  # the domain has just ended
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
                return await control.status()

        return asyncio.run(ask())

    def listen(self, address: str) -> None:
        """Serve the metrics over HTTP.

        :param address: ``ADDRESS:PORT``. An empty ADDRESS means all interfaces.
        :raises InputError: If the address is malformed.
        :raises FailedError: If the process cannot listen on the address.
        """
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"{address!r} is not ADDRESS:PORT", "write e.g. 127.0.0.1:9469")
        try:
            # The option's documentation states this meaning of an empty address.
            host = host or "0.0.0.0"  # nosec B104
            self._client.start_http_server(int(port), host, self.registry)
        except OSError as error:
            raise FailedError(
                f"cannot listen on {address}: {error.strerror}",
                f"to find the program that uses the port, run: ss -ltnp sport = {port}",
            ) from error
        log.info("metrics at http://%s/metrics", address)

    @contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Write the metrics to a file every 15 seconds until the block ends.

        The file is then removed.
        """
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
