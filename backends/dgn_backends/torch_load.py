"""Reading a span's weights into torch: memory-mapped tensors, fused and converted to the device and dtype.

Knows nothing of sequences or of running.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dgn_backends.api import LoadRequest, Progress
from dgn_backends.errors import ModelError
from dgn_backends.tensor import Tensor, tensor_bytes
from dgn_backends.torch_block import TorchBlock
from dgn_backends.torch_linear import Linear
from dgn_backends.weights import EMBEDDING, FINAL_NORM, ModelFiles, block_prefix, head_tensor, span_tensors

TORCH_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class SpanWeights:
    """What a span needs. `embedding` [vocab_size, hidden_size] is in the file's dtype (on a CPU: the mapped
    file itself), the norms are f32."""

    blocks: tuple[TorchBlock, ...]
    embedding: torch.Tensor | None
    final_norm: torch.Tensor | None
    head: Linear | None

    @property
    def n_bytes(self) -> int:
        """Bytes of all of them."""
        plain = [tensor for tensor in (self.embedding, self.final_norm) if tensor is not None]
        return (
            sum(block.n_bytes for block in self.blocks)
            + sum(tensor.numel() * tensor.itemsize for tensor in plain)
            + (0 if self.head is None else self.head.n_bytes)
        )


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
        self._files = ModelFiles(request.path)
        self._files.check(request.config, request.span)
        self._shapes = span_tensors(request.config, request.span)
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._done = 0
        self._total = sum(tensor_bytes(request.config.dtype, shape) for shape in self._shapes.values())

    def load(self) -> SpanWeights:
        config, span = self._request.config, self._request.span
        self._progress(0, self._total)
        embedding = self._mapped(EMBEDDING).to(self._device) if span.embed else None
        blocks = tuple(self._block(number) for number in range(span.start, span.stop))
        final_norm = self._norm(FINAL_NORM) if span.head else None
        head = self._linear([head_tensor(config)], None) if span.head else None
        self._progress(self._total, self._total)
        return SpanWeights(blocks, embedding, final_norm, head)

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

    def _linear(self, weights: Sequence[str], biases: Sequence[str] | None) -> Linear:
        bias = None if biases is None else torch.cat([self._converted(name) for name in biases])
        parts = [self._converted(name) for name in weights]
        return Linear(parts[0] if len(parts) == 1 else torch.cat(parts), bias)

    def _norm(self, name: str) -> torch.Tensor:
        return self._mapped(name).float().to(self._device)

    def _converted(self, name: str) -> torch.Tensor:
        source = self._mapped(name)
        tensor = source.to(device=self._device, dtype=self._dtype)
        if (
            self._dtype == torch.float16
            and source.dtype != torch.float16
            and not bool(tensor.isfinite().all())
        ):
            raise ModelError(
                f"{self._request.path / self._files.file_of(name)}: tensor {name} has values beyond f16; "
                "use dtype bf16 or f32",
                tensor=name,
            )
        return tensor

    def _mapped(self, name: str) -> torch.Tensor:
        raw = self._files.tensor(name, self._shapes[name])
        self._done += len(raw.data)
        self._progress(min(self._done, self._total), self._total)
        view = view_of(raw)
        return view if view.data_ptr() % view.itemsize == 0 else view.clone()
