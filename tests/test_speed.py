"""What a worker says of its speed: it follows the machine, ages, and is never the same for ever."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.routing.search import BESIDE
from dgnd.worker.speed import (
    BEST_S,
    LOAD_S,
    LONGEST_REST_S,
    REST_S,
    TELLING,
    Figure,
    Load,
    Speed,
    StepWork,
)


def steps(figure: Figure, ms: float, now: float, count: int = 20, every_s: float = 0.1) -> float:
    """So many measurements alike; the time after them."""
    for _ in range(count):
        figure.take(ms, now)
        now += every_s
    return now


@pytest.fixture
def figure() -> Figure:
    return Figure(keep=15, least=5)


def test_nothing_is_said_before_enough_is_measured(figure: Figure) -> None:
    assert figure.said(0.0) is None
    now = steps(figure, 10.0, 0.0, 4)
    assert figure.said(now) is None
    now = steps(figure, 10.0, now, 1)
    assert figure.said(now) == 10.0


def test_a_machine_that_became_slower_says_so_within_some_steps(figure: Figure) -> None:
    now = steps(figure, 10.0, 0.0, 1000)
    now = steps(figure, 100.0, now, 8)
    assert figure.said(now) == 100.0
    assert figure.said(now + REST_S / 2) == 100.0


def test_a_hiccup_counts_for_nothing(figure: Figure) -> None:
    now = steps(figure, 10.0, 0.0)
    now = steps(figure, 5000.0, now, 3)
    assert figure.said(now) == 10.0


def test_who_rests_says_its_best_figure_again_and_the_rests_grow_while_it_disappoints(figure: Figure) -> None:
    now = steps(figure, 10.0, 0.0)
    now = steps(figure, 100.0, now)
    rests = []
    for _ in range(8):
        ended = now
        while figure.said(now) != 10.0:
            assert figure.said(now) == 100.0
            now += 1.0
        rests.append(now - ended)
        now = steps(figure, 100.0, now)  # it is tried, and still slow
    assert rests[0] == pytest.approx(REST_S, abs=2)
    assert all(b == pytest.approx(min(2 * a, LONGEST_REST_S), abs=3) for a, b in itertools.pairwise(rests))
    assert rests[-1] == pytest.approx(LONGEST_REST_S, abs=3)
    now = steps(figure, 11.0, now + LONGEST_REST_S)  # tried once more, and well again
    now = steps(figure, 100.0, now)
    assert figure.said(now + REST_S + 1) == 10.0  # the next rest is short


def test_the_first_steps_of_a_trial_change_nothing_yet(figure: Figure) -> None:
    now = steps(figure, 10.0, 0.0) + REST_S
    now = steps(figure, 100.0, now, 4)
    assert figure.said(now) == 10.0


def test_best_figures_age(figure: Figure) -> None:
    now = steps(figure, 10.0, 0.0)
    begun = now
    while now - begun < 2 * BEST_S + REST_S:
        now = steps(figure, 100.0, now, 5, 10.0)
    assert figure.said(now + REST_S + 1) == 100.0  # slow for so long: that is what it is


def test_what_nobody_measured_for_long_is_forgotten(figure: Figure) -> None:
    now = steps(figure, 10.0, 0.0)
    assert figure.said(now + BEST_S / 2) == 10.0
    assert figure.said(now + 3 * BEST_S) is None


@given(
    st.lists(
        st.tuples(st.floats(0.001, 1e5), st.floats(0.0, 3 * BEST_S), st.floats(0.0, 3 * BEST_S)), max_size=60
    )
)
def test_a_figure_is_always_one_that_was_measured(events: list[tuple[float, float, float]]) -> None:
    figure, now, least, most = Figure(keep=5, least=1), 0.0, math.inf, 0.0
    for ms, rest_s, later_s in events:
        now += rest_s
        figure.take(ms, now)
        least, most = min(least, ms), max(most, ms)
        for at in (now, now + later_s):
            said = figure.said(at)
            assert said is None or least <= said <= most
        assert figure.said(now) is not None
        now += later_s


def test_the_load_is_the_average_of_the_last_seconds() -> None:
    load, now = Load(), 0.0
    assert load.said(now) == 0.0
    for _ in range(1000):  # two sessions, half of the time
        load.worked(now, now + 0.05, 2)
        now += 0.1
    assert load.said(now) == pytest.approx(1.0, abs=0.05)
    assert load.said(now + 2 * LOAD_S) < 0.2
    load.worked(now, now + 100.0, 3)
    assert load.said(now + 100.0) == pytest.approx(3.0)


def decode(weight: float = 10.0, group: int = 1) -> StepWork:
    return StepWork(group, 1, weight, blocks=10)


def observed(works: list[StepWork], took_s: float) -> Speed:
    speed, now = Speed(), 100.0
    for _ in range(5):
        speed.observe(works, now, now + took_s, 0)
        now += took_s
    return speed


def test_a_step_is_measured_by_the_block() -> None:
    figures = observed([decode()], 0.05).said(100.5)
    assert figures.step_ms == pytest.approx(5.0)
    assert figures.prompt_ms is None


def test_what_others_beside_cost_is_not_counted_twice() -> None:
    """Who reads the figures adds the sessions at work there."""
    figures = observed([decode(), decode(), decode()], 0.05).said(100.25)
    assert figures.step_ms == pytest.approx(5.0 / (1 + 2 * BESIDE))
    apart = observed([decode(4.0, 1), decode(6.0, 2)], 0.05).said(100.25)
    assert apart.step_ms == pytest.approx(5.0)


def test_a_position_of_a_prompt_is_measured_where_the_batch_tells_it() -> None:
    chunk = StepWork(1, 100, 12.0, blocks=10)
    figures = observed([chunk, decode()], 1.01).said(105.0)
    assert figures.prompt_ms == pytest.approx(1.0)
    assert figures.step_ms is None
    assert observed([StepWork(1, TELLING - 1, 12.0, blocks=10)], 1.0).said(105.0).prompt_ms is None
    assert observed([StepWork(1, 100, 1.0, blocks=0)], 1.0).said(105.0).prompt_ms is None  # the head alone
