"""Products in bf16 with quantised weights on CPUs by torch's kernel for 4 bits, which reads the codes
themselves: made for few rows. For many, a tile of the weights is turned back into bf16 and multiplied with.

Codes of 8 bits are two planes of 4: `code = 16 * high + low`, so the product is one with twice the inputs,
the same rows for both planes. Scales are rounded to bf16. Knows nothing of blocks or of files."""

from __future__ import annotations

import functools

import torch

from dgn_backends.quant import Quantised, Scheme
from dgn_backends.torch_dequant import shared, unpacked_zeros
from dgn_backends.torch_linear import Product, can_pack

_GROUPS = (32, 64, 128, 256)  # those that the kernel takes
#: Outputs that the kernel packs together: of a byte, the low half is one of the first 32, the high half the
#: one 32 further on.
_BLOCK = 64
#: Up to so many rows the kernel is the faster way (measured with AVX-512: it takes a time for each row).
_KERNEL_ROWS = {4: 40, 8: 24}
#: The code that is 0 where the kernel has no zero: 8, for 16 * 8 + 8.
_MIDDLE = {4: 8, 8: 136}
#: Weights worked at once while packing, and while they are turned back: about a core's cache.
_TILE = 1 << 20


def can_use_int4(weight: Quantised, in_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes this weight, and is worth it here."""
    return (
        dtype == torch.bfloat16
        and can_pack(dtype, device)
        and weight.scheme.group in _GROUPS
        and in_features % weight.scheme.group == 0
        and len(weight.packed) % _BLOCK == 0
        and _is_layout_known()
    )


class Int4Matrix:
    """See `torch_linear.Matrix`. Holds a copy of the weight, in the kernel's own layout."""

    def __init__(self, weight: Quantised, in_features: int) -> None:
        self.out_features, self.in_features = len(weight.packed), in_features
        self._scheme = scheme = weight.scheme
        self._planes = scheme.bits // 4
        width = self._planes * in_features
        self._packed = torch.empty((self.out_features, width // 2), dtype=torch.uint8)
        at_once = max(1, _TILE // width // _BLOCK) * _BLOCK
        for first in range(0, self.out_features, at_once):
            rows = slice(first, first + at_once)
            self._packed[rows] = _pack(_planes(shared(weight.packed[rows]), scheme))
        # The kernel takes a weight to be (code - 8) * scale + zero, for each group and output. Of two planes
        # the second one's zero is what bf16 leaves of the first one's.
        scales = shared(weight.scales).t().to(torch.bfloat16)
        wanted = (_MIDDLE[scheme.bits] - unpacked_zeros(weight).t().float()) * scales.float()
        zeros = wanted.to(torch.bfloat16)
        if self._planes == 2:
            scales, zeros = (
                torch.cat([16 * scales, scales]),
                torch.cat([zeros, (wanted - zeros).to(zeros.dtype)]),
            )
        self._scales_and_zeros = torch.stack([scales, zeros], dim=-1)
        self.n_bytes = self._packed.nbytes + self._scales_and_zeros.nbytes

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See the protocol."""
        if x.shape[0] > _KERNEL_ROWS[self._scheme.bits]:
            y = self._dequantised_product(x)
        else:
            wide = x.contiguous() if self._planes == 1 else torch.cat([x, x], dim=1)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                wide, self._packed, self._scheme.group, self._scales_and_zeros
            )
        return y if bias is None else y.add_(bias)

    def samples(self) -> list[Product]:
        """See the protocol."""
        return [self.product]

    def _dequantised_product(self, x: torch.Tensor) -> torch.Tensor:
        blocks = max(1, _TILE // self.in_features // _BLOCK)
        packed = self._packed.view(-1, self._planes * self.in_features, _BLOCK // 2)
        planes = self._scales_and_zeros.view(self._planes, -1, self.out_features, 2).float()
        scales, zeros = planes[-1, ..., 0], planes[..., 1].sum(dim=0)  # the last plane's scale is the code's
        parts = []
        for first in range(0, len(packed), blocks):
            codes = _unpack(packed[first : first + blocks], self._scheme)
            outputs = slice(first * _BLOCK, first * _BLOCK + codes.shape[1])
            values = codes.float().sub_(_MIDDLE[self._scheme.bits])
            values = values.view(len(scales), self._scheme.size(self.in_features), -1)
            values.mul_(scales[:, None, outputs]).add_(zeros[:, None, outputs])
            parts.append(x @ values.to(torch.bfloat16).view(self.in_features, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _planes(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes of 4 bits, i32 [rows, planes * in_features], of `packed` u8 [rows, groups, group_bytes]."""
    low, high = (packed & 15).to(torch.int32), (packed >> 4).to(torch.int32)
    if scheme.bits == 8:
        return torch.cat([high.flatten(1), low.flatten(1)], dim=1)
    return torch.stack([low, high], dim=-1).flatten(1)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """The kernel's layout, u8 [rows, width / 2], of codes of 4 bits, i32 [rows, width]."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed.view(len(codes), -1)


def _unpack(packed: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes u8 [in_features, blocks * _BLOCK] of `packed` u8 [blocks, planes * in_features, _BLOCK / 2]."""
    by_input = packed.transpose(0, 1)
    if scheme.bits == 8:
        high, low = by_input.tensor_split(2)
        halves = ((high & 15) << 4) | (low & 15), (high & 240) | (low >> 4)
    else:
        halves = by_input & 15, by_input >> 4
    return torch.stack(halves, dim=2).flatten(1)


@functools.cache
def _is_layout_known() -> bool:
    """Whether the kernel is there, and packs in the way that `_unpack` takes apart; other CPUs differ."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    codes = torch.arange(2 * _BLOCK * 32, dtype=torch.int32).view(2 * _BLOCK, 32) * 2654435761 >> 28 & 15
    packed = _pack(codes).view(2, 32, _BLOCK // 2)
    return torch.equal(_unpack(packed, Scheme(4, 32)).t().to(torch.int32), codes)
