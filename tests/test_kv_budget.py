"""The budget of KV bytes: who gets how much, and what is said to who gets none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgn_backends.errors import LimitError
from dgnd.worker.kv_budget import PAGE_POSITIONS, KVBudget


def test_pages_are_counted_and_never_more_than_the_sequence_can_hold() -> None:
    budget = KVBudget(10**9)
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
    budget = KVBudget(PAGE_POSITIONS * 10)
    for positions in range(1, PAGE_POSITIONS + 1):
        budget.reserve(1, positions, 10, 4096)
    with pytest.raises(LimitError, match=r"257 positions need 5,120 bytes .* the 2,560 bytes .* hold 0;"):
        budget.reserve(1, PAGE_POSITIONS + 1, 10, 4096)
    budget.reserve(1, PAGE_POSITIONS, 10, 4096)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3000)), max_size=60), st.integers(1, 100_000))
def test_the_budget_is_kept_whatever_is_asked(asked: list[tuple[int, int]], total: int) -> None:
    budget = KVBudget(total)
    for sequence, positions in asked:
        before = budget.held
        refused = False
        try:
            budget.reserve(sequence, positions, 7, 2000)
        except LimitError:
            refused = True
        assert budget.held <= total
        assert budget.held == before or not refused
