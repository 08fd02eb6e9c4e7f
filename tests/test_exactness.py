"""Which answers count as those that a node would give alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dgnd.exactness import Exactness, Way

WAY = Way("none", "f32", "reference numpy=2 cpu=x", row_invariant=True)


def test_a_line_that_computes_alike_is_exact_whatever_its_processors() -> None:
    exactness = Exactness()
    assert exactness.holds  # nothing computed yet
    exactness.through({0: WAY, 1: WAY, 2: replace(WAY, numerics="reference numpy=2 cpu=y")}, begun=False)
    assert exactness.holds


@pytest.mark.parametrize("other", [replace(WAY, quant="int8"), replace(WAY, dtype="bf16"), None])
def test_one_part_of_another_kind_is_enough(other: Way | None) -> None:
    for line in ({0: WAY, 1: other}, {0: other, 1: WAY}):
        exactness = Exactness()
        exactness.through(line, begun=False)
        assert not exactness.holds
        exactness.through({0: WAY, 1: WAY}, begun=True)
        assert not exactness.holds  # it never comes back


@pytest.mark.parametrize(
    ("way", "exact"),
    [(WAY, True), (replace(WAY, numerics="another"), False), (replace(WAY, row_invariant=False), False)],
)
def test_a_replacement_has_to_go_on_with_the_same_numbers(way: Way, exact: bool) -> None:
    exactness = Exactness()
    exactness.through({0: WAY, 1: WAY}, begun=False)
    exactness.through({0: WAY, 1: way}, begun=False)  # before the first token, anyone may take over
    assert exactness.holds
    exactness = Exactness()
    exactness.through({0: WAY, 1: WAY}, begun=False)
    exactness.through({0: WAY, 1: way}, begun=True)
    assert exactness.holds is exact


def test_rows_that_depend_on_their_batch_do_not_come_again() -> None:
    way = replace(WAY, row_invariant=False)
    exactness = Exactness()
    exactness.through({0: way}, begun=False)
    assert exactness.holds
    exactness.through({0: way}, begun=True)
    assert not exactness.holds
