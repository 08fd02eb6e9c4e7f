"""Through what the KV of a session's hops was computed: for every position and unit of the model, how that
unit computes and how those before it did at the time.

A hop that is replaced is filled again, but the hops after it keep what they made of its predecessor's
results. Where both compute alike, nobody can tell; where not, all that is computed on it is mixed, until
those positions are computed anew. Pure; knows nothing of hops.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from dgnd.routing.exactness import Line

#: What stands for how a unit and all before it computed.
_Path = bytes


@dataclass(slots=True)
class _Part:
    """The positions from `begin` to the next part."""

    begin: int
    paths: dict[int, _Path]  #: by unit


class Lineage:
    """Of one session."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []  # the last one is computed through the line as it is now
        self._times = itertools.count()

    @property
    def pure(self) -> bool:
        """Whether all KV is what the line as it is now would have computed from the beginning."""
        return all(part.paths == self._parts[-1].paths for part in self._parts)

    def through(self, line: Line, fresh: Collection[int], common: int) -> None:
        """From position `common` on, `line` computes. Its units in `fresh` have computed what is before, from
        what the units before them had made of it."""
        kept = [part for part in self._parts if part.begin < common]
        again = next(self._times)
        for part in kept:
            part.paths = _paths(line, part.paths, fresh, again)
        self._parts = kept
        self._go_on(common, _paths(line, {}, line.keys(), None))

    def truncate(self, length: int) -> None:
        """What is from `length` on comes again, through the line as it is."""
        if self._parts:
            now = self._parts[-1].paths
            self._parts = [part for part in self._parts if part.begin < length]
            self._go_on(length, now)

    def clear(self) -> None:
        """There is no KV any more."""
        self._parts.clear()

    def _go_on(self, begin: int, paths: dict[int, _Path]) -> None:
        parts = [*self._parts, _Part(begin, paths)]
        self._parts = parts[:1] + [b for a, b in itertools.pairwise(parts) if a.paths != b.paths]


def _paths(
    line: Line, kept: Mapping[int, _Path], fresh: Collection[int], again: int | None
) -> dict[int, _Path]:
    """By unit; those that are not `fresh` have what they have `kept`. `again`: the time at which the fresh
    ones computed something for a second time, which not all do alike."""
    paths: dict[int, _Path] = {}
    path = b""
    for unit, way in sorted(line.items()):
        if unit in fresh:
            time = "" if again is None or (way is not None and way.row_invariant) else again
            path = blake2b(path + f"{way} {time}".encode(), digest_size=16).digest()
        else:
            path = kept[unit]
        paths[unit] = path
    return paths
