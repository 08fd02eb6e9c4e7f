"""Linear layers in torch: weights packed once for oneDNN on CPUs that have it, plain elsewhere, or in
another form that makes products (see `torch_quant`).

Packed weights make a step of a few rows cost about what one row costs, and in f32 give the same bits for 2
to 64 rows (measured at load, see `torch_rows`). Knows nothing of blocks or sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from dgn_backends.torch_rows import RowTiles

_PACK_FOR_ROWS = 64


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has packed linear layers of this dtype here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(ops._is_mkldnn_fp16_supported())
    return dtype == torch.float32


Product = Callable[[torch.Tensor], torch.Tensor]


class Matrix(Protocol):
    """A weight [out_features, in_features], in whatever form its products are made from."""

    out_features: int
    in_features: int
    n_bytes: int

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + `bias` in one call, [rows, out_features]."""

    def samples(self) -> list[Product]:
        """Products of rows that show which row counts agree for this weight: all of it, or parts."""


class DenseMatrix:
    """See `Matrix`: numbers, on their device and in their dtype already."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.n_bytes = weight.numel() * weight.itemsize
        self._packed = can_pack(weight.dtype, weight.device)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS) if self._packed else weight
        )

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See the protocol."""
        if self._packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
            return out
        return F.linear(x, self._weight, bias)

    def samples(self) -> list[Product]:
        """See the protocol."""
        return [self.product]


class Linear:
    """y = x W^T + b for rows x [rows, in]; the bias has the dtype that is computed in."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None) -> None:
        self.matrix = matrix
        self.bias = bias
        self.n_bytes = matrix.n_bytes + (0 if bias is None else bias.numel() * bias.itemsize)

    def __call__(self, x: torch.Tensor, tiles: RowTiles) -> torch.Tensor:
        """The layer on rows padded to `tiles`, one tile at a time."""
        return self._tiled(x, tiles, self.bias)

    def scaled(self, x: torch.Tensor, scale: torch.Tensor, tiles: RowTiles) -> torch.Tensor:
        """The layer on rows that were multiplied by `scale` [rows, 1] to fit the dtype; f32 [rows, out]."""
        y = self._tiled(x, tiles, None).float() / scale
        return y if self.bias is None else y + self.bias.float()

    def _tiled(self, x: torch.Tensor, tiles: RowTiles, bias: torch.Tensor | None) -> torch.Tensor:
        product, sizes = self.matrix.product, tiles.split(x.shape[0])
        if len(sizes) == 1:
            return product(x, bias)
        return torch.cat([product(part, bias) for part in torch.split(x, sizes)])
