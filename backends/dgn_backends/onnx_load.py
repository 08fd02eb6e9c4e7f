"""Reading a span's weights for ONNX Runtime: mapped tensors as NumPy arrays, quantised where asked for.

Knows nothing of graphs, sequences or of running.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.errors import ModelError
from dgn_backends.onnx_block import BlockWeights
from dgn_backends.onnx_linear import LinearWeights, PlainLinear, QuantisedLinear
from dgn_backends.quant import SCHEMES, Quantised, empty, quantise_into
from dgn_backends.tensor import Tensor, tensor_bytes
from dgn_backends.weights import EMBEDDING, FINAL_NORM, ModelFiles, block_prefix, head_tensor, span_tensors

F32 = npt.NDArray[np.float32]


class SpanFiles:
    """The tensors of a request's span. Making it checks that all are there, and raises ModelError, naming
    file and tensor, otherwise."""

    def __init__(self, request: LoadRequest, progress: Progress) -> None:
        self._request = request
        self._scheme = SCHEMES.get(request.quant)
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

        def layer(stem: str, has_bias: bool) -> LinearWeights:
            return self._linear(f"{prefix}{stem}.weight", f"{prefix}{stem}.bias" if has_bias else "")

        q, k, v = (layer(f"self_attn.{name}_proj", spec.qkv_bias) for name in "qkv")
        return BlockWeights(
            input_norm=self._f32(prefix + "input_layernorm.weight"),
            q=q,
            k=k,
            v=v,
            q_norm=self._f32(prefix + "self_attn.q_norm.weight") if spec.qk_norm else None,
            k_norm=self._f32(prefix + "self_attn.k_norm.weight") if spec.qk_norm else None,
            out=layer("self_attn.o_proj", spec.o_bias),
            post_norm=self._f32(prefix + "post_attention_layernorm.weight"),
            gate=layer("mlp.gate_proj", spec.mlp_bias),
            up=layer("mlp.up_proj", spec.mlp_bias),
            down=layer("mlp.down_proj", spec.mlp_bias),
        )

    def final_norm(self) -> F32:
        """The norm before the head, f32 [hidden_size]."""
        return self._f32(FINAL_NORM)

    def head(self) -> LinearWeights:
        """The LM head."""
        return self._linear(head_tensor(self._request.config), "")

    def embedding(self) -> Tensor:
        """The embedding [vocab_size, hidden_size] as it lies in the mapped file: its rows are picked there,
        which takes no memory, so it is not quantised either."""
        return self._raw(EMBEDDING)

    def _linear(self, weight: str, bias: str) -> LinearWeights:
        biases = self._f32(bias) if bias else None
        if self._scheme is None:
            return PlainLinear(self._f32(weight), biases)
        return QuantisedLinear(self._shapes[weight][1], self._quantised(weight), biases)

    def _quantised(self, name: str) -> Quantised:
        assert self._scheme is not None
        out, in_features = self._shapes[name]
        target = empty(out, in_features, self._scheme)
        try:
            quantise_into(target, self._raw(name), threads=self._request.threads or os.cpu_count() or 1)
        except ValueError as error:
            raise ModelError(
                f"{self._request.path / self._files.file_of(name)}: tensor {name} {error}", tensor=name
            ) from error
        return target

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
