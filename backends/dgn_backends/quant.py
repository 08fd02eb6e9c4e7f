"""Weights in 4 or 8 bits: groups of a row's weights share a scale and a zero point, chosen for the least
squared error.

A weight is `(code - zero) * scale`. Groups lie along a row (its inputs), and may be a whole row. Packed
codes, scales and zero points lie as ONNX Runtime's MatMulNBits takes them: `packed` u8 [out, groups, group
* bits / 8], the low half of a byte first; `scales` f32 [out, groups]; `zeros` u8 [out, ceil(groups * bits /
8)], packed like codes. The last group of a row is filled up with zeros. Every scale is exact in f16, so
that it can be stored as one.

Knows nothing of files, models or compute libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dgn_backends.tensor import Tensor

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: Weights worked on at a time by one thread: their f32 copies stay in a core's cache.
_CHUNK = 1 << 15
#: The same of whole rows, of which there must be many at a time: sums over a row run along them.
_CHUNK_OF_ROWS = 1 << 18
_TINY = np.float32(2.0**-24)  # the smallest positive f16
_HUGE = 65504.0  # the largest f16


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group` weights share a scale and a zero point, or all of a row where it is None (per-channel
    quantisation); each has `bits` bits."""

    bits: int
    group: int | None

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def size(self, in_features: int) -> int:
        """Weights of a group in rows of `in_features`."""
        return self.group or in_features

    def group_bytes(self, in_features: int) -> int:
        """Bytes of the codes of a group."""
        return -(-self.size(in_features) * self.bits // 8)

    def groups(self, in_features: int) -> int:
        """Groups of a row of `in_features` weights."""
        return -(-in_features // self.size(in_features))

    def zeros_bytes(self, groups: int) -> int:
        """Bytes of the zero points of a row."""
        return -(-groups * self.bits // 8)

    def n_bytes(self, out: int, in_features: int) -> int:
        """Bytes of a weight [out, in_features]: codes, f32 scales, zero points."""
        groups = self.groups(in_features)
        return out * (groups * (self.group_bytes(in_features) + 4) + self.zeros_bytes(groups))


#: Shares of a group's range that are tried as the range of its codes. The best is then fitted again.
_TRIED: Mapping[int, tuple[float, ...]] = {4: (1.0, 0.95, 0.9), 8: (1.0,)}


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A weight [out, in]: `packed` u8 [out, groups, group_bytes], `scales` f32 [out, groups], `zeros` u8
    [out, zeros_bytes]."""

    packed: U8
    scales: F32
    zeros: U8
    scheme: Scheme

    @property
    def n_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.packed.nbytes + self.scales.nbytes + self.zeros.nbytes

    def rows(self, index: npt.NDArray[np.integer] | slice) -> Quantised:
        """Only the rows `index`; a view for a slice."""
        return Quantised(self.packed[index], self.scales[index], self.zeros[index], self.scheme)


def empty(out: int, in_features: int, scheme: Scheme) -> Quantised:
    """Room for a weight [out, in_features]."""
    groups = scheme.groups(in_features)
    packed = np.empty((out, groups, scheme.group_bytes(in_features)), np.uint8)
    zeros = np.empty((out, scheme.zeros_bytes(groups)), np.uint8)
    return Quantised(packed, np.empty((out, groups), np.float32), zeros, scheme)


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
    chunks = _chunks(out, in_features, target.scheme)
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
    for rows in _chunks(out, in_features, scheme):
        codes = unpacked(weight.packed[rows], scheme.bits)
        zeros = unpacked(weight.zeros[rows], scheme.bits)[:, :groups, None]
        values = codes.astype(np.float32)
        values -= zeros
        values *= weight.scales[rows, :, None]
        result[rows] = values.reshape(len(values), -1)[:, :in_features]
    return result


def regrouped(weight: Quantised, in_features: int, group: int) -> Quantised:
    """The same weights in groups of `group`, of 8 bits that were in whole rows: for kernels that take no
    others."""
    assert weight.scheme == Scheme(8, None)
    scheme = Scheme(8, group)
    target = empty(len(weight.packed), in_features, scheme)
    target.packed[...] = weight.zeros[:, :, None]  # what fills up the last group stands for 0
    target.packed.reshape(len(weight.packed), -1)[:, :in_features] = weight.packed[:, 0]
    target.scales[...] = weight.scales
    target.zeros[...] = weight.zeros
    return target


def _packed(codes: U8, bits: int) -> U8:
    """Codes along the first axis, two in a byte where they have 4 bits; an odd last one stands alone."""
    if bits == 8:
        return codes
    if len(codes) % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[:1])])
    return codes[0::2] | (codes[1::2] << np.uint8(4))


def unpacked(packed: U8, bits: int) -> U8:
    """The codes along the last axis of `packed`, two in a byte where they have 4 bits, the low half first."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes


def _chunks(out: int, in_features: int, scheme: Scheme) -> Iterator[slice]:
    chunk = _CHUNK_OF_ROWS if scheme.group is None else _CHUNK
    at_once = max(1, chunk // max(1, in_features))
    for start in range(0, out, at_once):
        yield slice(start, min(start + at_once, out))


def _quantise_rows(weight: F32, target: Quantised) -> None:
    """One chunk. A group is a column while it is worked on: sums over groups then run along memory."""
    scheme = target.scheme
    rows, in_features = weight.shape
    groups = scheme.groups(in_features)
    size = scheme.size(in_features)
    if in_features != groups * size:
        padded = np.zeros((rows, groups * size), np.float32)
        padded[:, :in_features] = weight
        weight = padded
    x = np.ascontiguousarray(weight.reshape(rows * groups, size).T)
    zeros, scales = _best(x, scheme)
    codes = _codes(x, scales, zeros, scheme, np.empty_like(x))
    codes += zeros
    target.packed.reshape(rows * groups, -1)[...] = _packed(codes.astype(np.uint8), scheme.bits).T
    target.zeros[...] = _packed(zeros.astype(np.uint8).reshape(rows, groups).T, scheme.bits).T
    target.scales.reshape(-1)[...] = scales


def _best(x: F32, scheme: Scheme) -> tuple[F32, F32]:
    """The zero point and the scale, f32 [n] each, of each column of `x` [group, n]."""
    high, low = x.max(axis=0, initial=0), x.min(axis=0, initial=0)  # 0 must have a code
    span = high - low
    limit = span.max(initial=0)
    if not limit < _HUGE * scheme.top:  # also for NaN
        what = "too large to be quantised" if np.isfinite(limit) else "not finite"
        raise ValueError(f"has values that are {what}")
    span[span < _TINY / 2] = 0  # what no f16 scale reaches is 0
    per_span = np.divide(np.float32(scheme.top), span, out=np.zeros_like(span), where=span > 0)
    zeros = np.rint(-low * per_span)
    best, fitted = np.zeros_like(span), np.zeros_like(span)
    codes, product = np.empty_like(x), np.empty_like(x)
    for share in _TRIED[scheme.bits]:
        _codes(x, span * np.float32(share / scheme.top), zeros, scheme, codes)
        along = np.multiply(x, codes, out=product).sum(axis=0)
        length = np.multiply(codes, codes, out=product).sum(axis=0)
        # With the scale along / length, which is the best for these codes, the squared error is that of no
        # codes at all less along ** 2 / length.
        scale = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
        gain = along * scale
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(fitted, scale, where=better)
    return zeros, _to_f16(fitted)


def _to_f16(scales: F32) -> F32:
    """The nearest scales that f16 has; for tiny ones a larger one, so that no weight is cut off."""
    rounded = (
        np.minimum(scales, np.float32(_HUGE)).astype(np.float16).astype(np.float32)
    )  # a fit may be beyond
    small = scales < np.float32(2.0**-14)
    if small.any():
        rounded = np.where(small, np.ceil(scales / _TINY) * _TINY, rounded)
    return rounded


def _codes(x: F32, scales: F32, zeros: F32, scheme: Scheme, out: F32) -> F32:
    """The codes nearest to `x` [group, n] at `scales` [n], `zeros` [n] taken off, as f32 in `out`."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    np.multiply(x, inverse, out=out)
    np.rint(out, out=out)
    return np.clip(out, -zeros, np.float32(scheme.top) - zeros, out=out)
