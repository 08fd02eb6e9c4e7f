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
from dgnd.logs.journald import JournalHandler, is_journal

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: Tells workers in which form their daemon logs.
_FORM = "DGN_LOG_FORMAT"


def log_to_stderr(level: int, form: str | None = None) -> None:
    """Everything from `level` on goes to stderr, each message on one line; of libraries nothing below INFO.
    `form`: "auto" or "json"; None: as the daemon has it that started this process."""
    if form is not None:
        os.environ[_FORM] = form
    as_json = os.environ.get(_FORM) == "json"
    handler: logging.Handler
    if is_journal() and not as_json:
        handler = JournalHandler(sys.stderr)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_AsJson() if as_json else logging.Formatter(_FORMAT))
    handler.addFilter(_on_one_line)
    handler.addFilter(Flood())
    logging.basicConfig(handlers=[handler], level=max(level, logging.INFO))
    logging.getLogger("dgnd").setLevel(level)


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


def _on_one_line(record: logging.LogRecord) -> bool:
    """Messages may quote what peers and files say, and that must not look like further lines of the log."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True
