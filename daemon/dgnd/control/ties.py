"""Sessions that live no longer than a connection: those of a chat that has no name for its conversation.

A session belongs to the connection that tied it last, so a client can take it along to a new one. Knows
nothing of sockets.
"""

from __future__ import annotations

import contextlib

from dgnd.control import api
from dgnd.control.service import ControlService
from dgnd.errors import BadRequest


class Ties:
    """Which connection, by any object that stands for it, has which sessions."""

    def __init__(self, service: ControlService) -> None:
        self._service = service
        self._owners: dict[str, object] = {}

    def tie(self, session: str, owner: object) -> None:
        """The session, which need not be there yet, ends with `owner`."""
        self._owners[session] = owner

    async def release(self, owner: object) -> None:
        """`owner` has ended, with all its requests: what it has is forgotten."""
        for session in [name for name, of in self._owners.items() if of is owner]:
            del self._owners[session]
            with contextlib.suppress(BadRequest):  # it never was, was cleared, or another client is using it
                await self._service.cache_clear(api.CacheClearParams(session=session))
