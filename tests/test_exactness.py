"""Which answers count as those that a node would give alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dgnd.routing.exactness import Exactness, Line, Way, difference, kinds

WAY = Way("none", "f32", "reference numpy=2 cpu=x", row_invariant=True)


def through(exactness: Exactness, line: Line, *, begun: bool, pure: bool = True) -> bool:
    exactness.through(line, pure=pure, begun=begun)
    return exactness.holds


def test_a_line_that_computes_alike_is_exact_whatever_its_processors() -> None:
    exactness = Exactness()
    assert exactness.holds  # nothing computed yet
    line = {0: WAY, 1: WAY, 2: replace(WAY, numerics="reference numpy=2 cpu=y")}
    assert through(exactness, line, begun=False)


@pytest.mark.parametrize("other", [replace(WAY, quant="int8"), replace(WAY, dtype="bf16"), None])
def test_one_part_of_another_kind_is_enough(other: Way | None) -> None:
    for line in ({0: WAY, 1: other}, {0: other, 1: WAY}):
        exactness = Exactness()
        assert not through(exactness, line, begun=False)
        assert not through(exactness, {0: WAY, 1: WAY}, begun=True)  # it never comes back


def test_what_gave_no_token_does_not_count() -> None:
    exactness = Exactness()
    assert not exactness.would_hold({0: replace(WAY, quant="int8"), 1: WAY}, pure=True, begun=False)
    assert through(exactness, {0: WAY, 1: WAY}, begun=False)
    assert not exactness.would_hold({0: replace(WAY, numerics="another"), 1: WAY}, pure=True, begun=True)
    assert through(exactness, {0: WAY, 1: WAY}, begun=True)


@pytest.mark.parametrize(
    ("way", "exact"),
    [(WAY, True), (replace(WAY, numerics="another"), False), (replace(WAY, row_invariant=False), False)],
)
def test_a_replacement_has_to_go_on_with_the_same_numbers(way: Way, exact: bool) -> None:
    exactness = Exactness()
    through(exactness, {0: WAY, 1: WAY}, begun=False)
    assert through(exactness, {0: WAY, 1: way}, begun=False)  # before the first token, anyone may take over
    exactness = Exactness()
    through(exactness, {0: WAY, 1: WAY}, begun=False)
    assert through(exactness, {0: WAY, 1: way}, begun=True) is exact


def test_kv_of_another_line_is_enough() -> None:
    assert not through(Exactness(), {0: WAY}, begun=False, pure=False)


def test_rows_that_depend_on_their_batch_do_not_come_again() -> None:
    way = replace(WAY, row_invariant=False)
    exactness = Exactness()
    assert through(exactness, {0: way}, begun=False)
    assert not through(exactness, {0: way}, begun=True)


def test_what_may_be_in_a_line_together_is_what_can_replace_each_other_first() -> None:
    other_cpu, loose = replace(WAY, numerics="another"), replace(WAY, row_invariant=False)
    small = replace(WAY, quant="int8")
    first, *_, last = kinds([WAY, other_cpu, loose, small, WAY])
    assert set(first) == {frozenset({way}) for way in (WAY, other_cpu, small)}
    assert set(last) == {frozenset({WAY, other_cpu, loose}), frozenset({small})}
    assert kinds([]) == []


def test_what_keeps_a_node_from_taking_another_ones_place_is_said() -> None:
    assert difference(replace(WAY, quant="int8"), WAY) == "quant int8, not none"
    assert difference(replace(WAY, dtype="bf16"), WAY) == "dtype bf16, not f32"
    assert difference(replace(WAY, numerics="other"), WAY) == "numerics other, not reference numpy=2 cpu=x"
    assert "what else it computes" in difference(replace(WAY, row_invariant=False), WAY)
