"""The budget of KV bytes: who gets how much, and what is said to who gets none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgn_backends.errors import LimitError, NoRoomNow
from dgnctl.speeds import speed_table
from dgnd.control.api import Figures, NodeFigures
from dgnd.sessions.kv_room import KvRoom
from dgnd.worker.kv_budget import PAGE_POSITIONS, KVBudget


def test_pages_are_counted_and_never_more_than_the_sequence_can_hold() -> None:
    budget = KVBudget[int](10**9)
    budget.reserve(1, 1, 10, 4096)
    assert budget.held == PAGE_POSITIONS * 10
    budget.reserve(1, PAGE_POSITIONS + 1, 10, 4096)
    assert budget.held == 2 * PAGE_POSITIONS * 10
    budget.reserve(2, 5, 10, 64)
    assert budget.held == (2 * PAGE_POSITIONS + 64) * 10
    budget.reserve(1, 3, 10, 4096)  # after a rollback
    budget.release(2)
    budget.release(7)  # one that never computed
    assert budget.held == PAGE_POSITIONS * 10


def test_growth_within_a_page_is_never_refused() -> None:
    budget = KVBudget[int](PAGE_POSITIONS * 10)
    for positions in range(1, PAGE_POSITIONS + 1):
        budget.reserve(1, positions, 10, 4096)
    with pytest.raises(LimitError, match=r"257 .* 5,120 bytes .* 2,560 bytes here; raise memory") as no:
        budget.reserve(1, PAGE_POSITIONS + 1, 10, 4096)
    assert not no.value.retryable
    assert "again" not in no.value.message
    budget.reserve(1, PAGE_POSITIONS, 10, 4096)


def test_where_no_session_has_room_that_is_said() -> None:
    with pytest.raises(LimitError, match=r"it may take 0 bytes here; raise memory"):
        KVBudget[int](1).reserve(1, 1, 10, 4096)
    with pytest.raises(LimitError, match=r"^attic has no room for any session: .* take 0 bytes; raise") as no:
        KvRoom(0, 1, "attic").after(9)
    assert "shorten" not in no.value.message


def test_the_one_idle_for_longest_gives_way_and_only_as_many_as_needed() -> None:
    budget = KVBudget[str](4 * PAGE_POSITIONS)
    for name in ("a", "b", "c", "d"):
        assert budget.reserve(name, 1, 1, 4096) == []
    for name in ("c", "a", "b", "never seen"):
        budget.idle(name)
    budget.idle("c")  # said again, it is not idle for less long
    budget.busy("b")
    assert budget.reserve("e", 1, 1, 4096) == ["c"]
    budget.idle("b")
    assert budget.reserve("d", PAGE_POSITIONS + 1, 1, 4096) == ["a"]
    with pytest.raises(NoRoomNow, match=r"769 positions .* answering hold 512, 512 are free; try") as no:
        budget.reserve("e", 3 * PAGE_POSITIONS + 1, 1, 4096)  # also without "b", d's two pages are in the way
    assert no.value.retryable
    assert budget.held == budget.total  # and "b" has kept its own
    assert budget.reserve("b", 5, 1, 4096) == []


def test_a_budget_that_became_smaller_than_what_answers_hold_has_nothing_free() -> None:
    budget = KVBudget[str](PAGE_POSITIONS * 4)
    budget.reserve("a", 3 * PAGE_POSITIONS, 1, 4096)
    budget.total = PAGE_POSITIONS * 2
    with pytest.raises(NoRoomNow, match=r"answering hold 768, 0 are free; try again"):
        budget.reserve("b", 1, 1, 4096)


@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 1000))
def test_the_most_positions_are_those_that_a_sequence_alone_gets(total: int, size: int, most: int) -> None:
    fitting = KVBudget[int](total).most_positions(size, most)
    assert 0 <= fitting <= most
    KVBudget[int](total).reserve(1, fitting, size, most)
    if fitting < most:
        with pytest.raises(LimitError):
            KVBudget[int](total).reserve(1, fitting + 1, size, most)


Asked = tuple[int, int | None]  # a sequence, and what it reserves; None: it becomes idle


@given(
    st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 3000)), max_size=60),
    st.integers(1, 100_000),
)
def test_the_budget_is_kept_whatever_is_asked(asked: list[Asked], total: int) -> None:
    budget = KVBudget[int](total)
    idle: set[int] = set()
    for sequence, positions in asked:
        before = budget.held
        if positions is None:
            budget.idle(sequence)
            idle.add(sequence)
            continue
        idle.discard(sequence)
        try:
            gone = budget.reserve(sequence, positions, 7, 2000)
        except LimitError:
            assert budget.held == before
        else:
            assert set(gone) <= idle
            idle -= set(gone)
        assert budget.held <= total


def test_spans_without_blocks_have_no_room_to_show() -> None:
    figures = [Figures("0-3", 1.0, 1.0, 0.0, 700), Figures("embed,head", 1.0, 1.0, 0.0, 17_737_125_068)]
    shown = speed_table([NodeFigures("tiny", "12D3", "attic", 2.0, figures)]).splitlines()
    assert shown[1].split()[-2:] == ["700", "2.0"]
    assert shown[2].split()[-2:] == ["-", "2.0"]
