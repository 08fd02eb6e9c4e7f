"""Reading a span's weights for ONNX Runtime: memory-mapped tensors, fused, as NumPy arrays.

Knows nothing of graphs, sequences or of running.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.onnx_block import BlockWeights
from dgn_backends.onnx_linear import LinearWeights, PlainLinear
from dgn_backends.tensor import Tensor, tensor_bytes
from dgn_backends.weights import EMBEDDING, FINAL_NORM, ModelFiles, block_prefix, head_tensor, span_tensors

F32 = npt.NDArray[np.float32]


class SpanFiles:
    """The tensors of a request's span. Making it checks that all are there, and raises ModelError, naming
    file and tensor, otherwise."""

    def __init__(self, request: LoadRequest, progress: Progress) -> None:
        self._request = request
        self._files = ModelFiles(request.path)
        self._files.check(request.config, request.span)
        self._shapes = span_tensors(request.config, request.span)
        self._seen: set[str] = set()
        self._done = 0
        self._progress = progress
        self._total = sum(tensor_bytes(request.config.dtype, shape) for shape in self._shapes.values())
        progress(0, self._total)

    def finish(self) -> None:
        """Reports that everything is loaded."""
        self._done = self._total
        self._progress(self._total, self._total)

    def block(self, number: int) -> BlockWeights:
        """The weights of block `number`."""
        spec = self._request.config.blocks[number]
        prefix = block_prefix(number)

        def layer(part: str, names: Sequence[str], has_bias: bool) -> LinearWeights:
            stems = [f"{prefix}{part}.{name}_proj." for name in names]
            return self._linear(
                [stem + "weight" for stem in stems], [stem + "bias" for stem in stems] if has_bias else []
            )

        return BlockWeights(
            input_norm=self._f32(prefix + "input_layernorm.weight"),
            qkv=layer("self_attn", ("q", "k", "v"), spec.qkv_bias),
            q_norm=self._f32(prefix + "self_attn.q_norm.weight") if spec.qk_norm else None,
            k_norm=self._f32(prefix + "self_attn.k_norm.weight") if spec.qk_norm else None,
            out=layer("self_attn", ("o",), spec.o_bias),
            post_norm=self._f32(prefix + "post_attention_layernorm.weight"),
            gate_up=layer("mlp", ("gate", "up"), spec.mlp_bias),
            down=layer("mlp", ("down",), spec.mlp_bias),
        )

    def final_norm(self) -> F32:
        """The norm before the head, f32 [hidden_size]."""
        return self._f32(FINAL_NORM)

    def head(self) -> LinearWeights:
        """The LM head."""
        return self._linear([head_tensor(self._request.config)], [])

    def embedding(self) -> Tensor:
        """The embedding [vocab_size, hidden_size] as it lies in the mapped file."""
        return self._raw(EMBEDDING)

    def _linear(self, weights: Sequence[str], biases: Sequence[str]) -> LinearWeights:
        bias = np.concatenate([self._f32(name) for name in biases]) if biases else None
        parts = [self._f32(name) for name in weights]
        return PlainLinear(parts[0] if len(parts) == 1 else np.concatenate(parts), bias)

    def _f32(self, name: str) -> F32:
        """A tensor in f32: the mapped file itself where it is f32 and aligned."""
        array = self._raw(name).to_f32()
        return array if array.flags.aligned else array.copy()

    def _raw(self, name: str) -> Tensor:
        tensor = self._files.tensor(name, self._shapes[name])
        if name not in self._seen:
            self._seen.add(name)
            self._done = min(self._done + len(tensor.data), self._total)
            self._progress(self._done, self._total)
        return tensor
