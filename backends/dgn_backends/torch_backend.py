"""The backend "torch": CPU and CUDA, in f32, bf16 or f16. Chooses device, dtype and row tiles, and loads a
span.

Knows nothing of sequences; those are the runner's.
"""

from __future__ import annotations

import os
from typing import ClassVar

import torch

from dgn_backends.api import LoadRequest, Progress, Quant
from dgn_backends.cpu_digest import cpu_digest
from dgn_backends.errors import BackendUnavailable, LimitError
from dgn_backends.model import ModelConfig
from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.tensor import DType
from dgn_backends.torch_attention import probes
from dgn_backends.torch_block import Tiles
from dgn_backends.torch_kv import PAGE_POSITIONS
from dgn_backends.torch_linear import Product, can_pack
from dgn_backends.torch_load import TORCH_DTYPES, SpanWeights, load_span
from dgn_backends.torch_rows import RowTiles, agreeing_tiles
from dgn_backends.torch_runner import Placement, TorchRunner

#: Has torch ask the system for huge pages for large tensors: reading all weights for each token takes 5 to
#: 8 % less time with them. torch looks at its first allocation.
_HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")


class TorchBackend:
    """See `dgn_backends.api.Backend`."""

    name: ClassVar[str] = "torch"

    def devices(self) -> list[str]:
        """CUDA devices, if any, then the CPU."""
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())] + ["cpu"]

    def loaded_bytes(self, request: LoadRequest) -> int:
        """See `CountsWeights`."""
        device = self._device(request.device)
        if device.type != "cpu":
            return 0
        return loaded_bytes(request.quant, request.config, [request.span], _dtype(request, device))

    def load(self, request: LoadRequest, progress: Progress) -> TorchRunner:
        """See the protocol. `threads` sets torch's threads for the whole process."""
        os.environ.setdefault(*_HUGE_PAGES)
        device = self._device(request.device)
        dtype = _dtype(request, device)
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        if device.type == "cuda":
            _full_precision_sums()
        try:
            with torch.inference_mode():
                weights = load_span(request, device, TORCH_DTYPES[dtype], progress)
                tiles = _tiles(request.config, weights, device, dtype)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise LimitError(
                f'span "{request.span}" of {request.path} does not fit on {device}: {error}'
            ) from error
        placement = Placement(
            device=device,
            dtype=dtype,
            tiles=tiles,
            row_invariant=bool(tiles.linear.sizes and tiles.attention.sizes),
            numerics=_numerics(device, dtype, request.quant, tiles),
        )
        return TorchRunner(request.config, request.span, weights, placement)

    def _device(self, wanted: str) -> torch.device:
        usable = self.devices()
        if wanted == "auto":
            return torch.device(usable[0])
        if wanted == "cuda" and len(usable) > 1:
            return torch.device("cuda:0")
        if wanted not in usable:
            raise BackendUnavailable(
                f'device "{wanted}" is not usable by torch here; usable: {", ".join(usable)}'
            )
        return torch.device(wanted)


def _dtype(request: LoadRequest, device: torch.device) -> DType:
    """The dtype asked for; "auto" is the model's own, or f32 on a CPU without instructions for it."""
    match request.dtype:
        case "f32" | "bf16" | "f16" as named:
            return named
        case "auto":
            saved = request.config.dtype
            native = device.type == "cuda" or can_pack(TORCH_DTYPES[saved], device)
            return saved if native else "f32"
    raise BackendUnavailable(
        f'dtype "{request.dtype}" is unknown to torch here; usable: auto, f32, bf16, f16'
    )


def _full_precision_sums() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _tiles(config: ModelConfig, weights: SpanWeights, device: torch.device, dtype: DType) -> Tiles:
    """Row counts that keep a row's bits, measured, for f32 on a CPU: who picks f32 wants exactness. bf16
    and f16 run at any count, for speed, and promise nothing about bits."""
    if device.type != "cpu" or dtype != "f32":
        return Tiles(RowTiles(), RowTiles())
    layers = [weights.head] if weights.head is not None else []
    if weights.blocks:
        first = weights.blocks[0]
        layers += [first.qkv, first.out, first.gate_up, first.down]
    random = torch.Generator().manual_seed(0)
    products: list[tuple[Product, torch.Tensor]] = []
    for layer in layers:
        rows = torch.randn(64, layer.matrix.in_features, generator=random)
        products += [(product, rows) for product in layer.matrix.samples()]
    block = config.block
    return Tiles(
        linear=agreeing_tiles(products),
        attention=agreeing_tiles(probes(block.n_heads, block.n_kv_heads, block.head_dim)),
    )


def _numerics(device: torch.device, dtype: DType, quant: Quant, tiles: Tiles) -> str:
    """Everything that shapes rounding, in one line."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machine = f"cuda{torch.version.cuda}-sm{major}{minor}"
    else:
        machine = (
            f"cpu-{torch.backends.cpu.get_cpu_capability()}-{cpu_digest()}-threads{torch.get_num_threads()}"
        )
    linear, attention = ("+".join(map(str, rows.sizes)) or "any" for rows in (tiles.linear, tiles.attention))
    newest = "+sdpa" if device.type == "cpu" and dtype == "bf16" else ""
    shapes = f"rows-{linear}/queries-{attention}/keys-{PAGE_POSITIONS}{newest}"
    return f"torch-{torch.__version__}/{dtype}/kv-{dtype}/{quant}/{machine}/{shapes}"
