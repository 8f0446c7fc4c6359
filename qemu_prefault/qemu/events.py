# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP events, and streams of them with a maximum length that end with the connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qemu.qmp import EventListener, Message

#: Maximum number of unread events in a stream. If more arrive, the stream drops the oldest events.
MAX_EVENTS: Final = 1024


@dataclass(frozen=True, slots=True)
class Event:
    """A QMP event from QEMU.

    ``seconds`` is QEMU's timestamp of the event, in seconds since the Epoch.
    """

    name: str
    data: Mapping[str, object]
    seconds: float


class EventStream:
    """An async iterator over QMP events, which ends when the connection is closed.

    ``Monitor.events()`` creates the stream. A stream keeps the newest :data:`MAX_EVENTS` unread
    events. ``dropped`` is the number of unread events that the stream has dropped.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self.dropped = 0
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._ended = False
        self._changed = asyncio.Event()

    def put(self, event: Event) -> None:
        """Append an event, unless the stream is for other names."""
        if self.names and event.name not in self.names:
            return
        self.dropped += len(self._events) == MAX_EVENTS
        self._events.append(event)
        self._changed.set()

    def end(self) -> None:
        """End the stream after its unread events, because the connection is closed."""
        self._ended = True
        self._changed.set()

    async def get(self, timeout: float | None = None) -> Event | None:
        """Return the next event, or None if the connection is closed.

        :param timeout: The time to wait in seconds, or None to wait without a limit.
        :raises TimeoutError: If no event arrives within this time.
        """
        if not self._events and not self._ended:
            self._changed.clear()
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        return self._events.popleft() if self._events else None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self.get()
        if event is None:
            raise StopAsyncIteration
        return event


class EventDispatcher(EventListener):
    """An event listener that passes each event to all streams of a connection.

    The streams have a maximum length, unlike the queue that this class inherits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[EventStream] = []

    async def put(self, event: Message) -> None:
        parsed = _event(event)
        if parsed is not None:
            for stream in self.streams:
                stream.put(parsed)


def _event(message: Message) -> Event | None:
    name, data, stamp = message.get("event"), message.get("data", {}), message.get("timestamp")
    if not isinstance(name, str) or not isinstance(data, dict):
        return None
    seconds = 0.0
    if isinstance(stamp, dict):
        whole, micro = stamp.get("seconds"), stamp.get("microseconds")
        if type(whole) is int and type(micro) is int and 0 <= whole < 1 << 40:
            seconds = whole + max(0, min(micro, 999_999)) / 1e6
    return Event(name, data, seconds)
