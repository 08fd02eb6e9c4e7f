"""Logging to stderr, in one format for the daemon and its workers. Knows nothing of what is logged."""

from __future__ import annotations

import logging
import os
import sys

from dgnd.errors import one_line

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: int) -> None:
    """Everything from `level` on goes to stderr, each message on one line."""
    logging.basicConfig(stream=sys.stderr, level=level, format=_FORMAT)
    if _is_journal():
        logging.getLogger().handlers[0].setFormatter(_ForJournal("%(name)s: %(message)s"))
    for handler in logging.getLogger().handlers:
        handler.addFilter(_on_one_line)


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
