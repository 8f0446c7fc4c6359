# SPDX-License-Identifier: GPL-2.0-or-later
"""Read the counters of all running domains at once, within one deadline.

A domain's QEMU may be broken or hostile. It can delay or falsify what its plugin replies, and what
``/proc`` shows about it. Therefore a thread of its own reads each domain, and any exception in this
thread is a failure of this domain only. A domain that is not read within the deadline has failed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..agents.plugin import Control, find_control_socket
from ..errors import QemuPrefaultError
from ..host.kvm import Stage2Leaves, debugfs_faults, debugfs_leaves
from ..host.procfs import Process
from .events import log
from .find_qemu import find_qemu

#: Seconds for which all scrapes get the result of one collection.
INTERVAL: Final = 5.0
#: Maximum duration of a collection, in seconds. Prometheus waits 10 seconds by default.
DEADLINE: Final = 5.0
#: Maximum time that the plugin in one domain may take to reply, in seconds.
DOMAIN_SECONDS: Final = 3.0
#: Minimum time from the log line about a domain's failure to the one about its end, in seconds.
LOG_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class PluginCounters:
    """The counters that the plugin in a domain reports, in bytes.

    :ivar errors: The number of errors from the ioctl.
    """

    pending: int
    prefaulted: int
    again: int
    errors: int


@dataclass(slots=True)
class Sample:
    """The counters of one domain.

    :ivar leaves: KVM's counts of stage-2 leaves, or None if they could not be read.
    :ivar faults: KVM's ``pf_taken``, or None if it could not be read.
    :ivar plugin: The plugin's counters, or None if they were not read.
    :ivar has_plugin: Whether QEMU has loaded the plugin, or None if this is not known.
    :ivar problem: The reason why the domain could not be read completely, or an empty string.
    """

    name: str
    leaves: Stage2Leaves | None = None
    faults: int | None = None
    plugin: PluginCounters | None = None
    has_plugin: bool | None = None
    problem: str = ""


def plugin_counters(status: Mapping[str, Any]) -> PluginCounters:
    """Return the counters in the result of :meth:`.Control.status`, which has checked them."""
    counters = status["counters"]
    return PluginCounters(
        status["pending"], counters["prefaulted"], counters["again"], counters["errors"]
    )


class Sampler:
    """Reads all running domains at most once per :data:`INTERVAL`, and keeps the result.

    :param running: Returns the names of the running domains, by UUID.
    """

    def __init__(self, running: Callable[[], Mapping[str, str]]) -> None:
        self._running = running
        self._lock = threading.Lock()
        self._collection: _Collection | None = None
        self._readers: dict[str, threading.Thread] = {}
        self._failing: dict[str, float] = {}

    def samples(self) -> list[Sample]:
        """Return a sample of each running domain, after at most :data:`DEADLINE` seconds.

        Callers in several threads share one collection.
        """
        with self._lock:
            if self._collection is None or self._collection.is_old():
                self._collection = self._start(dict(self._running()))
            collection = self._collection
        collection.wait()
        with self._lock:
            if collection.end():
                self._log_changes(collection)
        running = self._running()
        # The name of a domain that has ended can be the name of another domain.
        found = {
            sample.name: sample for uuid, sample in collection.samples.items() if uuid in running
        }
        return list(found.values())

    def _start(self, running: Mapping[str, str]) -> _Collection:
        """Start one thread for each domain."""
        collection = _Collection(running)
        # A read of /proc/PID can block for as long as QEMU wants. A domain whose thread still
        # reads gets no second thread.
        self._readers = {uuid: t for uuid, t in self._readers.items() if t.is_alive()}
        for uuid, name in running.items():
            if uuid in self._readers:
                collection.finish(uuid, "an earlier read of /proc has not returned")
                continue
            thread = threading.Thread(target=collection.read, args=(uuid, name), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the limit on tasks is reached
                collection.finish(uuid, str(error))
                continue
            self._readers[uuid] = thread
        return collection

    def _log_changes(self, collection: _Collection) -> None:
        """Log each domain that fails for the first time, or that was read again."""
        now, running = time.monotonic(), self._running()
        self._failing = {uuid: when for uuid, when in self._failing.items() if uuid in running}
        for uuid, sample in collection.samples.items():
            logged = self._failing.get(uuid)
            if sample.problem and uuid in running:
                if logged is None:
                    log.warning("%s: the metrics are incomplete: %s", sample.name, sample.problem)
                    self._failing[uuid] = now
            elif logged is not None and now - logged >= LOG_SECONDS:
                log.info("%s: the metrics are complete again", sample.name)
                del self._failing[uuid]


class _Collection:
    """One read of all running domains.

    :ivar samples: The samples by UUID. They do not change after :meth:`end`.
    """

    def __init__(self, running: Mapping[str, str]) -> None:
        self.samples = {uuid: Sample(name) for uuid, name in running.items()}
        self._started = time.monotonic()
        self._changed = threading.Condition()
        self._unread = set(running)
        self._ended = False

    def is_old(self) -> bool:
        return self._ended and time.monotonic() - self._started >= INTERVAL

    def wait(self) -> None:
        """Wait until all domains have been read, or until the deadline."""
        with self._changed:
            left = self._started + DEADLINE - time.monotonic()
            self._changed.wait_for(lambda: not self._unread, max(left, 0.0))

    def end(self) -> bool:
        """End the collection, and return whether it had not ended before."""
        with self._changed:
            if self._ended:
                return False
            self._ended = True
            for uuid, sample in self.samples.items():
                # A thread that is still running may change the object.
                self.samples[uuid] = copy = replace(sample)
                if uuid in self._unread:
                    copy.problem = f"reading the domain took more than {DEADLINE:g} s"
            return True

    def finish(self, uuid: str, problem: str = "") -> None:
        """Record that a domain has been read, and why the read failed."""
        with self._changed:
            if not self._ended:
                self.samples[uuid].problem = problem
                self._unread.discard(uuid)
                self._changed.notify_all()

    def read(self, uuid: str, name: str) -> None:
        """Read one domain. This method never raises an exception."""
        try:
            problem = _read(self.samples[uuid], name, uuid)
        except BaseException as error:
            problem = describe_error(error)
        self.finish(uuid, problem)


def describe_error(error: BaseException) -> str:
    """Return one line about an exception that reading one domain has raised."""
    if isinstance(error, QemuPrefaultError):
        return error.cause
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _read(sample: Sample, name: str, uuid: str) -> str:
    """Read the counters of one domain, and return the reason if some could not be read."""
    process = find_qemu(name, uuid)
    sample.leaves, sample.faults = debugfs_leaves(process), debugfs_faults(process)
    socket = find_control_socket(process)
    sample.has_plugin = socket is not None
    if socket is not None:
        try:
            sample.plugin = asyncio.run(_ask(socket, process))
        except TimeoutError:
            return f"the plugin did not reply within {DOMAIN_SECONDS:g} s"
    process.check()  # the pid has not been reused for another process
    return ""


async def _ask(socket: Path, process: Process) -> PluginCounters:
    async with asyncio.timeout(DOMAIN_SECONDS), Control.open(socket, process) as control:
        return plugin_counters(await control.status())
