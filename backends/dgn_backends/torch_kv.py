"""One sequence's keys and values in torch, which never move as it grows.

On a CPU they lie in one piece, in addresses that are reserved for all of the sequence and take memory as they
are written; elsewhere in pages that are made as it grows. Knows nothing of attention, of rotary embedding, or
of other sequences.
"""

from __future__ import annotations

import math
import mmap
from typing import Protocol

import torch

from dgn_backends.errors import LimitError
from dgn_backends.reserved import reserve

#: Positions in a page, by which room grows; also the tile in which attention in f32 works along the keys,
#: whatever the length, so that the order of its sums depends on a position alone.
PAGE_POSITIONS = 256


class TorchKV(Protocol):
    """Keys and values of some blocks. Slots that hold nothing are zero, so that what multiplies them stays
    finite. `length` counts complete positions, `room` those that there is a place for: whole pages."""

    length: int
    n_kv_heads: int
    in_one_piece: bool

    @property
    def room(self) -> int:
        """Positions."""

    def n_bytes(self) -> int:
        """Bytes of the pages held now."""

    def reserve(self, stop: int) -> None:
        """Makes room for positions up to `stop`. Raises LimitError when there is no memory for it."""

    def held(self, block: int, first: int, stop: int) -> torch.Tensor:
        """A view [2, n_kv_heads, stop - first, head_dim] (first the keys) of positions within the room: any
        of them in one piece, else such as are in one page."""

    def write(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [count, n_kv_heads, head_dim] of the positions from `start` on."""

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on; whole pages are given back, the rest of the last one is
        cleared."""


def new_kv(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, total_positions: int
) -> TorchKV:
    """An empty cache for blocks of `shape` [n_blocks, n_kv_heads, head_dim] that never grows beyond
    `total_positions`. Pages stand in where the system gives no addresses, or its own pages are too large."""
    if device.type == "cpu" and MappedKV.fits(shape, dtype):
        try:
            return MappedKV(shape, dtype, total_positions)
        except (OSError, ValueError, MemoryError):
            pass  # a limit on addresses: pages need no more of them than of memory
    return PagedKV(shape, dtype, device)


class MappedKV:
    """See `TorchKV`: one tensor [n_blocks, 2, n_kv_heads, capacity, head_dim] in reserved memory."""

    in_one_piece = True

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, total_positions: int) -> None:
        """Raises OSError, ValueError or MemoryError where the system does not give the addresses."""
        n_blocks, self.n_kv_heads, head_dim = shape
        self.length = 0
        self._room = 0
        self._capacity = _whole_pages(total_positions)
        self._row_bytes = head_dim * dtype.itemsize
        self._n_runs = n_blocks * 2 * self.n_kv_heads  # runs of positions that lie together
        self._memory = reserve(self._n_runs * self._capacity * self._row_bytes)
        flat = torch.frombuffer(self._memory, dtype=dtype)
        self._numbers = flat.view(n_blocks, 2, self.n_kv_heads, self._capacity, head_dim)

    @staticmethod
    def fits(shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
        """Whether there is something to keep, and a page of ours consists of whole pages of the system."""
        n_blocks, _, head_dim = shape
        return n_blocks > 0 and PAGE_POSITIONS * head_dim * dtype.itemsize % mmap.PAGESIZE == 0

    @property
    def room(self) -> int:
        """See the protocol."""
        return self._room

    def n_bytes(self) -> int:
        """See the protocol."""
        return self._n_runs * self._room * self._row_bytes

    def reserve(self, stop: int) -> None:
        """See the protocol. The memory itself is taken when it is written."""
        assert stop <= self._capacity
        self._room = max(self._room, _whole_pages(stop))

    def held(self, block: int, first: int, stop: int) -> torch.Tensor:
        """See the protocol."""
        return self._numbers[block, :, :, first:stop]

    def write(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See the protocol."""
        room = self._numbers[block, :, :, start : start + keys.shape[0]]
        room[0].copy_(keys.transpose(0, 1))
        room[1].copy_(values.transpose(0, 1))

    def truncate(self, length: int) -> None:
        """See the protocol."""
        self.length = min(self.length, length)
        kept = _whole_pages(self.length)
        if kept < self._room:
            for run in range(self._n_runs):
                offset = (run * self._capacity + kept) * self._row_bytes
                self._memory.madvise(mmap.MADV_DONTNEED, offset, (self._room - kept) * self._row_bytes)
            self._room = kept
        if self.length < kept:
            self._numbers[:, :, :, self.length : kept].zero_()


class PagedKV:
    """See `TorchKV`: a page is one tensor [n_blocks, 2, n_kv_heads, PAGE_POSITIONS, head_dim]."""

    in_one_piece = False

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        n_blocks, self.n_kv_heads, head_dim = shape
        self.length = 0
        self._pages: list[torch.Tensor] = []
        self._shape = (n_blocks, 2, self.n_kv_heads, PAGE_POSITIONS, head_dim)
        self._page_bytes = math.prod(self._shape) * dtype.itemsize
        self._dtype = dtype
        self._device = device

    @property
    def room(self) -> int:
        """See the protocol."""
        return len(self._pages) * PAGE_POSITIONS

    def n_bytes(self) -> int:
        """See the protocol."""
        return len(self._pages) * self._page_bytes

    def reserve(self, stop: int) -> None:
        """See the protocol."""
        while self._page_bytes and self.room < stop:
            try:
                self._pages.append(self._new_page())
            except (OSError, MemoryError, torch.OutOfMemoryError) as error:
                raise LimitError(
                    f"no memory on {self._device} for a KV page of {self._page_bytes:,} bytes "
                    f"after {self.n_bytes():,} bytes of this sequence",
                    needed=self._page_bytes,
                    held=self.n_bytes(),
                ) from error

    def held(self, block: int, first: int, stop: int) -> torch.Tensor:
        """See the protocol."""
        page, slot = divmod(first, PAGE_POSITIONS)
        assert slot + stop - first <= PAGE_POSITIONS
        return self._pages[page][block, :, :, slot : slot + stop - first]

    def write(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See the protocol."""
        done, count = 0, keys.shape[0]
        while done < count:
            taken = min(PAGE_POSITIONS - (start + done) % PAGE_POSITIONS, count - done)
            room = self.held(block, start + done, start + done + taken)
            room[0].copy_(keys[done : done + taken].transpose(0, 1))
            room[1].copy_(values[done : done + taken].transpose(0, 1))
            done += taken

    def truncate(self, length: int) -> None:
        """See the protocol."""
        self.length = min(self.length, length)
        del self._pages[-(-self.length // PAGE_POSITIONS) :]
        if self._pages and self.length % PAGE_POSITIONS:
            self._pages[-1][:, :, :, self.length % PAGE_POSITIONS :].zero_()

    def _new_page(self) -> torch.Tensor:
        if self._device.type == "cpu":
            # Straight from the system: zero, without memory until it is written, and given back at once
            # when it is dropped, whatever else the allocator holds.
            memory = torch.frombuffer(mmap.mmap(-1, self._page_bytes), dtype=self._dtype)
            return memory.view(self._shape)
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)


def _whole_pages(positions: int) -> int:
    """`positions` rounded up to whole pages."""
    return -(-positions // PAGE_POSITIONS) * PAGE_POSITIONS
