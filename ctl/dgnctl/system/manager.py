"""What systemd is asked to do, and what it says of the units. Knows nothing of their text."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgnd.errors import BadRequest

_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Manager:
    """The service manager of the machine, or of the user who runs this."""

    user: bool

    @property
    def runs(self) -> bool:
        """Whether there is one to be asked: not in a container without systemd, say."""
        if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
            return False
        return not self.user or self._run(self.systemctl("show", "--property=Version")).returncode == 0

    def systemctl(self, *words: str) -> list[str]:
        """The command."""
        return ["systemctl", *(["--user"] if self.user else []), *words]

    def do(self, command: Sequence[str]) -> None:
        """Runs a command. Raises BadRequest with what it said."""
        try:
            done = self._run(command)
        except FileNotFoundError:
            raise BadRequest(
                f"{command[0]} is not installed: without systemd start 'dgnd --config FILE' in another way"
            ) from None
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            more = "'systemctl status dgnd' and 'journalctl -u dgnd' say more"
            raise BadRequest(f"{' '.join(command)}: {said}; {more}")

    def properties(self, unit: str, names: Sequence[str]) -> dict[str, str]:
        """Of a unit; empty where nobody can be asked."""
        if not self.runs:
            return {}
        done = self._run(self.systemctl("show", f"--property={','.join(names)}", unit))
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
