"""Files that are written whole or not at all, and read up to a bound. Knows nothing of what they hold."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from dgnd.errors import BadRequest

MAX_BYTES: Final = 16 * 1024 * 1024


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replaces what was there, once all of the new is on disk; `mode` is that of a new file, less the umask.

    Raises:
        BadRequest: the file can't be written.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe can't be replaced
            path.write_bytes(data)
            return
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        try:
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BadRequest(f"{path}: can't be written: {error.strerror}; name another place") from None


def read_bounded(path: Path, what: str) -> bytes:
    """All of a file.

    Raises:
        BadRequest: it can't be read, or is too large to be `what`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"{path}: can't be read: {error.strerror}; give a {what}") from None
    if len(data) > MAX_BYTES:
        raise BadRequest(f"{path}: more than {MAX_BYTES} bytes; this is no {what}")
    return data
