"""What a hop's dgnd keeps of the results that it passed on, so that it can send them again. Sans-IO.

A journal holds one hop's results from `begins` to its end without a gap, in the encoding in which they were
sent. All journals of a node share a budget of bytes; when it is used up, the journal longest unused forgets
what it has. Nothing is lost by that: what a journal lacks is computed again from an earlier hop or from the
token ids. Knows nothing of peers, routes or branches.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict

import msgspec

from dgn_backends.tensor import Tensor
from dgnd.errors import JournalGone
from dgnd.wire.messages import HopKey, StepFrame

#: What a kept step weighs beyond its tensor's bytes, about.
ENTRY_BYTES = 400


class Kept(msgspec.Struct, frozen=True):
    """The results of positions `[start, stop)`: hidden states [stop - start, hidden_size]."""

    start: int
    stop: int
    digest_start: int
    digest_end: int
    rows: Tensor

    @property
    def bytes(self) -> int:
        """What it is charged with."""
        return len(self.rows.data) + ENTRY_BYTES


class Journal:
    """One hop's results."""

    def __init__(self) -> None:
        self.bytes = 0
        self._kept: list[Kept] = []
        self._stop = 0

    @property
    def begins(self) -> int:
        """The first position that it holds; its end when it is empty."""
        return self._kept[0].start if self._kept else self._stop

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self._stop

    def append(self, kept: Kept) -> None:
        """Adds what follows; after a gap only that is kept."""
        if kept.start != self._stop:
            self.forget()
        self._kept.append(kept)
        self._stop = kept.stop
        self.bytes += kept.bytes

    def truncate(self, length: int) -> None:
        """Drops what goes beyond `length`, in whole steps."""
        while self._kept and self._kept[-1].stop > length:
            self.bytes -= self._kept.pop().bytes
        self._stop = self._kept[-1].stop if self._kept else min(self._stop, length)

    def forget(self) -> None:
        """Gives its memory back; what comes next is kept again."""
        self._kept.clear()
        self.bytes = 0

    def read(self, start: int, stop: int) -> Kept:
        """Positions `[start, stop)`, both of them ends of kept steps, in one piece.

        Raises JournalGone where it has them not.
        """
        first = bisect.bisect_left(self._kept, start, key=lambda kept: kept.start)
        last = bisect.bisect_left(self._kept, stop, key=lambda kept: kept.stop)
        parts = self._kept[first : last + 1]
        if not parts or (parts[0].start, parts[-1].stop) != (start, stop):
            raise JournalGone(
                f"the results of positions {start} to {stop - 1} are no longer kept; "
                f"there are {self.begins} to {self.stop - 1}",
                begins=self.begins,
            )
        return Kept(start, stop, parts[0].digest_start, parts[-1].digest_end, _joined(parts))


class JournalBook:
    """All journals of a node, within `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._journals: OrderedDict[HopKey, Journal] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._journals)

    def keep(self, key: HopKey, step: StepFrame, rows: Tensor) -> None:
        """Notes what a hop computed, and makes room for it."""
        journal = self._journals.setdefault(key, Journal())
        self._journals.move_to_end(key)
        self.bytes -= journal.bytes
        journal.append(Kept(step.start, step.stop, step.digest_start, step.digest_end, rows))
        self.bytes += journal.bytes
        self._make_room()

    def limit(self, max_bytes: int) -> None:
        """Another budget; what is beyond it is forgotten."""
        self.max_bytes = max_bytes
        self._make_room()

    def _make_room(self) -> None:
        for oldest in self._journals.values():
            if self.bytes <= self.max_bytes:
                break
            self.bytes -= oldest.bytes
            oldest.forget()

    def truncate(self, key: HopKey, length: int) -> None:
        """The hop's results go no further than `length` any more."""
        journal = self._journals.get(key)
        if journal is not None:
            self.bytes -= journal.bytes
            journal.truncate(length)
            self.bytes += journal.bytes

    def read(self, key: HopKey, start: int, stop: int) -> Kept:
        """As `Journal.read`, of one hop."""
        journal = self._journals.get(key, Journal())
        if key in self._journals:
            self._journals.move_to_end(key)
        return journal.read(start, stop)

    def drop(self, key: HopKey) -> None:
        """The hop is closed."""
        journal = self._journals.pop(key, None)
        if journal is not None:
            self.bytes -= journal.bytes


def _joined(parts: list[Kept]) -> Tensor:
    """One tensor of all rows."""
    if len(parts) == 1:
        return parts[0].rows
    dtype, shape = parts[0].rows.dtype, parts[0].rows.shape
    count = sum(part.rows.shape[0] for part in parts)
    return Tensor(dtype, (count, *shape[1:]), b"".join(part.rows.data for part in parts))
