"""Where units, users and directories of the service are written: for the machine, or for one user. Pure.

A package of the distribution has its own places, which are only looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

UNITS = ("dgnd.service", "dgnd.socket")


@dataclass(frozen=True, slots=True)
class Places:
    """`root`: what stands for / where the files are written."""

    user: bool
    root: Path
    units: Path  #: without `root`
    config: Path  #: of dgnd, without `root`
    state: Path

    @classmethod
    def of_system(cls, root: Path) -> Places:
        """For the machine."""
        return cls(False, root, Path("/etc/systemd/system"), Path("/etc/dgn/dgn.toml"), Path("/var/lib/dgn"))

    @classmethod
    def of_user(cls, root: Path, environ: Mapping[str, str] = os.environ) -> Places:
        """For the user who runs this."""
        home = Path(environ.get("HOME") or Path.home())
        config = _base(environ, "XDG_CONFIG_HOME", home / ".config")
        state = _base(environ, "XDG_STATE_HOME", home / ".local/state")
        return cls(True, root, config / "systemd/user", config / "dgn/dgn.toml", state / "dgn")

    def under_root(self, path: Path) -> Path:
        """Where `path` is written."""
        return self.root / path.relative_to("/") if self.root != Path("/") else path

    @property
    def packaged(self) -> tuple[Path, ...]:
        """Where a package would have the units."""
        kind = "user" if self.user else "system"
        folders = (Path("/usr/lib/systemd"), Path("/lib/systemd"), Path("/usr/local/lib/systemd"))
        return tuple(self.under_root(folder / kind / name) for folder in folders for name in UNITS)


def _base(environ: Mapping[str, str], key: str, default: Path) -> Path:
    """The directory that a variable names; one that is relative is to be passed over, says its standard."""
    path = Path(environ.get(key, ""))
    return path if path.is_absolute() else default
