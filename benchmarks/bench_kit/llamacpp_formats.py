"""llama.cpp's q4_0 and q8_0, as the published format describes them and its reference quantiser rounds: what
a weight becomes when it is stored so. To compare with; knows nothing of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

_GROUP = 32
#: Bits of a weight, its share of the scale in f16 included.
BITS = {"q4_0": 4.5, "q8_0": 8.5}


def q4_0(weight: F32) -> F32:
    """`weight` [out, in] in groups of 32 with codes 0 to 15, of which 8 is 0: the value with the largest
    magnitude has code 0."""
    groups = _groups(weight)
    place = np.abs(groups).argmax(axis=2, keepdims=True)
    scale = np.take_along_axis(groups, place, axis=2) / np.float32(-8)
    shifted = groups * _inverse(scale) + np.float32(8.5)
    codes = np.minimum(np.trunc(shifted), np.float32(15)) - np.float32(8)
    return _back(codes * _stored(scale), weight.shape)


def q8_0(weight: F32) -> F32:
    """`weight` [out, in] in groups of 32 with codes -127 to 127; halves are rounded away from 0."""
    groups = _groups(weight)
    scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    value = groups * _inverse(scale)
    whole = np.trunc(value)
    codes = whole + np.trunc((value - whole) * 2)  # the difference is exact, unlike the sum with a half
    return _back(codes * _stored(scale), weight.shape)


FORMATS: Mapping[str, Callable[[F32], F32]] = {"q4_0": q4_0, "q8_0": q8_0}


def _groups(weight: F32) -> F32:
    """[out, groups, 32]; the last group of a row is filled up with zeros, where llama.cpp would refuse."""
    out, width = weight.shape
    count = -(-width // _GROUP)
    padded = np.zeros((out, count * _GROUP), np.float32)
    padded[:, :width] = weight
    return padded.reshape(out, count, _GROUP)


def _inverse(scale: F32) -> F32:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _stored(scale: F32) -> F32:
    """The scale as it is read again; codes are made with the one before it is rounded."""
    return scale.astype(np.float16).astype(np.float32)


def _back(groups: F32, shape: tuple[int, ...]) -> F32:
    return np.ascontiguousarray(groups.reshape(shape[0], -1)[:, : shape[1]])
