"""Lines for systemd's journal, with fields that `journalctl DGN_GENERATION=…` finds.

Its native protocol is a datagram of fields for each line, or the same in a sealed file for one that is too
long (systemd.io/JOURNAL_NATIVE_PROTOCOL). What can't be sent so goes to stderr, which the journal reads too:
nothing is lost while the journal restarts. Knows nothing of what is logged.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Final, TextIO

from dgnd.logs.fields import fields_of

SOCKET: Final = "/run/systemd/journal/socket"
#: A journal that does not read holds up nobody for longer.
_PATIENCE_S: Final = 0.2


class JournalHandler(logging.StreamHandler[TextIO]):
    """Sends lines to the journal at `path`, or writes them to `stream`, where the journal reads, too."""

    def __init__(self, stream: TextIO, path: str = SOCKET) -> None:
        super().__init__(stream)
        self.setFormatter(ForJournal())
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE_S)

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held, from any thread."""
        try:
            self._send(encode_entry(journal_fields(record)))
        except OSError:  # no journal there now, or one that does not read
            super().emit(record)

    def close(self) -> None:
        """Also closes the socket; `stream` stays open."""
        self._socket.close()
        super().close()

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_large(entry)

    def _send_large(self, entry: bytes) -> None:
        file = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(file, "wb") as memory:
            memory.write(entry)
            memory.flush()
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
            files = memory.fileno().to_bytes(4, sys.byteorder)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, files)
            self._socket.sendmsg([b""], [rights], 0, self._path)  # `send_fds` forgets the address


class ForJournal(logging.Formatter):
    """For stderr: the journal has the time itself, and takes the priority from a prefix."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return "\n".join(f"<{_priority(record)}>{line}" for line in lines)


def is_journal() -> bool:
    """Whether stderr is what the service manager connected to the journal, and not redirected since."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # none, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def journal_fields(record: logging.LogRecord) -> dict[str, str]:
    """A line's fields: those of systemd.journal-fields(7), and ours, which begin with DGN_."""
    return {
        "MESSAGE": logging.Formatter("%(name)s: %(message)s").format(record),
        "PRIORITY": str(_priority(record)),
        "SYSLOG_IDENTIFIER": "dgnd",
        "DGN_LOGGER": record.name,
        **{f"DGN_{name.upper()}": value for name, value in fields_of(record).items()},
    }


def encode_entry(fields: Mapping[str, str]) -> bytes:
    """One entry as it is sent: `NAME=value`, or for a value of several lines its length and bytes."""
    parts = []
    for name, text in fields.items():
        value = text.encode(errors="replace")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)


def _priority(record: logging.LogRecord) -> int:
    """As syslog(3) counts."""
    if record.levelno >= logging.ERROR:
        return 3
    if record.levelno >= logging.WARNING:
        return 4
    return 6 if record.levelno >= logging.INFO else 7
