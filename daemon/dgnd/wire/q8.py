"""Hidden states in 8 bits for the way between two nodes: half the bytes of bf16, a quarter of f32.

Each group of Q8_GROUP values of a row has a scale of its own, the largest of them over 127, so that a few
large values cost only their neighbours precision. What is encoded depends on the row alone: rows sent again,
or in other company, have the same bytes. Knows nothing of frames or of who sends what.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dgn_backends.tensor import Q8_GROUP, Tensor

#: Below it a group is nothing: the scale would be no normal number, and codes would not fit it.
_LEAST = np.finfo(np.float32).tiny
#: A scale up to this gives finite numbers with every code there is.
_MOST = np.finfo(np.float32).max / np.float32(128)


def encode(rows: Tensor) -> Tensor:
    """Hidden states [n, h] in f32, bf16 or f16 as q8. Each value is off by at most half its group's scale, or
    by 1.5e-36.

    Raises ValueError where values are not finite, or almost not: beyond 3.3e38.
    """
    values = rows.to_f32()
    n, width = values.shape
    groups = -(-width // Q8_GROUP)
    if width % Q8_GROUP:
        values = np.pad(values, ((0, 0), (0, groups * Q8_GROUP - width)))
    grouped = values.reshape(n, groups, Q8_GROUP)
    scales = np.maximum(grouped.max(axis=2), -grouped.min(axis=2)) / np.float32(127)
    if not (scales <= _MOST).all():  # nor of NaN, which is no maximum but stays one
        raise ValueError("hidden states that are not finite")
    scales[scales < _LEAST] = 0
    codes = np.rint(grouped / np.where(scales, scales, np.float32(1))[..., None]).astype(np.int8)
    data = np.empty((n, width + 4 * groups), np.uint8)
    data[:, :width] = codes.reshape(n, -1)[:, :width].view(np.uint8)
    data[:, width:] = scales.astype("<f4").view(np.uint8)
    return Tensor("q8", (n, width), data.reshape(-1).data)


def decode(rows: Tensor) -> Tensor:
    """The hidden states [n, h] that q8 stands for, in f32. Finite after `check`."""
    codes, scales = _parts(rows)
    n, width = codes.shape
    values = np.empty((n, scales.shape[1] * Q8_GROUP), np.float32)
    values[:, :width] = codes
    values[:, width:] = 0
    values.reshape(n, -1, Q8_GROUP)[...] *= scales[..., None]
    return Tensor.from_numpy(values[:, :width], "f32")


def check(rows: Tensor) -> None:
    """Raises ValueError for scales that no sender can mean: negative, not finite, or too large."""
    _, scales = _parts(rows)
    if not ((scales >= 0) & (scales <= _MOST)).all():
        raise ValueError("q8 with a scale that is no finite number from 0")


def _parts(rows: Tensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes [n, h] and scales [n, groups]."""
    n, width = rows.shape
    raw = np.frombuffer(rows.data, np.uint8).reshape(n, -1)
    scales = np.ascontiguousarray(raw[:, width:]).view("<f4")
    return raw[:, :width].view(np.int8), scales
