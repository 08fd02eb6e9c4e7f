"""How many bytes of weights a decode step must read, from a model's shapes and how they are stored.

Counted from the format, not from what a backend holds: a backend that keeps two copies reads only one. Knows
nothing of time.
"""

from __future__ import annotations

import math

from dgn_backends.model import ModelConfig
from dgn_backends.quant import SCHEMES
from dgn_backends.weights import EMBEDDING, span_tensors, whole_model

_ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def parameters(config: ModelConfig) -> int:
    """Weights of the whole model; a head tied to the embedding counts once."""
    return sum(math.prod(shape) for shape in span_tensors(config, whole_model(config)).values())


def read_bytes(config: ModelConfig, quant: str, dtype: str) -> int:
    """Bytes that one decode step reads: all linear layers and the head, and one row of the embedding, which
    is left out."""
    scheme = SCHEMES.get(quant)  # type: ignore[call-overload]  # "none" has none
    total = 0
    for name, shape in span_tensors(config, whole_model(config)).items():
        if name == EMBEDDING and not config.tied_head:
            continue
        if scheme is not None and len(shape) == 2:
            total += scheme.n_bytes(*shape)
        else:
            total += math.prod(shape) * _ITEM_BYTES[dtype]
    return total
