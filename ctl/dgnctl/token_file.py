"""Token ids in a file: decimal numbers separated by commas; line breaks and spaces don't matter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dgnd.errors import BadRequest

MAX_BYTES: Final = 16 * 1024 * 1024
_MAX_ID: Final = 2**31 - 1


def write_ids(path: Path, ids: Sequence[int]) -> None:
    """Writes the ids on one line, replacing what was there.

    Raises:
        BadRequest: the file can't be written.
    """
    try:
        text = ",".join(map(str, ids)) + "\n"
        if path.exists() and not path.is_file():  # a device or a pipe can't be replaced
            path.write_text(text, encoding="ascii")
            return
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:  # what was there stays until all of the new is on disk
            aside.write_text(text, encoding="ascii")
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BadRequest(f"{path}: can't be written: {error.strerror}") from None


def read_ids(path: Path) -> list[int]:
    """The ids in a file.

    Raises:
        BadRequest: the file can't be read, or holds something else; names the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"{path}: can't be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadRequest(f"{path}: more than {MAX_BYTES} bytes; this is no file of token ids")
    ids = []
    for number, line in enumerate(data.split(b"\n"), 1):
        parts = [part.strip() for part in line.strip().rstrip(b",").split(b",")]
        if parts == [b""]:
            continue
        for part in parts:
            if not (part.isdigit() and len(part) <= 10 and int(part) <= _MAX_ID):
                shown = part[:20].decode("ascii", "backslashreplace")
                raise BadRequest(f"{path}:{number}: '{shown}' is not a token id; expected numbers and commas")
            ids.append(int(part))
    if not ids:
        raise BadRequest(f"{path}: holds no token ids")
    return ids
