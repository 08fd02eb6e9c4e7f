"""Reading a span's weights into torch: memory-mapped tensors, fused and converted to the device and dtype, or
quantised where asked for.

Knows nothing of sequences or of running.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.errors import ModelError
from dgn_backends.quant_cache import QuantisedFiles
from dgn_backends.tensor import Tensor, tensor_bytes
from dgn_backends.torch_block import TorchBlock
from dgn_backends.torch_dequant import largest
from dgn_backends.torch_embedding import DenseEmbedding, Embedding, QuantisedEmbedding
from dgn_backends.torch_linear import DenseMatrix, Linear, Matrix
from dgn_backends.torch_quant import quantised_matrix
from dgn_backends.weights import EMBEDDING, FINAL_NORM, ModelFiles, block_prefix, head_tensor, span_tensors

TORCH_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_F16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, eq=False)
class SpanWeights:
    """What a span needs; the norms are f32. An embedding that is `tied` to the head takes no memory of its
    own: it is the head's tensor, or its rows are read from the mapped file."""

    blocks: tuple[TorchBlock, ...]
    embedding: Embedding | None
    final_norm: torch.Tensor | None
    head: Linear | None
    tied: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of all of them."""
        embedding = None if self.tied else self.embedding
        layers = [layer for layer in (embedding, self.head) if layer is not None]
        norm = 0 if self.final_norm is None else self.final_norm.numel() * self.final_norm.itemsize
        return norm + sum(part.n_bytes for part in (*self.blocks, *layers))


def load_span(
    request: LoadRequest, device: torch.device, dtype: torch.dtype, progress: Progress
) -> SpanWeights:
    """Reads exactly the tensors of the request's span. Raises ModelError, naming file and tensor."""
    return _Loader(request, device, dtype, progress).load()


def view_of(tensor: Tensor) -> torch.Tensor:
    """A torch view of a raw float tensor's memory, which must stay unwritten."""
    with warnings.catch_warnings():
        # torch warns that the memory is read-only, which is what is wanted of a mapped file.
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.frombuffer(tensor.data, dtype=TORCH_DTYPES[tensor.dtype])
    return flat.view(tensor.shape)


class _Loader:
    def __init__(
        self, request: LoadRequest, device: torch.device, dtype: torch.dtype, progress: Progress
    ) -> None:
        self._request = request
        self._files = ModelFiles(request.path, copies=not request.map_weights and request.quant == "none")
        self._files.check(request.config, request.span)
        self._shapes = span_tensors(request.config, request.span)
        self._tied = request.span.embed and request.span.head and request.config.tied_head
        self._shared: torch.Tensor | None = None  # what embedding and head both are
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._quantised: QuantisedFiles | None = None
        if request.quant != "none":
            self._quantised = QuantisedFiles(
                self._files, self._shapes, request.quant, request.cache_dir, threads=request.threads
            )
        self._done = 0
        self._total = sum(tensor_bytes(request.config.dtype, shape) for shape in self._shapes.values())

    def load(self) -> SpanWeights:
        config, span = self._request.config, self._request.span
        self._progress(0, self._total)
        embedding = self._embedding() if span.embed else None
        blocks = tuple(self._block(number) for number in range(span.start, span.stop))
        final_norm = self._norm(FINAL_NORM) if span.head else None
        head = self._linear([head_tensor(config)], None) if span.head else None
        self._progress(self._total, self._total)
        return SpanWeights(blocks, embedding, final_norm, head, self._tied)

    def _block(self, number: int) -> TorchBlock:
        spec = self._request.config.blocks[number]
        prefix = block_prefix(number)

        def layer(part: str, names: Sequence[str], has_bias: bool) -> Linear:
            stems = [f"{prefix}{part}.{name}_proj." for name in names]
            biases = [stem + "bias" for stem in stems] if has_bias else None
            return self._linear([stem + "weight" for stem in stems], biases)

        return TorchBlock(
            spec=spec,
            number=number,
            input_norm=self._norm(prefix + "input_layernorm.weight"),
            qkv=layer("self_attn", ("q", "k", "v"), spec.qkv_bias),
            out=layer("self_attn", ("o",), spec.o_bias),
            post_norm=self._norm(prefix + "post_attention_layernorm.weight"),
            gate_up=layer("mlp", ("gate", "up"), spec.mlp_bias),
            down=layer("mlp", ("down",), spec.mlp_bias),
            q_norm=self._norm(prefix + "self_attn.q_norm.weight") if spec.qk_norm else None,
            k_norm=self._norm(prefix + "self_attn.k_norm.weight") if spec.qk_norm else None,
        )

    def _embedding(self) -> Embedding:
        if self._quantised is None:
            rows = self._mapped(EMBEDDING)
            if not self._tied or rows.dtype == self._dtype:
                rows = rows.to(self._device)
                self._shared = rows if self._tied else None
            return DenseEmbedding(rows, self._device)
        weight = self._quantised.get(EMBEDDING)
        self._count([EMBEDDING])
        return QuantisedEmbedding(weight, self._shapes[EMBEDDING][1], self._device)

    def _linear(self, weights: Sequence[str], biases: Sequence[str] | None) -> Linear:
        bias = None if biases is None else torch.cat([self._converted(name) for name in biases])
        return Linear(self._matrix(weights), bias)

    def _matrix(self, names: Sequence[str]) -> Matrix:
        if self._quantised is None:
            parts = [self._converted(name) for name in names]
            matrix = DenseMatrix(parts[0] if len(parts) == 1 else torch.cat(parts))
            for name in names:  # a copy was made, or what is used of the file comes back
                self._files.release(name)
            return matrix
        weight = self._quantised.get(*names)
        self._count(names)
        if self._dtype == torch.float16 and largest(weight) > _F16_MAX:
            raise self._beyond_f16(names[0])
        return quantised_matrix(weight, self._shapes[names[0]][1], self._dtype, self._device)

    def _norm(self, name: str) -> torch.Tensor:
        return self._mapped(name).float().to(self._device)

    def _converted(self, name: str) -> torch.Tensor:
        source = self._shared if self._shared is not None and name == EMBEDDING else self._mapped(name)
        tensor = source.to(device=self._device, dtype=self._dtype)
        if (
            self._dtype == torch.float16
            and source.dtype != torch.float16
            and not bool(tensor.isfinite().all())
        ):
            raise self._beyond_f16(name)
        return tensor

    def _mapped(self, name: str) -> torch.Tensor:
        self._count([name])
        view = view_of(self._files.tensor(name, self._shapes[name]))
        return view if view.data_ptr() % view.itemsize == 0 else view.clone()

    def _count(self, names: Sequence[str]) -> None:
        dtype = self._request.config.dtype
        self._done += sum(tensor_bytes(dtype, self._shapes[name]) for name in names)
        self._progress(min(self._done, self._total), self._total)

    def _beyond_f16(self, name: str) -> ModelError:
        path = self._request.path / self._files.file_of(name)
        return ModelError(f"{path}: tensor {name} has values beyond f16; use dtype bf16 or f32", tensor=name)
