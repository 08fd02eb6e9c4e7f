"""Makes a random model of a real shape, to measure with: a Hugging Face directory; nothing is downloaded.

    python scripts/random_model.py Llama-3.2-1B|Qwen3-0.6B|Llama-3.1-8B DIRECTORY [--dtype bf16] [--blocks N]
                                   [--context N]

The 1B model takes 2.5 GB in bf16, that of 8B 16 GB; memory needed is a few hundred MB.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from bench_kit.random_model import REAL_SHAPES, make_real_shape


def _show(name: str) -> None:
    print(f"\r\x1b[K{name}\r", end="", file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("shape", choices=list(REAL_SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=["f32", "bf16", "f16"], default="bf16")
    parser.add_argument("--blocks", type=int, help="only so many of its blocks")
    parser.add_argument("--context", type=int, default=8192, help="the context that config.json states")
    options = parser.parse_args()
    if (options.directory / "config.json").exists():
        parser.error(f"{options.directory} holds a model already; name a new directory")
    began = time.monotonic()
    make_real_shape(
        options.directory,
        options.shape,
        options.dtype,
        options.blocks,
        options.context,
        progress=_show if sys.stderr.isatty() else lambda name: None,
    )
    size = sum(path.stat().st_size for path in options.directory.iterdir())
    seconds = time.monotonic() - began
    print(f"{options.directory}: {size / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
