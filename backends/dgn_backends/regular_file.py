"""Opening a file of a model directory: only a regular one, since a pipe or a device may never end.

Knows nothing of what is in it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from dgn_backends.errors import ModelError


def open_regular(path: Path) -> BinaryIO:
    """`path` for reading. Raises ModelError for what is no regular file, OSError as `open` does."""
    _check(path, path.stat())  # before opening, which may wait or have effects
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check(path, os.fstat(file.fileno()))  # it may have been replaced
    except ModelError:
        file.close()
        raise
    return file


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path}: is no regular file; put the model's own file there", file=str(path))
