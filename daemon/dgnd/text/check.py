"""`python -m dgnd.text.check DIRECTORY TEMPLATE`: whether a model's tokenizer and templates can be used.

A process of its own, so that neither the seconds nor the memory that a large vocabulary takes are the
daemon's. Says on stderr why not, and exits with 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dgnd.errors import DgnError, one_line
from dgnd.text.assets import TextAssets


def main(argv: list[str]) -> int:
    """The exit code for `argv`: a directory and the name of a template, or "auto"."""
    os.nice(10)
    try:
        TextAssets.load(Path(argv[0]), argv[1])
    except DgnError as error:
        print(one_line(error.message), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
