"""Distributions of plugins as a test writes them: metadata with entry points, and modules beside it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Site:
    """A folder on sys.path where distributions with entry points can be put."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.path = path

    def add(
        self,
        distribution: str,
        entries: dict[str, str],
        modules: dict[str, str],
        extras: tuple[str, ...] = (),
    ) -> None:
        """A distribution of version 1.5; entries are "name" to "module:class", modules name to source."""
        info = self.path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        lines = [f"Provides-Extra: {extra}" for extra in extras]
        header = ["Metadata-Version: 2.1", f"Name: {distribution}", "Version: 1.5", *lines]
        (info / "METADATA").write_text("\n".join(header) + "\n")
        points = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[dgn.backends]", *points, ""]))
        for name, source in modules.items():
            (self.path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to have these distributions installed."""
        path = [str(self.path), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(path).rstrip(os.pathsep)}
