"""Models that come with the software, found by name. Knows nothing of their content."""

from __future__ import annotations

from pathlib import Path

MODELS_DIR = Path(__file__).parent / "models"


def bundled_model(name: str) -> Path | None:
    """The directory of the bundled model `name`, such as "dgn-demo", or None where there is none."""
    directory = MODELS_DIR / name
    # The name is a plain one: never a way out of the folder.
    if name != directory.name or name.startswith(".") or not (directory / "config.json").is_file():
        return None
    return directory
