"""The commented configuration that `dgnd init` writes: `dgn.toml.example` with this node's own places.

Knows nothing of what the keys mean.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dgnd.errors import ConfigError

NAME = "dgn.toml.example"
SYSTEM_STATE_DIR = Path("/var/lib/dgn")


def example_text() -> str:
    """The example: installed beside this module, or in a checkout. Raises ConfigError."""
    here = Path(__file__).resolve()
    for folder in (here.parent, here.parents[3]):
        if (folder / NAME).is_file():
            return (folder / NAME).read_text(encoding="utf-8")
    raise ConfigError(f"{here.parent / NAME}: it is missing from this installation; install dgn again")


def configuration_for(state_dir: Path, peer_id: str) -> str:
    """The example for a node that keeps its state in `state_dir`."""
    quoted = '"' + str(state_dir).replace("\\", "\\\\").replace('"', '\\"') + '"'
    text = re.sub(
        r'^state_dir = ".*?"', lambda _: f"state_dir = {quoted}", example_text(), count=1, flags=re.M
    )
    if state_dir != SYSTEM_STATE_DIR:  # of a node without root; what stands there then is for a service
        text = re.sub(r"^socket = ", "# socket = ", text, count=1, flags=re.M)
    return f"# The peer id of this node: {peer_id}\n\n{text}"


def write_configuration(path: Path, text: str) -> bool:
    """Writes a file that is not there yet; whether it was not. Raises ConfigError."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(f"{path}: can't be written: {error.strerror or error}") from None
    return True
