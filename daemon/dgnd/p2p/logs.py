"""The log of the libraries below: theirs go where ours go, and their noise only when debugging.

py-libp2p logs a warning or an error for what is a peer's everyday end; what matters of it, the network says
itself.
"""

from __future__ import annotations

import logging


class _AsDebug(logging.Filter):
    """Turns the libraries' warnings into debug lines, and drops them where debugging is off."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger("dgnd.p2p").isEnabledFor(logging.DEBUG)


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("dgnd.p2p").handle(record)


def quieten_libraries() -> None:
    """Sends the libraries' log records to `dgnd.p2p`, at debug level. May be called again."""
    library = logging.getLogger("libp2p")
    if not any(isinstance(handler, _Forward) for handler in library.handlers):
        forward = _Forward()
        forward.addFilter(_AsDebug())
        library.addHandler(forward)
        library.propagate = False
    logging.getLogger("multiaddr").setLevel(logging.WARNING)  # three lines for each address, at debug level
