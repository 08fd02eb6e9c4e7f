"""Rotary angles against transformers' own functions."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from llama_cases import CASES, POSITIONS
from tiny_llama import make_tiny_llama

from dgn_backends.hf_config import read_config
from dgn_backends.rope import angles, cos_sin, rotate

ROPE_CASES = [name for name, tiny in CASES.items() if tiny.rope is not None]
# 1, within the window, at its end, one beyond, far beyond.
LENGTHS = (1, 63, 64, 65, 128, 129, POSITIONS, 512)


def theirs(path: Path, length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies and scaling as transformers has them after a one-shot prefill of `length`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        transformers.logging.set_verbosity_error()
        rotary = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(path))
        rotary(torch.zeros(1), torch.arange(length)[None])
        return rotary.inv_freq.numpy(), rotary.attention_scaling


@pytest.mark.parametrize("name", [*ROPE_CASES, "plain", "wide-head-dim"])
def test_angles_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, CASES[name])
    config = read_config(path)
    for length in LENGTHS:
        inv_freq, scaling = angles(config.block.rope, config.block.head_dim, length)
        expected, expected_scaling = theirs(path, length)
        assert inv_freq.dtype == np.float32
        np.testing.assert_allclose(inv_freq, expected, rtol=1e-6, atol=0)
        assert scaling == pytest.approx(expected_scaling, rel=1e-7)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["llama3", "yarn", "dynamic"])
def test_angles_of_real_sizes(kind: str, head_dim: int, tmp_path: Path) -> None:
    """With the values that published models use, where more dimensions fall between the borders."""
    rope: dict[str, object] = {"rope_type": kind, "factor": 32.0}
    if kind != "dynamic":
        rope["original_max_position_embeddings"] = 8192
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    path = make_tiny_llama(tmp_path, rope=rope, theta=500000.0, max_positions=131072, head_dim=head_dim)
    config = read_config(path)
    for length in (8192, 131073, 140000):
        inv_freq, scaling = angles(config.block.rope, head_dim, length)
        expected, expected_scaling = theirs(path, length)
        np.testing.assert_allclose(inv_freq, expected, rtol=2e-6, atol=0)
        assert scaling == pytest.approx(expected_scaling, rel=1e-7)


def test_dynamic_alone_depends_on_the_length(tmp_path: Path) -> None:
    for name in ROPE_CASES:
        config = read_config(make_tiny_llama(tmp_path / name, CASES[name]))
        short, _ = angles(config.block.rope, config.block.head_dim, 1)
        long, _ = angles(config.block.rope, config.block.head_dim, POSITIONS)
        assert (short == long).all() == (not config.block.rope.depends_on_length)
        assert config.block.rope.depends_on_length == name.startswith("dynamic")


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 8)).astype(np.float32)
    inv_freq = (1.0 / 100.0 ** (np.arange(4) / 4)).astype(np.float32)

    def at(x: np.ndarray, position: int) -> np.ndarray:
        return rotate(x, *cos_sin(inv_freq, 1.0, np.array([position])))

    assert np.linalg.norm(at(q, 17)) == pytest.approx(np.linalg.norm(q), rel=1e-6)
    near, far = (at(q, 5) * at(k, 2)).sum(), (at(q, 105) * at(k, 102)).sum()
    assert near == pytest.approx(far, rel=1e-4)
    assert (at(q, 0) == q).all()
    assert (at(q, 1) != q).all()
