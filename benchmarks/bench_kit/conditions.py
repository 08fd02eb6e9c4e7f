"""On what a figure was measured: machine, versions, load. A figure without these says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

_LIBRARIES = ("numpy", "torch", "onnxruntime", "llama-cpp-python", "libp2p", "trio", "msgspec")


def conditions() -> dict[str, str]:
    """The conditions now, as words."""
    one, five, _ = os.getloadavg()
    return {
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores usable",
        "load": f"{one:.1f} over 1 min, {five:.1f} over 5 min, when it began",
        "python": platform.python_version(),
        "libraries": ", ".join(f"{name} {version}" for name in _LIBRARIES if (version := _version(name))),
        "threads": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "commit": _commit(),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
