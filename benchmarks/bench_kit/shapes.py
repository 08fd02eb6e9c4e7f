"""Models to measure with: the shapes of known models with random weights. Speed doesn't depend on the values.

The vocabulary is that of the tests' byte tokenizer, so that blocks are measured and not the head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tiny_llama import TinyLlama, make_tiny_llama

from dgn_backends.tensor import DType


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's dimensions, and how many of its blocks are worth measuring."""

    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_blocks: int
    theta: float = 10000.0


SHAPES = {
    "tiny": Shape(64, 160, 4, 2, 16, 4),
    "demo": Shape(128, 384, 4, 2, 32, 8),
    #: 8 KB of hidden states a position in f32, and next to no compute: what a hop costs.
    "wide": Shape(2048, 64, 4, 2, 16, 4),
    #: 4 of its 16 blocks.
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 64, 4, 500000.0),
}


def make_model(directory: Path, shape: Shape, dtype: DType, blocks: int | None, context: int) -> Path:
    """Writes a random model of this shape to `directory`; no token ends an answer."""
    chosen = shape if blocks is None else replace(shape, n_blocks=blocks)
    fields = {name: getattr(chosen, name) for name in Shape.__slots__}
    # eos ids are left out: a random model would stop anywhere.
    tiny = TinyLlama(
        **fields, dtype=dtype, max_positions=context, eos=None, tied=True, extra={"eos_token_id": None}
    )
    return make_tiny_llama(directory, tiny)
