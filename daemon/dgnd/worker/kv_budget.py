"""The bytes that a worker's KV caches may take, who holds how many, and who gives way.

Policy alone: it counts positions, in pages as backends take them, and knows nothing of backends or of frames.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from dgn_backends.errors import DataValue, LimitError, NoRoomNow

#: Memory is counted in pages of as many positions, about what backends take at once.
PAGE_POSITIONS = 256
#: The part of the available memory that KV takes where no budget is given.
AUTOMATIC_SHARE = 0.8

_REMEDY = "raise memory in [limits] (or kv_bytes, where it is set)"

Key = TypeVar("Key", bound=Hashable)


class KVBudget(Generic[Key]):
    """`total` bytes for all sequences of one worker; 0 is no limit, 1 stands for nothing. A sequence is busy
    from when it reserves until it is said to be idle; idle ones give way, the one idle for longest first,
    busy ones never."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: dict[Key, int] = {}
        self._idle: dict[Key, None] = {}  # in the order in which they became so

    @property
    def held(self) -> int:
        """Bytes that are spoken for now."""
        return sum(self._held.values())

    @property
    def busy_bytes(self) -> int:
        """Bytes of sequences that are not idle."""
        return self.held - sum(self._held[key] for key in self._idle)

    def most_positions(self, bytes_per_position: int, most: int) -> int:
        """Positions, of `most`, that one sequence gets where no other is busy."""
        fitting = self.total // bytes_per_position if self.total and bytes_per_position else most
        return most if fitting >= most else fitting - fitting % PAGE_POSITIONS

    def idle(self, sequence: Key) -> None:
        """The sequence's answer has ended; nobody waits for it."""
        if sequence in self._held:
            self._idle.setdefault(sequence)

    def busy(self, sequence: Key) -> None:
        """The sequence is worked on."""
        self._idle.pop(sequence, None)

    def reserve(self, sequence: Key, positions: int, bytes_per_position: int, most: int) -> list[Key]:
        """Makes the sequence's share that of `positions`, more or fewer than before; it never grows beyond
        `most` positions. Returns the idle sequences that had to give way and hold nothing any more.

        Raises LimitError, and changes nothing, for more than the whole budget; NoRoomNow where the busy ones
        leave too little of it."""
        self.busy(sequence)
        pages = -(-positions // PAGE_POSITIONS)
        wanted = min(pages * PAGE_POSITIONS, max(most, positions)) * bytes_per_position
        own = self._held.get(sequence, 0)
        gone: list[Key] = []
        if self.total and wanted > own:
            room = self.total - (self.held - own)
            idle = {key: self._held[key] for key in self._idle if self._held[key]}
            if wanted > room + sum(idle.values()):
                used = self.total - room - sum(idle.values())
                need = f"{positions:,} positions need {wanted:,} bytes of KV cache"
                numbers: dict[str, DataValue] = {"needed": wanted, "budget": self.total, "held": used}
                if wanted > self.total:
                    raise LimitError(
                        f"{need}; it may take {self.total if self.total > 1 else 0:,} bytes here; {_REMEDY}",
                        **numbers,
                    )
                raise NoRoomNow(
                    f"{need}; of the {self.total:,} bytes that it may take here, sessions that are answering "
                    f"hold {used:,}, {max(self.total - used, 0):,} are free; try again when they have ended, "
                    f"or {_REMEDY}",
                    **numbers,
                )
            for key, size in idle.items():
                if wanted <= room:
                    break
                room += size
                gone.append(key)
                self.release(key)
        self._held[sequence] = wanted
        return gone

    def limit(self, total: int) -> list[Key]:
        """Another `total`. Returns the idle sequences that had to give way and hold nothing any more; busy
        ones keep what they have."""
        self.total = total
        gone: list[Key] = []
        for key in [key for key in self._idle if self._held[key]]:
            if not total or self.held <= total:
                break
            gone.append(key)
            self.release(key)
        return gone

    def release(self, sequence: Key) -> None:
        """The sequence is closed."""
        self._held.pop(sequence, None)
        self._idle.pop(sequence, None)
