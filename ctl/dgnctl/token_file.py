"""Token ids in a file: decimal numbers separated by commas; line breaks and spaces don't matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dgnctl.whole_file import read_bounded, write_whole
from dgnd.errors import BadRequest

_MAX_ID: Final = 2**31 - 1


def write_ids(path: Path, ids: Sequence[int]) -> None:
    """Writes the ids on one line, replacing what was there.

    Raises:
        BadRequest: the file can't be written.
    """
    write_whole(path, (",".join(map(str, ids)) + "\n").encode("ascii"))


def read_ids(path: Path) -> list[int]:
    """The ids in a file.

    Raises:
        BadRequest: the file can't be read, or holds something else; names the line.
    """
    data = read_bounded(path, "file of token ids")
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
        raise BadRequest(f"{path}: holds no token ids; expected numbers and commas")
    return ids
