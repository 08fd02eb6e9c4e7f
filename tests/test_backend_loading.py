"""What every built-in backend that computes in products of its own does while it loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_cases import llama_case
from tiny_llama import TinyLlama, make_tiny_llama

from dgn_backends.api import Backend, LoadRequest, Step
from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.onnx_backend import OnnxBackend
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgn_backends.torch_backend import TorchBackend
from dgn_backends.weights import whole_model

pytestmark = pytest.mark.parametrize("backend", [OnnxBackend(), TorchBackend()], ids=lambda it: it.name)


def test_a_span_needs_only_its_shards(backend: Backend, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model", TinyLlama(tokenizer=False, shards=4))
    (path / "model-00001-of-00004.safetensors").unlink()
    config = read_config(path)
    last = LoadRequest(path, config, Span(3, 4, head=True), "cpu", "f32", threads=2)
    runner = backend.load(last, lambda done, total: None)
    runner.open(1, runner.span, 4)
    hidden = Tensor.from_f32(np.ones((4, 32), np.float32), "f32")
    (output,) = runner.forward([Step(1, 0, hidden, (3,))])
    assert output.logits is not None
    assert output.logits.shape == (1, 261)
    whole = LoadRequest(path, config, whole_model(config), "cpu", "f32", threads=2)
    with pytest.raises(ModelError, match=r"model-00001-of-00004\.safetensors"):
        backend.load(whole, lambda done, total: None)


def test_progress_ends_with_the_total(backend: Backend) -> None:
    calls: list[tuple[int, int]] = []
    request = llama_case("bf16-weights").load_request()
    backend.load(request, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] > 0
