"""The line of this origin's answers that wait for memory: who is next, who is refused, what each is told.

Those that have begun come before those that have not: an answer that was admitted is finished. Else the first
to come is the first to go. Only the first tries, so that what it computes to find out is in nobody's way.
Knows nothing of routes or of who has the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from dgnd.errors import DgnError, NoRoomNow
from dgnd.words import counted

#: Between two tries of the first in the line.
RETRY_S = 0.5
#: A place in the line is news when it changes, and again after so long: a sign of life.
NEWS_S = 10.0
_POLL_S = 0.05


@dataclass(slots=True, eq=False)
class _Place:
    """One answer's."""

    session: str
    begun: bool
    deadline: float
    retry_at: float
    error: DgnError


@dataclass(slots=True)
class MemoryLine:
    """One for each model. `most`: answers that may wait in each; `wait_s`: for how long."""

    most: int
    wait_s: float
    _lines: dict[str, list[_Place]] = field(default_factory=dict)

    def error(self, model: str) -> DgnError | None:
        """Why the first waits; None where nobody does."""
        line = self._lines.get(model)
        return line[0].error if line else None

    def waits(self, session: str) -> bool:
        """Whether that session is in a line."""
        return any(place.session == session for line in self._lines.values() for place in line)

    async def wait(
        self,
        model: str,
        session: str,
        error: DgnError,
        *,
        begun: bool,
        tell: Callable[[DgnError, float], None],
        news: Callable[[str], None],
        others: Callable[[], bool],
    ) -> None:
        """Returns when the session is to try (again); it stays in the line until `leave`. `error`: what it
        lacks; `tell`: what is said of it, and the time at which it ends, whenever one of them changes;
        `news`: the same words, for who is told each of them; `others`: whether answers go on that will end,
        and make room.

        Raises NoRoomNow, with the numbers of `error`, where too many wait or it takes too long.
        """
        line = self._lines.setdefault(model, [])
        place = next((each for each in line if each.session == session), None)
        if place is None:
            place = self._enter(line, session, error, begun)
        place.error, place.retry_at = error, trio.current_time() + RETRY_S
        told: tuple[int, float] | None = None
        last, news_at = -1, 0.0
        while place in line:
            now, ahead = trio.current_time(), line.index(place)
            if begun and others():
                place.deadline = now + self.wait_s
            if told != (ahead, place.deadline):
                told = ahead, place.deadline
                tell(NoRoomNow(where_in_line(ahead), **error.data), place.deadline)
            if last != ahead or now >= news_at:
                last, news_at = ahead, now + NEWS_S
                news(where_in_line(ahead))
            if now >= place.deadline:
                self.leave(session)
                raise NoRoomNow(
                    f"{error.message}; it waited {self.wait_s:g} s (wait_s in [limits]), {ahead} ahead of it",
                    **error.data,
                )
            if not ahead and now >= place.retry_at:
                return
            await trio.sleep(_POLL_S)

    def _enter(self, line: list[_Place], session: str, error: DgnError, begun: bool) -> _Place:
        if not begun and len(line) >= self.most:
            raise NoRoomNow(
                f"{error.message}; {counted(len(line), 'answer')} wait for that already, of {self.most} at "
                "most (waiting in [limits])",
                **error.data,
            )
        now = trio.current_time()
        place = _Place(session, begun, now + self.wait_s, now, error)
        line.insert(sum(each.begun for each in line) if begun else len(line), place)
        return place

    def leave(self, session: str) -> None:
        """It has what it waited for, or is over; the next one tries at once."""
        for model, line in list(self._lines.items()):
            if any(place.session == session for place in line):
                line[:] = [place for place in line if place.session != session]
                if line:
                    line[0].retry_at = 0.0
                else:
                    del self._lines[model]


def where_in_line(ahead: int) -> str:
    """What is said of a place in the line."""
    return f"waiting for memory: {ahead} ahead"


def lacks_memory(error: DgnError) -> bool:
    """Whether a hop had no room for an answer's KV, beside others that end."""
    return isinstance(error, NoRoomNow) and "needed" in error.data
