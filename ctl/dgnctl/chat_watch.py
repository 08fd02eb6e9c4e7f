"""What happens to an answer while it comes: nodes that leave it, and what it waits for.

Asks dgnd for its status on a connection of its own, so that the answer's is not disturbed. What can't be
asked is not told; the answer goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from dgnctl.answer_state import AnswerState, route_in_words
from dgnctl.follow import Unwatched
from dgnd.control import api, jsonrpc
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError

#: Between an answer of dgnd and the next question.
EVERY_S: Final = 0.5


class AnswerWatch:
    """Of one answer: `watch` are files for `follow`, `pause` is to be called between its rounds."""

    def __init__(
        self,
        connect: Callable[[], ControlClient],
        session: str,
        state: AnswerState,
        note: Callable[[str], None],
    ) -> None:
        self._session = session
        self._state = state
        self._note = note
        self._told = RouteNews()
        self._asked: int | None = None
        self._at = time.monotonic() + EVERY_S
        self._client: ControlClient | None = None
        try:
            self._client = connect()
        except DgnError:
            pass  # no more connections, say

    @property
    def watch(self) -> dict[int, Callable[[], bool]]:
        """Readable when dgnd has answered."""
        return {} if self._client is None else {self._client.fileno(): self._arrived}

    def pause(self) -> float:
        """Asks when it is time to; returns the seconds until then."""
        if self._client is None or self._asked is not None:
            return math.inf
        left = self._at - time.monotonic()
        if left > 0:
            return left
        try:
            self._asked = self._client.send("status")
        except DgnError:
            self._asked = -1  # it is gone: nothing more is asked
        return math.inf

    def end(self, route: Sequence[api.RouteHop] | None) -> None:
        """The answer is over, with this route."""
        if self._client is not None:
            self._client.close()
        if route is not None:
            self._say(self._told.route(route))

    def _arrived(self) -> bool:
        assert self._client is not None
        try:
            self._client.fill()
            while (message := self._client.poll()) is not None:
                if isinstance(message, jsonrpc.Response) and message.id == self._asked:
                    self._look(self._client.result("status", message))
                self._asked, self._at = None, time.monotonic() + EVERY_S
        except DgnError:
            raise Unwatched from None
        return False

    def _look(self, status: api.Status) -> None:
        mine = next((each for each in status.sessions if each.id == self._session), None)
        if mine is None:
            return
        self._state.waits = _waiting(mine.waiting)
        if mine.waiting is not None:
            self._say(self._told.waits(mine.waiting.why))
        elif mine.route:
            self._state.route = mine.route
            self._say(self._told.route(mine.route))

    def _say(self, news: str) -> None:
        if news:
            self._note(f"({news})")


class RouteNews:
    """What is new about an answer's route, in a line. Pure."""

    def __init__(self) -> None:
        self._route: Sequence[api.RouteHop] = ()
        self._why = ""

    def waits(self, why: str) -> str:
        """It can't go on now; said once for the same reason."""
        if why == self._why:
            return ""
        self._why = why
        return why

    def route(self, route: Sequence[api.RouteHop]) -> str:
        """It goes through these hops now."""
        before, self._route = self._route, list(route)
        self._why = ""
        if not before or [(hop.peer, hop.span) for hop in before] == [(hop.peer, hop.span) for hop in route]:
            return ""
        stayed = {hop.peer for hop in route}
        gone = [hop for hop in before if hop.peer not in stayed]
        if not gone:
            return f"the answer goes on through {route_in_words(route)}"
        names = " and ".join(f"{route_in_words([hop])} ({hop.span})" for hop in gone)
        return f"{names} left the answer, which goes on through {route_in_words(route)}"


def _waiting(waiting: api.WaitStatus | None) -> str:
    if waiting is None:
        return ""
    what = f" for {waiting.missing}" if waiting.missing else ""
    return f"waits{what}, {waiting.left_s:.0f} s more"
