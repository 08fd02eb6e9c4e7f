"""What the benchmarks share: conditions, tables, models to measure with, a worker driven directly."""

from __future__ import annotations

import sys
from pathlib import Path

#: The tests know how to start real daemons; the benchmarks use the same.
_TESTS = Path(__file__).resolve().parents[2] / "tests"
if str(_TESTS) not in sys.path:
    sys.path.append(str(_TESTS))
