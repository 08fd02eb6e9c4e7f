"""Keys and values for ONNX Runtime: sequences are slots of one buffer for each block.

GroupQueryAttention wants one tensor [slots, n_kv_heads, capacity, head_dim] for a batch and appends in
place. Each tensor is reserved at its full capacity in memory of its own that nobody has touched, which costs
nothing: the system gives it page by page as positions are written, and takes it back when they are forgotten.
So nothing is ever copied. Knows nothing of attention or of what a sequence is.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

from dgn_backends.errors import LimitError
from dgn_backends.reserved import reserve

_FIRST_SLOTS = 4
#: With heads of a multiple of 16 floats, this many positions of a head are a whole number of memory pages.
CAPACITY_MULTIPLE = mmap.PAGESIZE // 64


class SlotPool:
    """Slots of `capacity` positions for `n_blocks` blocks in f32; `head_dim` is a multiple of 16.

    `generation` rises when the buffers have moved in the address space.
    """

    def __init__(self, n_blocks: int, n_kv_heads: int, head_dim: int, capacity: int) -> None:
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.capacity = -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        self.generation = 0
        self._n_slots = 0
        self._free: set[int] = set()
        self._maps: list[mmap.mmap] = []  # keys of block 0, values of block 0, keys of block 1, …
        self._n_maps = 2 * n_blocks
        self._head_bytes = self.capacity * head_dim * 4
        self._slot_bytes = n_kv_heads * self._head_bytes

    def take(self) -> int:
        """The lowest free slot; neighbours make the best batches. Raises LimitError where the address space
        ends."""
        if not self._free:
            self._grow()
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Frees a slot and its memory."""
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)
        self._free.add(slot)

    def forget(self, slot: int, blocks: Iterable[int], kept: int, held: int) -> None:
        """Gives back the whole memory pages that hold only positions from `kept` on, of the `held` ones."""
        start, stop = self._pages(kept), self._pages(held)
        if start >= stop:
            return
        for block in blocks:
            for memory in self._maps[2 * block : 2 * block + 2]:
                for head in range(self.n_kv_heads):
                    offset = slot * self._slot_bytes + head * self._head_bytes
                    memory.madvise(mmap.MADV_DONTNEED, offset + start, stop - start)

    def n_bytes(self, n_blocks: int, positions: int) -> int:
        """Bytes that so many positions of a slot take in so many blocks."""
        return 2 * n_blocks * self.n_kv_heads * self._pages(positions)

    def address(self, block: int, values: bool, slot: int) -> int:
        """Where the keys or the values of `block` of the slots from `slot` on begin."""
        memory = self._maps[2 * block + values]
        return ctypes.addressof(ctypes.c_char.from_buffer(memory)) + slot * self._slot_bytes

    def _pages(self, positions: int) -> int:
        """Bytes of the memory pages of one head that hold so many positions."""
        return -(-positions * self.head_dim * 4 // mmap.PAGESIZE) * mmap.PAGESIZE

    def _grow(self) -> None:
        wanted = 2 * self._n_slots or _FIRST_SLOTS
        try:
            while len(self._maps) < self._n_maps:
                self._maps.append(reserve(wanted * self._slot_bytes))
            for memory in self._maps:
                if len(memory) < wanted * self._slot_bytes:
                    memory.resize(wanted * self._slot_bytes)  # moves in the address space alone
        except (OSError, ValueError, MemoryError) as error:
            raise LimitError(
                f"no room in the address space for {wanted} sequences of {self.capacity:,} positions, "
                f"{self._n_maps * wanted * self._slot_bytes:,} bytes: {error}; raise its limit (ulimit -v), "
                "or open fewer sequences"
            ) from error
        self._free.update(range(self._n_slots, wanted))
        self._n_slots = wanted
        self.generation += 1
