"""Weights in 4 or 8 bits: groups of a row's weights share a scale, chosen for the least squared error.

A weight is `(code - zero) * scale`. Groups lie along a row (its inputs); the zero point is 8 (4 bits) or 128
(8 bits) for all. Packed codes and scales lie as ONNX Runtime's MatMulNBits takes them: `packed` u8
[out, groups, group * bits / 8], the low half of a byte first; `scales` f32 [out, groups]. The last group of a
row is filled up with zeros. Every scale is exact in f16, so that it can be stored as one, and may be
negative: the range of codes reaches one step further down than up, and the largest weight takes that step.

Knows nothing of files, models or compute libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dgn_backends.api import Quant
from dgn_backends.tensor import Tensor

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: Weights worked on at a time by one thread: their f32 copies stay in a core's cache.
_CHUNK = 1 << 15
_TINY = np.float32(2.0**-24)  # the smallest positive f16
_HUGE = 65504.0  # the largest f16


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group` weights share a scale; each has `bits` bits."""

    name: Quant
    bits: int
    group: int

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 1 << (self.bits - 1)

    @property
    def group_bytes(self) -> int:
        """Bytes of the codes of a group."""
        return self.group * self.bits // 8

    def groups(self, in_features: int) -> int:
        """Groups of a row of `in_features` weights."""
        return -(-in_features // self.group)

    def n_bytes(self, out: int, in_features: int) -> int:
        """Bytes of a weight [out, in_features]: codes, and f32 scales."""
        return out * self.groups(in_features) * (self.group_bytes + 4)


#: What each value of `quant` means, but for "none".
SCHEMES: Mapping[Quant, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, 32),
        Scheme("int4", 4, 32),
        Scheme("int8-fast", 8, 128),
        Scheme("int4-fast", 4, 128),
    )
}

#: Scales tried for a group: its largest weight divided by each of these. The best is then fitted again.
_TRIED: Mapping[int, tuple[float, ...]] = {
    4: (-8.0, -7.5, -8.5, -9.0, 7.3),
    8: (-128.0, 127.0),
}


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A weight [out, in]: `packed` u8 [out, groups, group_bytes], `scales` f32 [out, groups]."""

    packed: U8
    scales: F32
    scheme: Scheme

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.nbytes + self.scales.nbytes

    def rows(self, index: npt.NDArray[np.integer] | slice) -> Quantised:
        """Only the rows `index`; a view for a slice."""
        return Quantised(self.packed[index], self.scales[index], self.scheme)


def empty(out: int, in_features: int, scheme: Scheme) -> Quantised:
    """Room for a weight [out, in_features]."""
    groups = scheme.groups(in_features)
    packed = np.empty((out, groups, scheme.group_bytes), np.uint8)
    return Quantised(packed, np.empty((out, groups), np.float32), scheme)


def quantise(weight: F32, scheme: Scheme, *, threads: int = 1) -> Quantised:
    """`weight` f32 [out, in] in `scheme`. Raises ValueError for values that it can't hold."""
    out, in_features = weight.shape
    target = empty(out, in_features, scheme)
    quantise_into(target, Tensor.from_numpy(weight, "f32"), threads=threads)
    return target


def quantise_into(target: Quantised, weight: Tensor, *, threads: int = 1) -> None:
    """Fills `target` from `weight` [out, in] of any float dtype, a few rows at a time: beside the two, next
    to no memory is used.

    Raises ValueError for values that are not finite, or too large for a scale in f16."""

    def work(rows: slice) -> None:
        _quantise_rows(weight.rows(rows.start, rows.stop).to_f32(), target.rows(rows))

    out, in_features = weight.shape
    chunks = _chunks(out, in_features)
    if threads == 1:
        for rows in chunks:
            work(rows)
        return
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter in all that takes long
        for _ in pool.map(work, chunks):
            pass


