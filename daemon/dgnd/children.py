"""How dgnd starts processes of its own Python. Knows nothing of what they do."""

from __future__ import annotations

import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """The command `python -m module arguments…`. It takes no module from the current directory (`-P`), where
    anybody's file json.py may lie."""
    return [sys.executable, "-P", "-m", module, *arguments]
