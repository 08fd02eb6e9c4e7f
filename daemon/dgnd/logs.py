"""Logging to stderr, in one format for the daemon and its workers. Knows nothing of what is logged."""

from __future__ import annotations

import logging
import sys

from dgnd.errors import one_line

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: int) -> None:
    """Everything from `level` on goes to stderr, each message on one line."""
    logging.basicConfig(stream=sys.stderr, level=level, format=_FORMAT)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_on_one_line)


def _on_one_line(record: logging.LogRecord) -> bool:
    """Messages may quote what peers and files say, and that must not look like further lines of the log."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True
