"""Work that goes on whoever began it, to the end of the node. Knows nothing of what is done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio


class Background:
    """The tasks of a node that are not of one request or connection."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._over = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; nothing of it is left then, and nothing begins any more."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._over = True

    def start(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Begins `work`, which handles its own errors."""
        assert self._nursery is not None, "run the background first"
        if self._over:  # the node ends: an answer that still closes its hops, say
            return
        self._nursery.start_soon(work, *arguments)
