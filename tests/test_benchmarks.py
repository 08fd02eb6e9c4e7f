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

from dgn_backends.hf_config import read_config
from dgn_backends.quant_plan import SCHEMES
from dgn_backends.weights import ModelFiles, whole_model
from dgnd.bench.measure import start_worker
from dgnd.bench.plan import make_plan
from dgnd.control.bench import BenchRequest
from dgnd.text.tokenizer import Tokenizer

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


def test_http_first_byte() -> None:
    figures = _figures("http_first_byte.py")
    assert 0 < figures["socket_p50_ms"] <= figures["socket_p90_ms"]
    assert 0 < figures["http_p50_ms"] <= figures["http_p90_ms"]


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
    assert list(figures) == ["0", "1", "echo", "hop_over_echo"]
    assert figures["1"]["added_p50_ms"] == pytest.approx(figures["1"]["p50_ms"] - figures["0"]["p50_ms"])
    assert all(figures[way]["tokens"] >= 4 for way in ("0", "1", "echo"))
    ratio = figures["1"]["added_p50_ms"] / figures["echo"]["p50_ms"]
    assert figures["hop_over_echo"]["p50"] == pytest.approx(ratio)


def test_rolling() -> None:
    figures = _figures("rolling.py")
    assert figures["restarts"] == 3
    assert (figures["failed"], figures["wrong"]) == (0, 0)


def test_kills() -> None:
    figures = _figures("kills.py")
    assert [figures[f"struck_{kind}"] for kind in ("first", "middle", "head", "worker", "two")] == [1] * 5
    assert figures["lost_or_other"] == 0


def test_pipeline() -> None:
    figures = _figures("pipeline.py", "--rate", "1", "--delay", "5")
    assert figures["far"]["speedup"] > 1, "the hops wait for each other"


def test_quality(tmp_path: Path) -> None:
    figures = _figures("quality.py", "--models", str(tmp_path))  # dgn-demo alone
    assert list(figures["perplexity"]) == ["dgn-demo"]
    found = figures["perplexity"]["dgn-demo"]
    assert found["reference"].keys() == {*SCHEMES, "q4_0", "q8_0"}
    assert found["reference"]["int8"] == pytest.approx(1, rel=0.05)
    assert list(figures["weights"]) == ["dgn-demo", "Llama-3.2-1B, normal", "Llama-3.2-1B, heavy"]
    assert figures["weights"]["dgn-demo"]["int4"]["q_proj"] < 0.2


def test_a_random_model_of_a_real_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_kit import random_model

    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 400, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for name, shape in list(random_model.REAL_SHAPES.items()):
        monkeypatch.setitem(random_model.REAL_SHAPES, "small", {**shape, **small, **heads})
        directory = random_model.make_real_shape(tmp_path / name, "small", blocks=2)
        config = read_config(directory)
        ModelFiles(directory).check(config, whole_model(config))  # every tensor, and none too many
        assert (config.dtype, config.vocab_size, config.n_blocks) == ("bf16", 400, 2)
        plan = make_plan(BenchRequest(model=str(directory), backend="reference", prompt_tokens=20), tmp_path)
        with start_worker(plan) as worker:  # finite logits, or the worker says so
            assert worker.generate(plan.prompt(0), 3, 64).tokens == 3
        assert Tokenizer.load(directory / "tokenizer.json").id_to_token(300) == "<300>"


def test_the_comparison_with_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, the extra bench")
    figures = _figures(
        "compare_llamacpp.py", "--formats", "bf16", "--backends", "torch", "--work", str(tmp_path)
    )
    theirs, ours = figures["bf16"].values()
    assert theirs["decode_ratio"] == 1
    assert ours["decode_ratio"] > 0


def test_idle() -> None:
    figures = _figures("idle.py")
    assert figures["dgnd"]["wakes_s"] > 0  # a peer that rests is asked whether it lives
    assert figures["worker"]["bytes_after"] > 2**20


def test_the_page_about_performance_names_every_benchmark() -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    scripts = sorted(path.name for path in BENCHMARKS.glob("*.py"))
    assert scripts == [
        "churn.py",
        "compare_llamacpp.py",
        "hop_cost.py",
        "http_first_byte.py",
        "idle.py",
        "int8_rows.py",
        "kills.py",
        "line.py",
        "pipeline.py",
        "quality.py",
        "rolling.py",
        "startup.py",
        "telemetry.py",
        "wire_quality.py",
    ]
    assert [script for script in scripts if f"benchmarks/{script}" not in page] == []


def test_telemetry() -> None:
    figures = _figures("telemetry.py")
    assert figures["not shown"]["cpu_ratio"] == 1
    assert figures["shown"]["cpu_ms"] > 0
    assert 0 < figures["counting"]["share"] < 1


def test_wire_quality() -> None:
    figures = _figures("wire_quality.py")
    assert "dgn-demo" in figures["effects"]
    for found in figures["effects"].values():
        assert found["ids"] > 0
        assert all(0.97 < edge["ratio"] < 1.03 and edge["other"] < 0.1 for edge in found["edges"].values())
    assert all(0.5 < cost["over_bf16"] < 0.54 for cost in figures["costs"].values())
