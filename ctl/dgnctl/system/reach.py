"""Whether the user of the service can get at the interpreter that is to run it. Knows nothing of units."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_HOMES: Final = ("/home", "/root", "/run/user")
_HIDDEN: Final = ("/tmp", "/var/tmp")  # by PrivateTmp=yes


def places_of_python() -> list[Path]:
    """What the interpreter that runs this needs: itself, its prefix, and the folder of dgn."""
    here = Path(__file__).parents[2]
    return [
        Path(sys.executable),
        Path(sys.executable).resolve(),
        Path(sys.prefix),
        Path(sys.base_prefix),
        here,
    ]


def in_a_home(paths: Iterable[Path]) -> bool:
    """Whether one of them lies where ProtectHome hides it."""
    return any(_below(path, _HOMES) for path in paths)


def hindrance(paths: Iterable[Path]) -> str:
    """Why another user can't use them; empty if nothing stands in the way."""
    for path in paths:
        if _below(path, _HIDDEN):
            return f"{path} lies in a directory for temporary files, which the service does not see"
        for part in [path, *path.parents]:
            try:
                mode = part.stat().st_mode
            except OSError as error:
                return f"{part}: {error.strerror}"
            needed = stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH | stat.S_IXOTH
            if mode & needed != needed:
                return f"{part} is closed to other users"
    return ""


def _below(path: Path, folders: Iterable[str]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
