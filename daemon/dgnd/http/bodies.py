"""How much memory the bodies of requests may take: each, and all that are held at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dgnd.errors import LimitError, NoRoomNow

MAX_BODY_BYTES = 8 << 20
ALL_BODIES_BYTES = 64 << 20


class BodyTooLarge(LimitError):
    """The request's body is longer than any may be."""


class BodyLedger:
    """All bodies that are held."""

    def __init__(self, limit: int = ALL_BODIES_BYTES) -> None:
        self.limit = limit
        self.held = 0

    @contextmanager
    def room(self) -> Iterator[BodyRoom]:
        """For the body of one request, which is held until the end of the context."""
        room = BodyRoom(self)
        try:
            yield room
        finally:
            self.held -= room.taken


class BodyRoom:
    """What one request's body takes."""

    def __init__(self, ledger: BodyLedger) -> None:
        self._ledger = ledger
        self.taken = 0

    def take(self, n_bytes: int, before: int) -> None:
        """Takes room for another piece of a body that has `before` bytes. Raises BodyTooLarge, NoRoomNow."""
        if before + n_bytes > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the request has more than {MAX_BODY_BYTES:,} bytes; send less at once")
        if self._ledger.held + n_bytes > self._ledger.limit:
            raise NoRoomNow(
                f"requests of {self._ledger.held:,} bytes wait for their answers, "
                f"of {self._ledger.limit:,} at most; ask again later"
            )
        self._ledger.held += n_bytes
        self.taken += n_bytes
