"""Where the control socket is: one search order, for the daemon that creates it and for its clients.

Order: `--socket`, `$DGN_SOCKET`, `$XDG_RUNTIME_DIR/dgn/dgnd.sock`, `/run/dgn/dgnd.sock`. The first two are
orders, not hints: where one is given, no other place is tried. Knows nothing of what is spoken there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dgnd.errors import ConfigError, NoDaemon

SYSTEM_SOCKET: Final = Path("/run/dgn/dgnd.sock")


def candidates(
    explicit: Path | None, environ: Mapping[str, str], system: Path = SYSTEM_SOCKET
) -> tuple[Path, ...]:
    """The places to look at, in order; a single one where the user named it."""
    if explicit is not None:
        return (explicit,)
    if environ.get("DGN_SOCKET"):
        return (Path(environ["DGN_SOCKET"]),)
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return (Path(runtime) / "dgn" / "dgnd.sock", system)
    return (system,)


def client_socket(
    explicit: Path | None, environ: Mapping[str, str] | None = None, system: Path = SYSTEM_SOCKET
) -> Path:
    """The first place that has a socket, or that this user may not look at (connecting then says so).

    Raises:
        NoDaemon: naming the places searched.
    """
    places = candidates(explicit, os.environ if environ is None else environ, system)
    for place in places:
        try:
            os.stat(place)  # noqa: PTH116 - Path.exists hides a permission error on some versions
        except PermissionError:
            return place
        except OSError:
            continue
        return place
    searched = ", ".join(str(place) for place in places)
    raise NoDaemon(f"no dgnd is running: no socket at {searched}; start it with 'dgnd --config FILE'")


def daemon_socket(
    explicit: Path | None, environ: Mapping[str, str] | None = None, system: Path = SYSTEM_SOCKET
) -> Path:
    """The first place where this user can create a socket; its directory exists afterwards.

    Raises:
        ConfigError: naming the places tried and why each can't be used.
    """
    reasons = []
    for place in candidates(explicit, os.environ if environ is None else environ, system):
        try:
            place.parent.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            reasons.append(f"{place.parent}: {error.strerror}")
            continue
        if os.access(place.parent, os.W_OK | os.X_OK):
            return place
        reasons.append(f"{place.parent}: not writable")
    tried = "; ".join(reasons)
    raise ConfigError(f"no place for the control socket ({tried}); name one with --socket or $DGN_SOCKET")
