"""The last lines of the log, kept in memory for `dgnctl logs`. Knows nothing of what is logged.

Who reads asks for what came after a number, so a reader that is slow, or gone, holds nothing here.
"""

from __future__ import annotations

import logging
from collections import deque
from itertools import islice
from typing import Final

from dgnd.control import api
from dgnd.errors import BadRequest, one_line

LINES: Final = 4096  #: kept
MOST: Final = 512  #: in one page
_LONGEST: Final = 1000  #: characters of a message


class LogRing(logging.Handler):
    """A handler that keeps the last lines, each with its number."""

    def __init__(self, lines: int = LINES) -> None:
        super().__init__()
        self._lines: deque[api.LogLine] = deque(maxlen=lines)
        self._last = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held, from any thread."""
        self._last += 1
        line = api.LogLine(
            number=self._last,
            time=record.created,
            level=record.levelname.lower(),
            logger=record.name,
            message=one_line(record.getMessage())[:_LONGEST],
            generation=str(getattr(record, "generation", "")),
        )
        self._lines.append(line)

    def page(self, params: api.LogsParams) -> api.LogPage:
        """The lines asked for. Raises BadRequest."""
        if params.level not in api.LOG_LEVELS:
            raise BadRequest(f"level: no {params.level!r}; there are {', '.join(api.LOG_LEVELS)}")
        if params.after is not None and params.after < 0:
            raise BadRequest("after: the number of a line, 0 or more")
        if not 0 <= params.most <= MOST:
            raise BadRequest(f"most: 0 to {MOST} lines at once")
        self.acquire()
        try:
            kept, last = list(self._lines), self._last
        finally:
            self.release()
        numbers = logging.getLevelNamesMapping()
        least = numbers[params.level.upper()]
        found = (
            line
            for line in (reversed(kept) if params.after is None else kept)
            if line.number > (params.after or 0)
            and numbers.get(line.level.upper(), logging.ERROR) >= least
            and params.generation in (None, line.generation)
        )
        lines = list(islice(found, params.most))
        oldest = kept[0].number if kept else last + 1
        if params.after is None:
            return api.LogPage(lines=lines[::-1], after=last)
        cut = len(lines) == params.most and bool(lines)
        after = lines[-1].number if cut else max(last, params.after)
        return api.LogPage(lines=lines, after=after, lost=max(0, oldest - params.after - 1))
