"""How many bytes of weights a decode step must read, from a model's shapes and how they are stored.

Counted from the format, not from what a backend holds: a backend that keeps two copies reads only one. Knows
nothing of time.
"""

from __future__ import annotations

import math

from dgn_backends.model import ModelConfig
from dgn_backends.quant_plan import stored_bytes
from dgn_backends.tensor import DType
from dgn_backends.weights import EMBEDDING, span_tensors, whole_model


def parameters(config: ModelConfig) -> int:
    """Weights of the whole model; a head tied to the embedding counts once."""
    return sum(math.prod(shape) for shape in span_tensors(config, whole_model(config)).values())


def read_bytes(config: ModelConfig, quant: str, dtype: DType) -> int:
    """Bytes that one decode step reads: all linear layers and the head, and one row of the embedding, which
    is left out."""
    return sum(
        stored_bytes(quant, name, shape, dtype)
        for name, shape in span_tensors(config, whole_model(config)).items()
        if name != EMBEDDING or config.tied_head
    )
