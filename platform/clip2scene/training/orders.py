"""What a crew of workers is to do, and what they say: an actor on the driver's node, safe from any other node's end.

Its process imports this module and none of the heavy ones, so orders are references that only workers look up.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


class Orders:
    """An asyncio actor; numbers of orders count from 0."""

    def __init__(self) -> None:
        self._orders: list[Any] = []
        self._messages: list[tuple[str, Any]] = []
        self._done, self._closed = 0, False
        self._changed = asyncio.Condition()

    async def give(self, order: Any) -> int:
        """Add an order; returns its number."""
        async with self._changed:
            self._orders.append(order)
            self._changed.notify_all()
            return len(self._orders) - 1

    async def close(self) -> None:
        """No more orders; those that are not done are not wanted any more."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def first(self) -> int:
        """Number of the first order that is not done."""
        return self._done

    async def get(self, number: int) -> Any:
        """Wait for an order; None when there will be none."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._orders) > number)
            return None if self._closed else self._orders[number]

    async def done(self, number: int) -> None:
        """All workers have done it."""
        self._orders[number], self._done = None, number + 1
        await self.say("done", number)

    async def say(self, kind: str, value: Any) -> None:
        """Tell the driver something; raises when it does not listen any more, which ends a worker that nobody wants."""
        async with self._changed:
            if self._closed:
                raise RuntimeError("the driver does not listen any more")
            self._messages.append((kind, value))
            self._changed.notify_all()

    async def hear(self, timeout_s: float) -> list[tuple[str, Any]]:
        """What was said since the last call, in order; empty when nothing is said for so many seconds."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                if not self._messages:
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._messages), timeout_s)
            said, self._messages = self._messages, []
            return said
