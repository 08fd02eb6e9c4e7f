"""Reading a span's weights for ONNX Runtime: mapped tensors as NumPy arrays, quantised where asked for.

Knows nothing of graphs, sequences or of running.
"""

from __future__ import annotations

import numpy as np

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.errors import ModelError
from dgn_backends.onnx_block import BlockWeights
from dgn_backends.onnx_graph import Array
from dgn_backends.onnx_linear import LinearWeights, PerChannelLinear, PlainLinear, QuantisedLinear
from dgn_backends.quant import Quantised, regrouped
from dgn_backends.quant_cache import QuantisedFiles
from dgn_backends.quant_plan import stored_bytes
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor, tensor_bytes
from dgn_backends.weights import (
    EMBEDDING,
    FINAL_NORM,
    ModelFiles,
    Shape,
    block_prefix,
    head_tensor,
    span_tensors,
)

#: Of weights in whole rows, where kernels want groups.
_GROUP = 128


class SpanFiles:
    """The tensors of a request's span, floats as the raw bits of `dtype`; `for_cpu`: its kernels are what
    computes with them. Making it checks that all are there, and raises ModelError, naming file and tensor,
    otherwise."""

    def __init__(self, request: LoadRequest, dtype: DType, progress: Progress, *, for_cpu: bool) -> None:
        self._request = request
        self._dtype = dtype
        self._for_cpu = for_cpu
        self._files = ModelFiles(request.path, copies=not request.map_weights and request.quant == "none")
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

    def made_bytes(self, span: Span) -> int:
        """Bytes of memory that the layers of `span` take while they are read, until they are given back: none
        where they are used as they lie in a mapped file."""
        if self._quantised is not None and self._quantised.are_kept:
            return 0
        shapes = span_tensors(self._request.config, span)
        return sum(self._made_bytes(name, shape) for name, shape in shapes.items() if name in self._shapes)

    def _made_bytes(self, name: str, shape: Shape) -> int:
        if self._quantised is not None:
            return stored_bytes(self._request.quant, name, shape, "f32")
        is_mapped = not self._files.copies and self._files.tensor(name, shape).dtype == self._dtype
        return 0 if is_mapped else tensor_bytes(self._dtype, shape)

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
            input_norm=self._floats(prefix + "input_layernorm.weight"),
            q=q,
            k=k,
            v=v,
            q_norm=self._floats(prefix + "self_attn.q_norm.weight") if spec.qk_norm else None,
            k_norm=self._floats(prefix + "self_attn.k_norm.weight") if spec.qk_norm else None,
            out=layer("self_attn.o_proj", spec.o_bias),
            post_norm=self._floats(prefix + "post_attention_layernorm.weight"),
            gate=layer("mlp.gate_proj", spec.mlp_bias),
            up=layer("mlp.up_proj", spec.mlp_bias),
            down=layer("mlp.down_proj", spec.mlp_bias),
        )

    def final_norm(self) -> Array:
        """The norm before the head, [hidden_size]."""
        return self._floats(FINAL_NORM)

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
        biases = self._floats(bias) if bias else None
        if self._quantised is None:
            return PlainLinear(self._floats(weight), biases)
        quantised = self._quantised.get(weight)
        self._count(weight)
        in_features = self._shapes[weight][1]
        if quantised.scheme.group is None:
            if self._for_cpu:
                return PerChannelLinear(quantised, biases)
            quantised = regrouped(quantised, in_features, _GROUP)
        return QuantisedLinear(in_features, quantised, biases)

    def _floats(self, name: str) -> Array:
        """A tensor in our dtype: the mapped file itself where it has that and is aligned. Raises ModelError
        for values that an f16 can't hold, and for a norm or a bias that is not finite."""
        tensor = self._raw(name)
        if len(tensor.shape) == 1 and not np.isfinite(tensor.to_f32()).all():
            # Of what passes through them, rows that are quantised would make numbers again.
            raise self._refused(name, "has values that are not finite; the file is damaged")
        if tensor.dtype != self._dtype:
            array = self._converted(name, tensor)
        else:
            array = tensor.to_numpy()
            if array.flags.aligned:
                return array
            array = array.copy()
        self._files.release(name)
        return array

    def _converted(self, name: str, tensor: Tensor) -> Array:
        values = tensor.to_f32()
        if self._dtype == "f16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise self._refused(name, "has values too large for f16; use bf16 or f32")
        return values if self._dtype == "f32" else Tensor.from_f32(values, self._dtype).to_numpy()

    def _refused(self, name: str, why: str) -> ModelError:
        path = self._files.path / self._files.file_of(name)
        return ModelError(f"{path}: tensor {name} {why}", file=str(path), tensor=name)

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
