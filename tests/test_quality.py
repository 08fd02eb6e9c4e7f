"""What quantisation may cost: perplexity by the real kernels, and weights no further off than in llama.cpp's
formats of the same size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster import trained_model

from dgn_backends.bundled import bundled_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_kit.held_out import STORIES, Window, demo_windows, text_windows
from bench_kit.llamacpp_formats import F32, FORMATS
from bench_kit.perplexity import perplexity, write_as
from bench_kit.weight_error import COUNTERPARTS, errors, model_matrices, random_matrices


def demo() -> Path:
    found = bundled_model("dgn-demo")
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["dgn-demo", "babyllama-105", "llama2xs"])
def test_int8_costs_next_to_no_perplexity(name: str) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = demo() if name == "dgn-demo" else trained_model(name)
    if model is None:
        pytest.skip(f"the trained model {name} is not on this machine")
    windows = demo_windows(model)[:24] if name == "dgn-demo" else text_windows(model, STORIES, 256)[:4]
    assert sum(len(window.ids) - window.first for window in windows) > 300
    plain = perplexity(model, windows, "reference")
    assert plain < 12  # it knows what it reads: a ratio of guesses would say nothing
    assert perplexity(model, windows, "onnx", "int8") <= 1.01 * plain


def test_perplexity_sees_what_is_lost(tmp_path: Path) -> None:
    """Wrong answers surprise the model, and a format written to files loses what it loses in memory."""
    windows = demo_windows(demo())[:6]
    wrong = [Window((*window.ids[:-8], *[70] * 8), len(window.ids) - 8) for window in windows]
    assert perplexity(demo(), wrong, "reference") > 100 * perplexity(demo(), windows, "reference")
    copy = write_as(demo(), "q8_0", tmp_path / "q8_0")
    assert perplexity(copy, windows, "reference") == pytest.approx(
        perplexity(demo(), windows, "reference", "int8"), rel=0.01
    )


WEIGHTS: dict[str, Callable[[], Iterator[tuple[str, F32]]]] = {
    "dgn-demo": lambda: model_matrices(demo()),
    "normal": lambda: random_matrices("Llama-3.2-1B", "normal", rows=96),
    "heavy-tailed": lambda: random_matrices("Llama-3.2-1B", "heavy", rows=96),
    "another shape": lambda: random_matrices("Qwen3-0.6B", "heavy", rows=96, seed=1),
}


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_weights_are_no_further_off_than_in_llama_cpp(weights: str) -> None:
    found = errors(WEIGHTS[weights]())
    for ours, theirs in COUNTERPARTS.items():
        assert len(found[ours]) == 9  # eight kinds of matrices, and all together
        assert found[ours]["all"] <= found[theirs]["all"], ours
        for kind, error in found[ours].items():
            assert error <= 1.03 * found[theirs][kind], (ours, kind)


def test_formats_of_llama_cpp_by_hand() -> None:
    steps = np.arange(-8, 24, dtype=np.float32)[
        None
    ]  # the largest is 23: a step of -23/8, cut off at 7 of them
    step = np.float32(np.float16(23 / -8))
    assert FORMATS["q4_0"](steps)[0, [0, 8, 31]].tolist() == [3 * step, 0, -8 * step]
    assert FORMATS["q4_0"](-steps)[0, 31] == pytest.approx(-23)
    halves = np.zeros((1, 40), np.float32)
    halves[0, :4] = [127, 0.5, -0.5, 1.4]  # a step of 1; halves away from 0
    halves[0, 39] = 2.0  # of a group that isn't full
    assert FORMATS["q8_0"](halves)[0, [0, 1, 2, 3, 4]].tolist() == [127, 1, -1, 1, 0]
    assert FORMATS["q8_0"](halves)[0, 39] == pytest.approx(2.0, rel=1e-3)
    assert not FORMATS["q4_0"](np.zeros((2, 32), np.float32)).any()


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_are_those_of_the_gguf_library(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf, of the extra bench")
    kind = gguf.GGMLQuantizationType[name.upper()]
    rng = np.random.default_rng(0)
    for weight in (
        rng.standard_normal((64, 256)),
        rng.standard_t(3, (64, 256)),
        rng.integers(-9, 9, (8, 64)) / 2,
    ):
        packed = gguf.quants.quantize(weight.astype(np.float32), kind)
        assert np.array_equal(gguf.quants.dequantize(packed, kind), FORMATS[name](weight.astype(np.float32)))
