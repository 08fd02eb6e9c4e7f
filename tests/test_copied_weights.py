"""Weights that are copied into a process's own memory, and what a backend says of them before it loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import make_tiny_llama

from dgn_backends.api import CountsWeights, LoadRequest, Step
from dgn_backends.hf_config import read_config
from dgn_backends.registry import load_backend
from dgn_backends.tensor import Tensor
from dgn_backends.weights import whole_model


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", "f32"), ("torch", "f32"), ("torch", "bf16"), ("onnx", "f32")]
)
def test_copied_weights_compute_as_mapped_ones_do(tmp_path: Path, backend: str, dtype: str) -> None:
    path = make_tiny_llama(tmp_path / "model", dtype=dtype, n_blocks=2)
    config = read_config(path)
    last = LoadRequest(path, config, whole_model(config), "cpu", dtype, threads=1)
    found = []
    for map_weights in (True, False):
        request = replace(last, map_weights=map_weights)
        loader = load_backend(backend)
        runner = loader.load(request, lambda done, total: None)
        runner.open(0, request.span, 8)
        ids = Tensor.from_numpy(np.arange(5, dtype="<i4"), "i32")
        (out,) = runner.forward([Step(0, 0, ids, (4,))])
        assert out.logits is not None
        found.append((out.logits.to_f32(), runner.weights_bytes))
        assert isinstance(loader, CountsWeights)
        assert abs(loader.loaded_bytes(request) - runner.weights_bytes) < 10_000  # norms are f32, always
    assert (found[0][0] == found[1][0]).all()
    assert found[0][1] == found[1][1]
