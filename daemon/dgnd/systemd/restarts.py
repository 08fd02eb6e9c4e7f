"""How often in a row the daemon has ended badly, and how long it waits before it begins again.

systemd of Debian 12 can't let the delay between restarts grow, so the daemon does: it counts its starts in
a file that a good end, or having run well for a while, removes. Knows nothing of why it ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STEADY_S: Final = 60.0  #: one that served for so long has begun well
LONGEST_S: Final = 60.0
_FILE: Final = "starts"


@dataclass(frozen=True, slots=True)
class Restarts:
    """`path`: where the number is kept; None where nobody starts the daemon again."""

    path: Path | None

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Restarts:
        """In the runtime directory that systemd made for the unit, which a reboot empties."""
        directory = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        managed = directory.startswith("/") and environ.get("NOTIFY_SOCKET")
        return cls(Path(directory) / _FILE if managed else None)

    def begin(self) -> tuple[int, float]:
        """Counts this start; how many before it ended badly, one after the other, and how long to wait."""
        if self.path is None:
            return 0, 0.0
        failed = 0
        with contextlib.suppress(OSError, ValueError):
            failed = min(max(int(self.path.read_text()), 0), 1000)
        with contextlib.suppress(OSError):  # no delay then
            self.path.write_text(f"{failed + 1}\n")
        return failed, delay_s(failed)

    def good(self) -> None:
        """This start was a good one."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def delay_s(failed: int) -> float:
    """After so many bad ends in a row: none after the first, which may happen to anybody."""
    return 0.0 if failed < 2 else min(2.0 ** min(failed - 1, 60), LONGEST_S)
