"""Reading a span's weights for ONNX Runtime: mapped tensors as NumPy arrays, quantised where asked for.

Knows nothing of graphs, sequences or of running.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.onnx_block import BlockWeights
from dgn_backends.onnx_linear import LinearWeights, PlainLinear, QuantisedLinear
from dgn_backends.quant import Quantised
from dgn_backends.quant_cache import QuantisedFiles
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
        self._quantised: QuantisedFiles | None = None
        if request.quant != "none":
            self._quantised = QuantisedFiles(
                self._files, self._shapes, request.quant, request.cache_dir, threads=request.threads
            )
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

    def embedding(self) -> Tensor | Quantised:
        """The embedding [vocab_size, hidden_size] as it lies in its mapped file, where rows are picked; a
        session that has the same weights as its head does not share it."""
        if self._quantised is None:
            return self._raw(EMBEDDING)
        self._count(EMBEDDING)
        return self._quantised.get(EMBEDDING)

    def _linear(self, weight: str, bias: str) -> LinearWeights:
        biases = self._f32(bias) if bias else None
        if self._quantised is None:
            return PlainLinear(self._f32(weight), biases)
        quantised = self._quantised.get(weight)
        self._count(weight)
        return QuantisedLinear(self._shapes[weight][1], quantised, biases)

    def _f32(self, name: str) -> F32:
        """A tensor in f32: the mapped file itself where it is f32 and aligned."""
        tensor = self._raw(name)
        array = tensor.to_f32()
        if array.flags.aligned and tensor.dtype == "f32":
            return array
        array = array if array.flags.owndata else array.copy()
        self._files.release(name)
        return array

    def _raw(self, name: str) -> Tensor:
        self._count(name)
        return self._files.tensor(name, self._shapes[name])

    def _count(self, name: str) -> None:
        if name not in self._seen:
            self._seen.add(name)
            self._done = min(
                self._done + tensor_bytes(self._request.config.dtype, self._shapes[name]), self._total
            )
            self._progress(self._done, self._total)
