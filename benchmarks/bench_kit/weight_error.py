"""How far quantised weights are from what they were, by kind of layer: ours and llama.cpp's formats alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench_kit.llamacpp_formats import F32, FORMATS
from bench_kit.random_model import REAL_SHAPES
from dgn_backends.hf_config import read_config
from dgn_backends.quant import dequantise, quantise
from dgn_backends.quant_plan import SCHEMES, scheme_of
from dgn_backends.weights import EMBEDDING, ModelFiles, block_prefix, span_tensors, whole_model

#: Each scheme beside the format of llama.cpp that it stands in for.
COUNTERPARTS = {"int4": "q4_0", "int8": "q8_0"}
NAMES = (*SCHEMES, *FORMATS)
#: Degrees of freedom of the heavy-tailed weights: their kurtosis is 9, that of normal ones 3.
_TAILS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """The matrix `tensor` of a model, f32 [out, in], that stands for `times` as much of it."""

    tensor: str
    values: F32
    times: float = 1.0

    def restored(self, name: str) -> F32:
        """The values after they were stored as `name`, a quantisation of ours or a format of llama.cpp."""
        scheme = scheme_of(name, self.tensor)
        if scheme is None:
            return FORMATS[name](self.values)
        return dequantise(quantise(self.values, scheme), self.values.shape[1])


def model_matrices(model: Path) -> Iterator[Matrix]:
    """Every matrix of a model."""
    config, files = read_config(model), ModelFiles(model)
    for tensor, shape in span_tensors(config, whole_model(config)).items():
        if len(shape) == 2:
            yield Matrix(tensor, files.tensor(tensor, shape).to_f32())


def kind_of(tensor: str) -> str:
    """ "q_proj" of a tensor's whole name; the embedding is "embed_tokens"."""
    return tensor.split(".")[-2]


def random_matrices(shape: str, tails: str, rows: int, seed: int = 0) -> Iterator[Matrix]:
    """One matrix of each kind of layer of a known model; `rows` rows of it stand for all of its blocks', as
    rows don't know each other.

    `tails` "normal" or "heavy" (Student's t).
    """
    config = REAL_SHAPES[shape]

    def size(key: str) -> int:
        value = config[key]
        assert isinstance(value, int)
        return value

    hidden, inner, head = size("hidden_size"), size("intermediate_size"), size("head_dim")
    q, kv = size("num_attention_heads") * head, size("num_key_value_heads") * head
    shapes: dict[str, tuple[int, int]] = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    rng = np.random.default_rng(seed)
    n_blocks = size("num_hidden_layers")
    whole = {f"{block_prefix(0)}{layer}.weight": (*shape, n_blocks) for layer, shape in shapes.items()}
    whole[EMBEDDING] = (size("vocab_size"), hidden, 1)
    for tensor, (out, width, times) in whole.items():
        wanted = (min(out, rows), width)
        values = rng.standard_normal(wanted) if tails == "normal" else rng.standard_t(_TAILS, wanted)
        yield Matrix(tensor, (values / np.sqrt(width)).astype(np.float32), times * out / wanted[0])


def errors(matrices: Iterable[Matrix], names: Iterable[str] = NAMES) -> dict[str, dict[str, float]]:
    """For each name, the relative RMS error of each kind of layer, and of "all" together."""
    apart: dict[str, Counter[str]] = {name: Counter() for name in names}
    whole: Counter[str] = Counter()
    for matrix in matrices:
        kind = kind_of(matrix.tensor)
        size = matrix.times * _energy(matrix.values)
        whole.update({kind: size, "all": size})
        for name, sums in apart.items():
            error = matrix.times * _energy(matrix.restored(name) - matrix.values)
            sums.update({kind: error, "all": error})
    return {
        name: {kind: math.sqrt(sums[kind] / whole[kind]) for kind in whole} for name, sums in apart.items()
    }


def _energy(values: F32) -> float:
    return float(np.square(values, dtype=np.float64).sum())
