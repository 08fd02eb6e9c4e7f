"""`span = "auto"`: which contiguous units of a model a node takes, and when it changes its mind.

The choice is what others lack most: first what nobody has, then what one other has, and so on, each counted
in bytes, so that large ends are taken while there is room for them; of equal ones what the node has already,
then the first. What a node chose it says at once, before it has loaded it, so that
the next one chooses something else; who goes first follows from peer ids. A node leaves its choice for a
lasting gap alone, and only where that makes the gap much smaller; those that would are patient for different
times. Each such change leaves less missing than before, so they come to an end. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dgnd.models.sizes import Sizes

#: For peers of the configuration to be connected, before the first choice is made without them.
SETTLE_S = 5.0
#: For each node that chooses before this one.
TURN_S = 3.0
#: A gap that lasts for the shortest is closed by the first node that can; the others' patience ends later.
PATIENCE_S = (30.0, 45.0)


def choose(sizes: Sizes, most: int, others: Sequence[int], have: Collection[int] = ()) -> range | None:
    """The units to take, at most `most` bytes of weights; None where not even one fits or has its files here.

    `others`: how many other nodes have each unit, or are about to, [n_blocks + 2]. `have`: what this node
    has chosen before.
    """
    windows = [window for start in range(len(others)) if (window := _longest(sizes, most, start))]
    windows.sort(key=lambda window: set(window) != set(have))  # the first of equal ones wins
    return max(windows, key=lambda window: _lacked(sizes, window, others), default=None)


def _longest(sizes: Sizes, most: int, start: int) -> range:
    stop = start
    while stop in sizes.present and sizes.of(range(start, stop + 1)) <= most:
        stop += 1
    return range(start, stop)


def _lacked(sizes: Sizes, window: range, others: Sequence[int]) -> tuple[int, ...]:
    """For every number of other nodes, how much of the window has so few; larger is more lacked."""
    return tuple(
        sum(sizes.of_unit[unit] for unit in window if others[unit] == count)
        for count in range(max(others) + 1)
    )


def missing(others: Sequence[int], have: Collection[int]) -> frozenset[int]:
    """What neither the others nor this node have."""
    return frozenset(unit for unit, count in enumerate(others) if count == 0 and unit not in have)


def worth_changing(sizes: Sizes, others: Sequence[int], have: Collection[int], new: Collection[int]) -> bool:
    """Whether `new` instead of `have` leaves nothing missing, or less by at least half of what it has; in
    bytes."""
    before, after = (sum(sizes.of_unit[unit] for unit in missing(others, each)) for each in (have, new))
    gain = before - after
    return gain > 0 and (not after or 2 * gain >= sizes.of(new))


def patience_s(me: str, choosers: Iterable[str]) -> float:
    """How long a gap must last for the node `me`; `choosers`: all nodes that choose, with or without it."""
    order = sorted({me, *choosers})
    first, last = PATIENCE_S
    return first + (last - first) * order.index(me) / len(order)


def may_choose(me: str, waited_s: float, away: int, undecided: Collection[str]) -> bool:
    """Whether the first choice is made now: after `waited_s`, with so many peers of the configuration still
    away, and while the nodes `undecided` choose too and have not yet."""
    before = sum(peer < me for peer in undecided)
    return (not away and not before) or waited_s >= SETTLE_S + TURN_S * before
