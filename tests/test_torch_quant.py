"""Quantised weights in torch: each form of a matrix against the numbers that the weight stands for, and a
model whose shapes the kernels take against the reference backend."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from llama_cases import run_chunked
from tiny_llama import TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.api import Backend, LoadRequest, Quant, SpanRunner
from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.quant import Quantised, Scheme, dequantise, quantise
from dgn_backends.reference import ReferenceBackend
from dgn_backends.testing_kit import distance
from dgn_backends.weights import whole_model

torch = pytest.importorskip("torch", reason="torch is not installed")

from dgn_backends.torch_backend import TorchBackend  # noqa: E402 - after the skip
from dgn_backends.torch_dequant import DequantisedMatrix  # noqa: E402
from dgn_backends.torch_int4 import Int4Matrix, can_use_int4  # noqa: E402
from dgn_backends.torch_linear import Matrix  # noqa: E402

CPU = torch.device("cpu")
SCHEMES = [Scheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
QUANTS: list[Quant] = [quant for quant in get_args(Quant) if quant != "none"]


def random_weight(out: int, in_features: int, scheme: Scheme) -> Quantised:
    random = np.random.default_rng(out)
    weight = random.standard_normal((out, in_features)) + random.standard_normal((out, 1))  # zeros anywhere
    return quantise(weight.astype(np.float32), scheme)


def assert_is_near(matrix: Matrix, weight: Quantised, dtype: torch.dtype, bound: float) -> None:
    """Products of few and of many rows, with and without bias, against those with the numbers."""
    numbers = torch.from_numpy(dequantise(weight, matrix.in_features))
    random = torch.Generator().manual_seed(0)
    bias = torch.randn(matrix.out_features, generator=random).to(dtype)
    for rows in (1, 7, 24, 41, 70):
        x = torch.randn(rows, matrix.in_features, generator=random).to(dtype)
        wanted = x.float() @ numbers.T
        assert distance(matrix.product(x).float().numpy(), wanted.numpy()) < bound, rows
        got = matrix.product(x, bias).float()
        assert distance(got.numpy(), (wanted + bias.float()).numpy()) < bound, rows


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("shape", [(70, 200), (3000, 300)])  # in one tile, in several
def test_weights_are_turned_back_tile_by_tile(
    scheme: Scheme, dtype: torch.dtype, bound: float, shape: tuple[int, int]
) -> None:
    weight = random_weight(*shape, scheme)
    matrix = DequantisedMatrix(weight, shape[1], dtype, CPU)
    assert matrix.n_bytes <= 1.03 * weight.n_bytes
    assert_is_near(matrix, weight, dtype, bound)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_kernel_for_4_bits_computes_with_8_as_well(scheme: Scheme) -> None:
    weight = random_weight(192, 8448, scheme)  # more than a tile, both ways
    if not can_use_int4(weight, 8448, torch.bfloat16, CPU):
        pytest.skip("this CPU has no such kernel")
    matrix = Int4Matrix(weight, 8448)
    assert matrix.n_bytes <= 1.16 * weight.n_bytes
    assert_is_near(matrix, weight, torch.bfloat16, 0.01)


def test_what_the_kernel_does_not_take_is_turned_back() -> None:
    for shape in ((70, 256), (128, 200)):
        assert not can_use_int4(random_weight(*shape, SCHEMES[0]), shape[1], torch.bfloat16, CPU)
    fitting = random_weight(128, 256, SCHEMES[0])
    assert not can_use_int4(fitting, 256, torch.float32, CPU)
    assert not can_use_int4(fitting, 256, torch.bfloat16, torch.device("cuda:0"))


WIDE = TinyLlama(hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=320, tokenizer=False)


def load(backend: Backend, path: Path, dtype: str, quant: Quant) -> SpanRunner:
    config = read_config(path)
    request = LoadRequest(path, config, whole_model(config), "cpu", dtype, quant=quant)
    return backend.load(request, lambda done, total: None)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_model_of_shapes_that_the_kernels_take(tmp_path: Path, quant: Quant) -> None:
    path = make_tiny_llama(tmp_path / "model", WIDE)
    ids = np.random.default_rng(2).integers(0, 320, 90).astype(np.int32)
    wanted = run_chunked(load(ReferenceBackend(), path, "f32", quant), ids, 90)
    runner = load(TorchBackend(), path, "bf16", quant)
    assert quant in runner.numerics
    assert runner.weights_bytes < load(TorchBackend(), path, "bf16", "none").weights_bytes
    for chunk in (90, 3):
        assert distance(run_chunked(runner, ids, chunk), wanted) < 0.05, chunk


def test_quantised_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    tiny = TinyLlama(tokenizer=False)
    path = make_tiny_llama(tmp_path / "model", tiny)
    weights = random_weights(path, tiny)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e6
    write_weights(path, weights)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has values beyond f16"):
        load(TorchBackend(), path, "f16", "int8")
    load(TorchBackend(), path, "f32", "int8")
