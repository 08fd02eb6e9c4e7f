"""Paged storage of keys and values in NumPy: one sequence's cache for a run of blocks.

Grows by whole pages, so what is there is never copied or moved, and forgetting gives whole pages back. Knows
nothing of attention or of rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

PAGE_POSITIONS = 64


class PagedKV:
    """Keys and values, f32, of `n_blocks` blocks. Each page is one array [n_blocks, 2, n_kv_heads,
    PAGE_POSITIONS, head_dim], where index 0 of the second axis is the keys; slots not written yet are zero,
    so that what multiplies them stays finite.

    `length` counts positions whose keys and values are complete in every block. Writing past it is done block
    by block inside `reserve` … `commit`; what was written but not committed counts for nothing.
    """

    def __init__(self, n_blocks: int, n_kv_heads: int, head_dim: int) -> None:
        self.length = 0
        self._page_shape = (n_blocks, 2, n_kv_heads, PAGE_POSITIONS, head_dim)
        self._pages: list[F32] = []

    @property
    def n_bytes(self) -> int:
        """Bytes of all pages held now."""
        return sum(page.nbytes for page in self._pages)

    def reserve(self, stop: int) -> None:
        """Makes room for positions up to `stop`."""
        while len(self._pages) * PAGE_POSITIONS < stop:
            self._pages.append(np.zeros(self._page_shape, dtype=np.float32))

    def write(self, block: int, start: int, keys: F32, values: F32) -> None:
        """Stores keys and values [count, n_kv_heads, head_dim] of positions from `start` on."""
        done, count = 0, keys.shape[0]
        while done < count:
            page, slot = divmod(start + done, PAGE_POSITIONS)
            taken = min(PAGE_POSITIONS - slot, count - done)
            target = self._pages[page][block, :, :, slot : slot + taken]
            target[0] = keys[done : done + taken].swapaxes(0, 1)
            target[1] = values[done : done + taken].swapaxes(0, 1)
            done += taken

    def pages(self, block: int, stop: int) -> Sequence[tuple[F32, F32]]:
        """Views of the keys and the values [n_kv_heads, PAGE_POSITIONS, head_dim] of each page up to
        `stop`."""
        needed = -(-stop // PAGE_POSITIONS)
        return [(page[block, 0], page[block, 1]) for page in self._pages[:needed]]

    def commit(self, stop: int) -> None:
        """Counts positions up to `stop` as complete."""
        self.length = stop

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on, also what was never committed, and frees the pages that hold
        none of the rest."""
        self.length = min(self.length, length)
        kept, slot = divmod(self.length, PAGE_POSITIONS)
        if slot and kept < len(self._pages):
            self._pages[kept][:, :, :, slot:] = 0.0
        del self._pages[kept + (slot > 0) :]
