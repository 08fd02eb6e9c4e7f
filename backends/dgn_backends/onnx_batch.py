"""How the steps of a batch become runs of a session: who goes together, and where each row lies in the grid
that attention works on.

A run's linear layers see its rows alone, one after the other. Attention sees a grid [slots, longest step]
over a contiguous range of slots; cells without a row cost little, and only in attention. Knows nothing of
sessions or of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]

#: Rows of a run at most: bounds the memory of what lies between layers.
MAX_ROWS = 512
#: A grid of this many cells is never worth a second pass over the weights.
_SMALL_GRID = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[first, first + count)` of the batch's step number `step`, at positions `start` onwards of a
    slot; count is at most MAX_ROWS."""

    step: int
    slot: int
    start: int
    first: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The index inputs of a run, see `onnx_block.declare_inputs`."""

    first_slot: int
    longest_total: int
    to_grid: I32
    from_grid: I32
    totals_less_1: I32
    counts: I32


def cut(step: int, slot: int, start: int, count: int) -> list[Piece]:
    """The pieces of a step."""
    return [
        Piece(step, slot, start + first, first, min(MAX_ROWS, count - first))
        for first in range(0, count, MAX_ROWS)
    ]


def groups(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces of different slots as runs: alike in length, so that little of a grid is empty."""
    found: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.count, piece.slot)):
        if found and _fits([*found[-1], piece]):
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _fits(pieces: Sequence[Piece]) -> bool:
    rows = sum(piece.count for piece in pieces)
    slots = [piece.slot for piece in pieces]
    cells = (max(slots) - min(slots) + 1) * max(piece.count for piece in pieces)
    return rows <= MAX_ROWS and cells <= max(_SMALL_GRID, 2 * rows)


def grid(pieces: Sequence[Piece]) -> Grid:
    """The grid of a run whose rows are those of `pieces`, in order."""
    first_slot = min(piece.slot for piece in pieces)
    n_slots = max(piece.slot for piece in pieces) - first_slot + 1
    longest = max(piece.count for piece in pieces)
    to_grid = np.zeros((n_slots, longest), np.int32)
    from_grid = np.empty(sum(piece.count for piece in pieces), np.int32)
    totals = np.ones(n_slots, np.int32)  # a slot without a step must claim to hold something
    counts = np.zeros(n_slots, np.int32)
    row = 0
    for piece in pieces:
        slot = piece.slot - first_slot
        rows = np.arange(row, row + piece.count, dtype=np.int32)
        to_grid[slot, : piece.count] = rows
        from_grid[rows] = slot * longest + np.arange(piece.count, dtype=np.int32)
        totals[slot] = piece.start + piece.count
        counts[slot] = piece.count
        row += piece.count
    # The operator wants room for padded steps as well, and a total no smaller than a step.
    return Grid(first_slot, max(int(totals.max()), longest), to_grid, from_grid, totals - 1, counts)
