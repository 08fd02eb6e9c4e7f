"""Logging to stderr, in one format for the daemon and its workers. Knows nothing of what is logged."""

from __future__ import annotations

import datetime
import logging
import os
import sys

import msgspec

from dgnd.errors import one_line
from dgnd.logs.fields import fields_of
from dgnd.logs.flood import Flood

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: Tells workers in which form their daemon logs.
_FORM = "DGN_LOG_FORMAT"


def log_to_stderr(level: int, form: str | None = None) -> None:
    """Everything from `level` on goes to stderr, each message on one line; of libraries nothing below INFO.
    `form`: "auto" or "json"; None: as the daemon has it that started this process."""
    if form is not None:
        os.environ[_FORM] = form
    logging.basicConfig(stream=sys.stderr, level=max(level, logging.INFO), format=_FORMAT)
    logging.getLogger("dgnd").setLevel(level)
    for handler in logging.getLogger().handlers:
        if os.environ.get(_FORM) == "json":
            handler.setFormatter(_AsJson())
        elif _is_journal():
            handler.setFormatter(_ForJournal("%(name)s: %(message)s"))
        handler.addFilter(_on_one_line)
        handler.addFilter(Flood())


class _AsJson(logging.Formatter):
    """One object a line, for whatever collects logs. `generation` leads through the logs of all nodes."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _ForJournal(logging.Formatter):
    """The journal has the time itself, and takes the priority from a prefix. A prefix rather than its native
    protocol: it needs no further socket in the sandbox, and nothing is lost when the journal restarts."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        priority = 7 if record.levelno < logging.INFO else priority
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _is_journal() -> bool:
    """Whether stderr is what the service manager connected to the journal, and not redirected since."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # none, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _on_one_line(record: logging.LogRecord) -> bool:
    """Messages may quote what peers and files say, and that must not look like further lines of the log."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True