def dequantise(weight: Quantised, in_features: int) -> F32:
    """The weights that `weight` stands for, f32 [out, in_features]."""
    out, groups = weight.scales.shape
    result = np.empty((out, in_features), np.float32)
    scheme = weight.scheme
    for rows in _chunks(out, in_features):
        packed = weight.packed[rows]
        if scheme.bits == 4:
            codes = np.empty((*packed.shape[:2], scheme.group), np.uint8)
            np.bitwise_and(packed, 15, out=codes[..., 0::2])
            np.right_shift(packed, 4, out=codes[..., 1::2])
        else:
            codes = packed
        values = codes.astype(np.float32)
        values -= np.float32(scheme.zero)
        values *= weight.scales[rows, :, None]
        result[rows] = values.reshape(-1, groups * scheme.group)[:, :in_features]
    return result


def _chunks(out: int, in_features: int) -> Iterator[slice]:
    at_once = max(1, _CHUNK // max(1, in_features))
    for start in range(0, out, at_once):
        yield slice(start, min(start + at_once, out))


def _quantise_rows(weight: F32, target: Quantised) -> None:
    """One chunk. A group is a column while it is worked on: sums over groups then run along memory."""
    scheme = target.scheme
    rows, in_features = weight.shape
    groups = scheme.groups(in_features)
    if in_features != groups * scheme.group:
        padded = np.zeros((rows, groups * scheme.group), np.float32)
        padded[:, :in_features] = weight
        weight = padded
    x = np.ascontiguousarray(weight.reshape(rows * groups, scheme.group).T)
    scales = _best_scales(x, scheme)
    codes = _codes(x, scales, scheme, np.empty_like(x))
    codes += np.float32(scheme.zero)
    bytes_ = codes.astype(np.uint8)
    if scheme.bits == 4:
        bytes_ = bytes_[0::2] | (bytes_[1::2] << np.uint8(4))
    target.packed.reshape(rows * groups, -1)[...] = bytes_.T
    target.scales.reshape(-1)[...] = scales


def _best_scales(x: F32, scheme: Scheme) -> F32:
    """The scale f32 [n] of each column of `x` [group, n]."""
    high, low = x.max(axis=0), x.min(axis=0)
    largest = np.where(high > -low, high, low)
    limit = np.abs(largest).max(initial=0)
    if not limit < _HUGE * (scheme.zero - 1):  # also for NaN
        what = "too large to be quantised" if np.isfinite(limit) else "not finite"
        raise ValueError(f"has values that are {what}")
    largest[np.abs(largest) < _TINY / 2] = 0  # what no f16 scale reaches is 0
    best = np.zeros_like(largest)
    fitted = np.zeros_like(largest)
    codes, product = np.empty_like(x), np.empty_like(x)
    for divisor in _TRIED[scheme.bits]:
        _codes(x, largest * np.float32(1 / divisor), scheme, codes)
        along = np.multiply(x, codes, out=product).sum(axis=0)
        length = np.multiply(codes, codes, out=product).sum(axis=0)
        # With the scale along / length, which is the best for these codes, the squared error is that of no
        # codes at all less along ** 2 / length.
        scale = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
        gain = along * scale
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(fitted, scale, where=better)
    return _to_f16(fitted)


def _to_f16(scales: F32) -> F32:
    """The nearest scales that f16 has; for tiny ones a larger one, so that no weight is cut off."""
    rounded = scales.astype(np.float16).astype(np.float32)
    small = np.abs(scales) < np.float32(2.0**-14)
    if small.any():
        up = np.ceil(np.abs(scales) / _TINY) * _TINY
        rounded = np.where(small, np.copysign(up, scales), rounded)
    return rounded


def _codes(x: F32, scales: F32, scheme: Scheme, out: F32) -> F32:
    """The codes nearest to `x` [group, n] at `scales` [n], zero point taken off, as f32 in `out`."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    np.multiply(x, inverse, out=out)
    np.rint(out, out=out)
    return np.clip(out, -scheme.zero, scheme.zero - 1, out=out)
