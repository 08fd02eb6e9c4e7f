"""How far quantised weights are from what they were, by kind of layer: ours and llama.cpp's formats alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bench_kit.llamacpp_formats import F32, FORMATS
from bench_kit.random_model import REAL_SHAPES
from dgn_backends.hf_config import read_config
from dgn_backends.quant import SCHEMES, dequantise, quantise
from dgn_backends.weights import ModelFiles, span_tensors, whole_model

#: Each scheme beside the format of llama.cpp that it stands in for.
COUNTERPARTS = {"int4": "q4_0", "int8": "q8_0"}
NAMES = (*SCHEMES, *FORMATS)
#: Degrees of freedom of the heavy-tailed weights: their kurtosis is 9, that of normal ones 3.
_TAILS = 5


def restored(name: str, weight: F32) -> F32:
    """`weight` [out, in] after it was stored as `name`, a scheme of ours or a format of llama.cpp."""
    for known, scheme in SCHEMES.items():
        if known == name:
            return dequantise(quantise(weight, scheme), weight.shape[1])
    return FORMATS[name](weight)


def model_matrices(model: Path) -> Iterator[tuple[str, F32]]:
    """Kind and values of every matrix of a model."""
    config, files = read_config(model), ModelFiles(model)
    for tensor, shape in span_tensors(config, whole_model(config)).items():
        if len(shape) == 2:
            yield kind_of(tensor), files.tensor(tensor, shape).to_f32()


def kind_of(tensor: str) -> str:
    """ "q_proj" of a tensor's whole name; the embedding is "embed_tokens"."""
    return tensor.split(".")[-2]


def random_matrices(shape: str, tails: str, rows: int, seed: int = 0) -> Iterator[tuple[str, F32]]:
    """One matrix of each kind of layer of a known model; `rows` rows of it say all, as rows don't know each
    other.

    `tails` "normal" or "heavy" (Student's t).
    """
    config = REAL_SHAPES[shape]

    def size(key: str) -> int:
        value = config[key]
        assert isinstance(value, int)
        return value

    hidden, inner, head = size("hidden_size"), size("intermediate_size"), size("head_dim")
    q, kv = size("num_attention_heads") * head, size("num_key_value_heads") * head
    shapes = {
        "embed_tokens": (size("vocab_size"), hidden),
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    rng = np.random.default_rng(seed)
    for kind, (out, width) in shapes.items():
        wanted = (min(out, rows), width)
        values = rng.standard_normal(wanted) if tails == "normal" else rng.standard_t(_TAILS, wanted)
        yield kind, (values / np.sqrt(width)).astype(np.float32)


def errors(matrices: Iterable[tuple[str, F32]], names: Iterable[str] = NAMES) -> dict[str, dict[str, float]]:
    """For each name, the relative RMS error of each kind of layer, and of "all" together."""
    apart: dict[str, Counter[str]] = {name: Counter() for name in names}
    whole: Counter[str] = Counter()
    for kind, weight in matrices:
        size = _energy(weight)
        whole.update({kind: size, "all": size})
        for name, sums in apart.items():
            error = _energy(restored(name, weight) - weight)
            sums.update({kind: error, "all": error})
    return {
        name: {kind: math.sqrt(sums[kind] / whole[kind]) for kind in whole} for name, sums in apart.items()
    }


def _energy(values: F32) -> float:
    return float(np.square(values, dtype=np.float64).sum())
