"""A lock around a write. Knows nothing of what is written."""

from __future__ import annotations

from types import TracebackType

import trio


class WriteLock:
    """As trio.Lock in `async with`, but a free one is taken without a pass of the scheduler: the write that
    follows makes one, and a token passes several locks."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    @property
    def locked(self) -> bool:
        """Whether somebody writes, or is about to."""
        return self._lock.locked()

    async def __aenter__(self) -> None:
        if self._lock.locked():
            await self._lock.acquire()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._lock.acquire_nowait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
