"""Tables of cos and sin for GroupQueryAttention, one row a position, made as far as positions have come.

Knows nothing of sequences.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

from dgn_backends.model import RopeSpec
from dgn_backends.onnx_block import padded_head_dim
from dgn_backends.rope import angles, cos_sin

F32 = npt.NDArray[np.float32]

_FIRST_ROWS = 512


class RopeTable:
    """`cos` and `sin`, f32 [rows, padded head_dim / 2], for one set of frequencies."""

    def __init__(self, inv_freq: F32, scaling: float, head_dim: int) -> None:
        self._inv_freq = inv_freq
        self._scaling = scaling
        self._half = padded_head_dim(head_dim) // 2
        self.cos, self.sin = self._rows(0, _FIRST_ROWS)

    def reserve(self, stop: int) -> None:
        """Makes rows for positions up to `stop`."""
        rows = len(self.cos)
        if stop <= rows:
            return
        cos, sin = self._rows(rows, max(stop, 2 * rows))
        self.cos, self.sin = np.concatenate([self.cos, cos]), np.concatenate([self.sin, sin])

    def _rows(self, start: int, stop: int) -> tuple[F32, F32]:
        parts = cos_sin(self._inv_freq, self._scaling, np.arange(start, stop))
        # What stands in the padding meets zeros only.
        room = ((0, 0), (0, self._half - len(self._inv_freq)))
        return np.pad(parts[0], room), np.pad(parts[1], room)


class RopeTables:
    """The tables in use: sequences with the same frequencies share one."""

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        self._spec = spec
        self._head_dim = head_dim
        self._tables: weakref.WeakValueDictionary[bytes, RopeTable] = weakref.WeakValueDictionary()

    def table(self, total_positions: int) -> RopeTable:
        """The table of a sequence opened for `total_positions`; it lives for as long as somebody holds it."""
        inv_freq, scaling = angles(self._spec, self._head_dim, total_positions)
        table = self._tables.get(inv_freq.tobytes())
        if table is None:
            table = RopeTable(inv_freq, scaling, self._head_dim)
            self._tables[inv_freq.tobytes()] = table
        return table
