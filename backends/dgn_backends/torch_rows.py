"""Row tiles: how many rows a matrix product is given at once, so that a row's bits do not depend on its
company.

A library picks its kernel by the number of rows, and kernels differ in the order of their sums. Which row
counts give equal bits is therefore measured, on this machine and for the shapes of the model, instead of
assumed; work is then cut into tiles of these counts only, and padded with zero rows. Knows nothing of
models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

#: Row counts tried, from the cheapest. One row alone is often another kernel (a matrix-vector product).
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The row counts that may be used, ascending; none means any count, without a promise about bits."""

    sizes: tuple[int, ...] = ()

    def split(self, rows: int) -> list[int]:
        """Tiles for `rows` >= 1 rows: full ones, then the smallest that holds the rest. Their sum is at
        least `rows`, and splits into the same tiles again."""
        if not self.sizes:
            return [rows]
        full, rest = divmod(rows, self.sizes[-1])
        tiles = [self.sizes[-1]] * full
        if rest:
            tiles.append(next(size for size in self.sizes if size >= rest))
        return tiles

    def padded(self, rows: int) -> int:
        """The number of rows after padding."""
        return sum(self.split(rows))


def pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`x` [n, ...] with zero rows appended up to `rows`; `x` itself where it has them already."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))])


def agreeing_tiles(
    products: Iterable[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]],
) -> RowTiles:
    """The candidates for which every product agrees bit for bit with the largest candidate.

    Each item is a product and rows [64, ...] to try it on, whose first axis is the one that is cut. Rows
    are compared at their own place and moved by one, with other rows around them."""
    sizes = set(CANDIDATES)
    for product, rows in products:
        whole = product(rows)
        for size in sorted(sizes):
            for first in (0, min(3, rows.shape[0] - size), rows.shape[0] - size):
                part = product(rows[first : first + size].contiguous())
                if not torch.equal(part, whole[first : first + size]):
                    sizes.discard(size)
                    break
    return RowTiles(tuple(sorted(sizes)))
