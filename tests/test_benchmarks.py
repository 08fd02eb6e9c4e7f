"""The benchmarks run, and print what they promise. Nothing here asserts a speed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CONDITIONS = {"cpu", "load", "python", "libraries", "threads", "commit", "when"}


def _run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    else:
        yield value


def _figures(script: str, *options: str) -> Any:
    report = json.loads(_run(script, "--json", *options))
    assert report["conditions"].keys() >= CONDITIONS
    numbers = list(_numbers(report["figures"]))
    assert numbers
    assert all(math.isfinite(number) for number in numbers)
    return report["figures"]


def test_startup() -> None:
    figures = _figures("startup.py")
    assert figures["dgnd_ready_s"] > figures["dgnd_ready_cpu_s"] * 0.5 > 0  # two cores at most are at work
    assert 0 < figures["dgnd_private_mb"] <= figures["dgnd_pss_mb"] <= figures["dgnd_rss_mb"]


def test_startup_prints_a_table_with_the_goals() -> None:
    lines = _run("startup.py").splitlines()
    assert any("dgnctl --help" in line for line in lines)
    assert any("to ready" in line and line.rstrip(" |").endswith("1500 ms") for line in lines)


def test_line() -> None:
    figures = _figures("line.py")
    assert list(figures) == ["worker alone", "through dgnctl", "split over two"]
    for way in figures.values():
        assert way["prefill_tok_s"] > 0
        assert way["decode_tok_s"] > 0
    assert figures["worker alone"]["decode_ratio"] == 1


def test_hop_cost() -> None:
    figures = _figures("hop_cost.py")
    assert list(figures) == ["0", "1"]
    assert figures["1"]["added_p50_ms"] == pytest.approx(figures["1"]["p50_ms"] - figures["0"]["p50_ms"])
    assert all(way["tokens"] >= 4 for way in figures.values())


def test_the_page_about_performance_names_every_benchmark() -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    scripts = sorted(path.name for path in BENCHMARKS.glob("*.py"))
    assert scripts == ["hop_cost.py", "line.py", "startup.py"]
    assert [script for script in scripts if f"benchmarks/{script}" not in page] == []
