# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a wait for QEMU's reply can be cancelled while the reply arrives.

asyncio.wait_for() in Python 3.11 loses such a cancellation. Because of this bug, a finished run
continued to query QEMU's migration status forever.
"""

from __future__ import annotations

import asyncio

import pytest

from qemu_prefault.qemu.events import EventStream
from qemu_prefault.qemu.monitor import Monitor


class Client:
    """A client whose reply the test controls."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def execute(self, command: str, arguments: object) -> object:
        return await self.answer


@pytest.mark.parametrize("answered", [True, False])
def test_cancel_while_answer_arrives(answered: bool) -> None:
    async def main() -> None:
        monitor = Monitor.__new__(Monitor)
        client = Client()
        monitor._client = client  # type: ignore[assignment]
        monitor.command_timeout = 5
        task = asyncio.create_task(monitor.execute("query-migrate"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if answered:
            client.answer.set_result({})
            await asyncio.sleep(0)  # wait_for() has the reply but has not returned yet
        task.cancel()
        if not task.done():
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_cancel_while_event_arrives() -> None:
    async def main() -> None:
        stream = EventStream(["STOP"])
        task = asyncio.create_task(stream.get(5))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stream._changed.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
