"""The bytes that a worker's KV caches may take, and who holds how many. Policy alone: it counts positions, in
pages as backends take them, and knows nothing of backends or of frames.
"""

from __future__ import annotations

from dgn_backends.errors import LimitError

#: Memory is counted in pages of as many positions, about what backends take at once.
PAGE_POSITIONS = 256
#: The part of the available memory that KV takes where no budget is given.
AUTOMATIC_SHARE = 0.8


class KVBudget:
    """`total` bytes for all sequences of one worker; 0 is no limit."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Bytes that are spoken for now."""
        return sum(self._held.values())

    def reserve(self, sequence: int, positions: int, bytes_per_position: int, most: int) -> None:
        """Makes the sequence's share that of `positions`, more or fewer than before; it never grows beyond
        `most` positions. Raises LimitError, and changes nothing, where that is beyond the budget."""
        pages = -(-positions // PAGE_POSITIONS)
        wanted = min(pages * PAGE_POSITIONS, max(most, positions)) * bytes_per_position
        others = self.held - self._held.get(sequence, 0)
        if self.total and wanted > self._held.get(sequence, 0) and others + wanted > self.total:
            raise LimitError(
                f"{positions:,} positions need {wanted:,} bytes of KV cache; of the {self.total:,} bytes "
                f"that it may take here, other sessions hold {others:,}; try again when they have ended, "
                "or raise kv_bytes in [models.NAME]",
                needed=wanted,
                budget=self.total,
                held=others,
            )
        self._held[sequence] = wanted

    def release(self, sequence: int) -> None:
        """The sequence is closed."""
        self._held.pop(sequence, None)
