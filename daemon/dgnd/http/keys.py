"""API keys from a file, one a line. It is read again when it changes: a key can be taken back at once."""

from __future__ import annotations

import hmac
import logging
import os
import stat
from pathlib import Path

from dgnd.errors import ConfigError

log = logging.getLogger("dgnd.http")

MAX_FILE_BYTES = 1 << 20
LEAST_LENGTH = 16


class KeyFile:
    """The keys that are good now. Raises ConfigError when the file can't be used at the beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._keys: tuple[bytes, ...] = ()
        self._read()

    def accepts(self, key: str) -> bool:
        """Whether it is one of them. A file that can't be used any more has none."""
        try:
            self._read()
        except ConfigError as error:
            if self._keys:
                log.error("no API key is good any more: %s", error.message)
            self._keys, self._seen = (), ()
        given = key.encode()
        return sum(hmac.compare_digest(given, each) for each in self._keys) > 0  # always all of them

    def _read(self) -> None:
        path = self._path
        try:
            with open(path, "rb", opener=_at_once) as file:
                found = os.fstat(file.fileno())
                seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)
                if seen == self._seen:
                    return
                if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
                    raise ConfigError(f"{path}: is no file of API keys, one a line")
                if found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
                    raise ConfigError(
                        f"{path}: everybody on this machine may read or change it; chmod 640 {path}"
                    )
                lines = file.read(MAX_FILE_BYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise ConfigError(f"{path}: the file of API keys can't be read: {reason}") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        short = next((key for key in keys if len(key) < LEAST_LENGTH), None)
        if short is not None or not keys:
            what = f"an API key of less than {LEAST_LENGTH} characters" if keys else "no API key"
            raise ConfigError(f"{path}: has {what}; `openssl rand -hex 24` makes one")
        self._keys, self._seen = tuple(key.encode() for key in keys), seen


def _at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to is not waited for: no request would be answered meanwhile."""
    return os.open(path, flags | os.O_NONBLOCK)
