"""Products with quantised weights on every device and in every dtype: a tile of rows is turned back into
numbers, multiplied with, and forgotten.

Slower for few rows than a kernel that reads the codes themselves. Knows nothing of blocks or of files."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dgn_backends.quant import Quantised, unpacked
from dgn_backends.torch_linear import Product

#: Weights in a tile: in a core's cache on a CPU; elsewhere as many as keep the device busy.
_TILE_ON_CPU, _TILE_ELSEWHERE = 1 << 19, 1 << 25


class DequantisedMatrix:
    """See `torch_linear.Matrix`. On a CPU codes and scales stay where they lie, be it a mapped file."""

    def __init__(self, weight: Quantised, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features, self.in_features = len(weight.packed), in_features
        self._scheme = weight.scheme
        self._dtype = dtype
        self._packed = shared(weight.packed).to(device)
        self._scales = shared(weight.scales).to(device)
        self._zeros = unpacked_zeros(weight).to(device)
        self.n_bytes = self._packed.nbytes + self._scales.nbytes + self._zeros.nbytes
        tile = _TILE_ON_CPU if device.type == "cpu" else _TILE_ELSEWHERE
        self._tile_rows = max(1, tile // in_features)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See the protocol."""
        tiles = [self._tile_product(x, bias, first) for first in range(0, self.out_features, self._tile_rows)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)

    def samples(self) -> list[Product]:
        """See the protocol: all tiles but the last have the same shape."""
        last = (self.out_features - 1) // self._tile_rows * self._tile_rows
        return [functools.partial(self._tile_product, bias=None, first=first) for first in {0, last}]

    def _tile_product(self, x: torch.Tensor, bias: torch.Tensor | None, first: int) -> torch.Tensor:
        rows = slice(first, first + self._tile_rows)
        packed = self._packed[rows]
        codes = packed
        if self._scheme.bits == 4:  # as `quant.unpacked`, on any device
            codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        values = codes.float().sub_(self._zeros[rows, :, None]).mul_(self._scales[rows, :, None])
        weights = values.view(len(packed), -1)[:, : self.in_features].to(self._dtype)
        return F.linear(x, weights, None if bias is None else bias[rows])


def unpacked_zeros(weight: Quantised) -> torch.Tensor:
    """The zero points of `weight`, u8 [out, groups]."""
    return shared(unpacked(weight.zeros, weight.scheme.bits))[:, : weight.scales.shape[1]]


def largest(weight: Quantised) -> float:
    """The largest number that codes of `weight` can stand for, whatever its sign."""
    zeros = unpacked_zeros(weight).float()
    return float((torch.maximum(zeros, weight.scheme.top - zeros) * shared(weight.scales)).max())


def shared(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """`array` as a torch tensor in the same memory, which must stay unwritten."""
    with warnings.catch_warnings():
        # torch warns that the memory is read-only, which is what is wanted of a mapped file.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
