"""Loading weights for the reference backend. Knows nothing of sequences or of how blocks are computed.

Quantised weights are turned back into f32: what the others compute with fewer bits has to be near what this
backend computes with the very same weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.model import ModelConfig
from dgn_backends.quant import dequantise
from dgn_backends.quant_cache import QuantisedFiles
from dgn_backends.reference_math import BlockWeights, Linear, Norm
from dgn_backends.tensor import tensor_bytes
from dgn_backends.weights import ModelFiles, block_prefix, span_tensors

F32 = npt.NDArray[np.float32]


def read_weights(request: LoadRequest, progress: Progress) -> dict[str, F32]:
    """Every tensor that the request's span needs, by name, f32: in place in the mapped file where it is f32
    there, and as what it is after quantisation where that was asked for."""
    files = ModelFiles(request.path, copies=not request.map_weights and request.quant == "none")
    files.check(request.config, request.span)
    shapes = span_tensors(request.config, request.span)
    total = sum(tensor_bytes("f32", shape) for shape in shapes.values())
    quantised = None
    if request.quant != "none":
        quantised = QuantisedFiles(files, shapes, request.quant, request.cache_dir, threads=request.threads)
    weights: dict[str, F32] = {}
    done = 0
    progress(done, total)
    for name, shape in shapes.items():
        if quantised is not None and len(shape) == 2:
            array = dequantise(quantised.get(name), shape[1])
        else:
            array = files.tensor(name, shape).to_f32()
        weights[name] = array if array.flags.aligned else array.copy()
        done += array.nbytes
        progress(done, total)
    return weights


def block_weights(config: ModelConfig, block: int, weights: Mapping[str, F32]) -> BlockWeights:
    """The weights of `block` out of all that were read."""
    prefix, eps = block_prefix(block), config.block.norm_eps

    def linear(name: str) -> Linear:
        return Linear(weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

    def head_norm(name: str) -> Norm | None:
        weight = weights.get(f"{prefix}self_attn.{name}.weight")
        return None if weight is None else Norm(weight, eps)

    return BlockWeights(
        spec=config.blocks[block],
        input_norm=Norm(weights[prefix + "input_layernorm.weight"], eps),
        q=linear("self_attn.q_proj"),
        k=linear("self_attn.k_proj"),
        v=linear("self_attn.v_proj"),
        o=linear("self_attn.o_proj"),
        post_norm=Norm(weights[prefix + "post_attention_layernorm.weight"], eps),
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
    )
