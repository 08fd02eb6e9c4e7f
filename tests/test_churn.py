"""Half a minute of benchmarks/churn.py: answers survive, nothing grows. `make test-churn`: an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHURN = Path(__file__).resolve().parents[1] / "benchmarks" / "churn.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_churn() -> None:
    command = [sys.executable, str(CHURN), "--seconds", "30", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=560)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
