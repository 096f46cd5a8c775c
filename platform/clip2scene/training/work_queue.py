"""The queue of a worker group's work and its messages: an actor on the driver's node, which outlives other nodes.

Its process imports this module and none of the heavy ones, so the items are references that only workers resolve.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


class WorkQueue:
    """An asyncio actor; items are numbered from 0."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._messages: list[tuple[str, Any]] = []
        self._num_done, self._closed = 0, False
        self._changed = asyncio.Condition()

    async def put(self, item: Any) -> int:
        """Add an item; returns its number."""
        async with self._changed:
            self._items.append(item)
            self._changed.notify_all()
            return len(self._items) - 1

    async def close(self) -> None:
        """End the queue; items that are not done are dropped."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def first(self) -> int:
        """Number of the first item that is not done."""
        return self._num_done

    async def get(self, number: int) -> Any:
        """Wait for an item; None once the queue is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._items) > number)
            return None if self._closed else self._items[number]

    async def done(self, number: int) -> None:
        """Mark an item as done by all workers, and tell the driver."""
        self._items[number], self._num_done = None, number + 1
        await self.send("done", number)

    async def send(self, kind: str, value: Any) -> None:
        """Send a message to the driver; raises once the queue is closed, which ends a worker that nobody waits for."""
        async with self._changed:
            if self._closed:
                raise RuntimeError("the driver has closed the work queue")
            self._messages.append((kind, value))
            self._changed.notify_all()

    async def messages(self, timeout_s: float) -> list[tuple[str, Any]]:
        """Messages since the last call, in order; empty if none arrives within the timeout."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                if not self._messages:
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._messages), timeout_s)
            sent, self._messages = self._messages, []
            return sent
