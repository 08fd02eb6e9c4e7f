"""The torch backend: against transformers in every dtype, bit by bit against itself in f32, and against
wrong use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from llama_cases import CASES, CHUNKS, F32_BOUND, llama_case, run_chunked

pytest.importorskip("torch", reason="torch is not installed")


from dgn_backends.api import LoadRequest, SpanRunner
from dgn_backends.hf_config import read_config
from dgn_backends.span import Span
from dgn_backends.torch_backend import TorchBackend
from dgn_backends.weights import whole_model

#: Largest difference of any logit from transformers' f32, as a share of the logits' standard deviation.
LOW_PRECISION_BOUNDS = {"bf16": 0.35, "f16": 0.05}


def load(path: Path, dtype: str = "f32", device: str = "cpu", span: Span | None = None) -> SpanRunner:
    config = read_config(path)
    request = LoadRequest(path, config, span or whole_model(config), device, dtype)
    return TorchBackend().load(request, lambda done, total: None)


@pytest.mark.parametrize("name", CASES)
def test_f32_logits_are_those_of_transformers(name: str) -> None:
    case = llama_case(name)
    runner = load(case.path)
    first: npt.NDArray[np.float32] | None = None
    for chunk in CHUNKS:
        logits = run_chunked(runner, case.ids, chunk)
        assert np.abs(logits - case.logits).max() < F32_BOUND, f"chunks of {chunk}"
        first = logits if first is None else first
        if runner.row_invariant:
            assert np.array_equal(logits, first), f"chunks of {chunk} change bits"
    assert runner.kv_bytes() == 0


@pytest.mark.parametrize("dtype", LOW_PRECISION_BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_low_precision_logits_are_near(name: str, dtype: str) -> None:
    case = llama_case(name)
    runner = load(case.path, dtype)
    for chunk in (5, 300):
        logits = run_chunked(runner, case.ids, chunk)
        assert np.isfinite(logits).all()
        worst = np.abs(logits - case.logits).max() / case.logits.std()
        assert worst < LOW_PRECISION_BOUNDS[dtype], f"chunks of {chunk}"
