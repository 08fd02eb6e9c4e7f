"""One sequence's keys and values in torch: pages that are made as it grows and never move.

Knows nothing of attention, of rotary embedding, or of other sequences.
"""

from __future__ import annotations

import math
import mmap

import torch

from dgn_backends.errors import LimitError

#: Positions in a page; also the tile in which attention works along the keys, whatever the length, so that
#: the order of its sums depends on a position alone.
PAGE_POSITIONS = 256


class TorchKV:
    """Keys and values of `n_blocks` blocks in `dtype`.

    A page is one tensor [n_blocks, 2, n_kv_heads, PAGE_POSITIONS, head_dim] (index 0 of the second axis:
    keys). Slots that hold nothing are zero, so that what multiplies them stays finite. `length` counts
    complete positions."""

    def __init__(
        self, n_blocks: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length = 0
        self.pages: list[torch.Tensor] = []
        self._shape = (n_blocks, 2, n_kv_heads, PAGE_POSITIONS, head_dim)
        self._dtype = dtype
        self._device = device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return math.prod(self._shape) * self._dtype.itemsize

    def n_bytes(self) -> int:
        """Bytes of all pages held now."""
        return len(self.pages) * self.page_bytes

    def reserve(self, stop: int) -> None:
        """Makes room for positions up to `stop`. Raises LimitError when there is no memory for it."""
        while self.page_bytes and len(self.pages) * PAGE_POSITIONS < stop:
            try:
                self.pages.append(self._new_page())
            except (OSError, MemoryError, torch.OutOfMemoryError) as error:
                raise LimitError(
                    f"no memory on {self._device} for a KV page of {self.page_bytes:,} bytes "
                    f"after {self.n_bytes():,} bytes of this sequence",
                    needed=self.page_bytes,
                    held=self.n_bytes(),
                ) from error

    def write(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [count, n_kv_heads, head_dim] of the positions from `start` on."""
        done, count = 0, keys.shape[0]
        while done < count:
            page, slot = divmod(start + done, PAGE_POSITIONS)
            taken = min(PAGE_POSITIONS - slot, count - done)
            room = self.pages[page][block, :, :, slot : slot + taken]
            room[0].copy_(keys[done : done + taken].transpose(0, 1))
            room[1].copy_(values[done : done + taken].transpose(0, 1))
            done += taken

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on; whole pages are given back, the rest of the last one is
        cleared."""
        self.length = min(self.length, length)
        del self.pages[-(-self.length // PAGE_POSITIONS) :]
        if self.pages and self.length % PAGE_POSITIONS:
            self.pages[-1][:, :, :, self.length % PAGE_POSITIONS :].zero_()

    def _new_page(self) -> torch.Tensor:
        if self._device.type == "cpu":
            # Straight from the system: zero, without memory until it is written, and given back at once
            # when it is dropped, whatever else the allocator holds.
            memory = torch.frombuffer(mmap.mmap(-1, self.page_bytes), dtype=self._dtype)
            return memory.view(self._shape)
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
