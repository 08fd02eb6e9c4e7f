"""Through what KV was computed, and whether one line would have computed all of it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dgnd.routing.exactness import Line, Way
from dgnd.routing.lineage import Lineage

WAY = Way("none", "f32", "one", row_invariant=True)
OTHER = replace(WAY, numerics="other")
LOOSE = replace(WAY, row_invariant=False)


def opened(line: Line) -> Lineage:
    lineage = Lineage()
    lineage.through(line, line.keys(), 0)
    return lineage


def test_a_replacement_of_the_same_way_leaves_no_trace() -> None:
    lineage = opened({0: WAY, 1: WAY, 2: WAY})
    lineage.through({0: WAY, 1: WAY, 2: WAY}, {1}, 100)
    assert lineage.pure


def test_hops_after_one_of_another_way_hold_what_its_predecessor_made() -> None:
    lineage = opened({0: WAY, 1: WAY, 2: WAY})
    lineage.through({0: WAY, 1: OTHER, 2: WAY}, {1}, 100)
    assert not lineage.pure
    lineage.through({0: WAY, 1: OTHER, 2: WAY}, {2}, 200)  # filled again from what is journalled: all of it
    assert lineage.pure


def test_the_last_hop_is_all_that_depends_on_it() -> None:
    lineage = opened({0: WAY, 1: WAY})
    lineage.through({0: WAY, 1: OTHER}, {1}, 100)
    assert lineage.pure


def test_a_hop_that_filled_and_is_replaced_again_counts_where_others_computed_on_it() -> None:
    lineage = opened({0: WAY, 1: WAY})
    lineage.through({0: OTHER, 1: WAY}, {0}, 100)
    lineage.through({0: WAY, 1: WAY}, {0}, 100)  # nothing was computed through it
    assert lineage.pure
    lineage.through({0: OTHER, 1: WAY}, {0}, 100)
    lineage.through({0: WAY, 1: WAY}, {0}, 101)
    assert not lineage.pure
    lineage.truncate(100)
    assert lineage.pure  # its positions come again


def test_what_was_truncated_before_the_first_change_is_forgotten() -> None:
    lineage = opened({0: WAY, 1: WAY})
    lineage.through({0: OTHER, 1: WAY}, {0}, 100)
    lineage.truncate(0)
    assert lineage.pure
    lineage.clear()
    assert lineage.pure


def test_what_is_computed_twice_differs_where_rows_depend_on_their_batch() -> None:
    lineage = opened({0: LOOSE, 1: WAY})
    assert lineage.pure
    lineage.through({0: LOOSE, 1: WAY}, {1}, 10)  # from the same results
    assert lineage.pure
    lineage.through({0: LOOSE, 1: WAY}, {0}, 10)
    assert not lineage.pure


WAYS = st.sampled_from([WAY, OTHER])
CHANGES = st.tuples(st.sets(st.integers(0, 3)), st.integers(0, 8), st.integers(0, 6), WAYS)


@given(st.lists(CHANGES, max_size=12))
def test_it_says_what_computing_would_show(changes: list[tuple[set[int], int, int, Way]]) -> None:
    """Against KV itself: what unit u holds at a position is what it made of the results before it."""
    line: dict[int, Way] = dict.fromkeys(range(4), WAY)
    lineage = opened(line)
    kv: list[dict[int, object]] = []  # by position, by unit

    def compute(position: int) -> None:
        value: object = position
        kv[position:] = [{unit: (value := (value, line[unit])) for unit in line}]

    for fresh, back, ahead, way in changes:
        common = max(len(kv) - back, 0)
        del kv[common:]
        fresh = set(line) if common == 0 else fresh
        line.update(dict.fromkeys(fresh, way))
        lineage.through(line, fresh, common)
        for position, values in enumerate(kv):
            value: object = position
            for unit in line:
                values[unit] = (value, line[unit]) if unit in fresh else values[unit]
                value = values[unit]
        for position in range(common, common + ahead):
            compute(position)
        held = list(kv)
        for position in range(len(held)):
            compute(position)
        assert lineage.pure == (kv == held)
        kv = held
