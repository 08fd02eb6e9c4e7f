"""Writes docs/openapi.json, which a test compares with what dgnd publishes."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from dgnd.http.openapi import document


def main() -> None:
    """Writes the file."""
    made = document(importlib.metadata.version("distributed-gpt-node"))
    path = Path(__file__).resolve().parent.parent / "docs" / "openapi.json"
    path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
