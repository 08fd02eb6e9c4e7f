"""The policy of `span = "auto"`, with values; and nodes that choose at once, on virtual time."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from sim.cluster import MODEL, N_BLOCKS, Log, SimCluster, read_once, tiny_model
from sim.determinism import run_seeded

from dgn_backends.hf_config import read_config
from dgn_backends.span import format_spans, parse_units
from dgn_backends.testing_models import make_tiny_llama
from dgnd.models.sizes import Sizes, read_sizes
from dgnd.upkeep.autospan import (
    PATIENCE_S,
    SETTLE_S,
    TURN_S,
    choose,
    may_choose,
    missing,
    patience_s,
    worth_changing,
)

UNITS = N_BLOCKS + 2


def sizes(*of_unit: int, shared: int = 0, lacking: tuple[int, ...] = ()) -> Sizes:
    return Sizes(of_unit, shared, frozenset(range(len(of_unit))).difference(lacking))


ALIKE = sizes(*[10] * 8)


@pytest.mark.parametrize(
    ("most", "others", "have", "chosen"),
    [
        (80, [0] * 8, (), range(8)),  # all of it, where it fits
        (30, [0] * 8, (), range(3)),  # of equal ones the first
        (30, [0] * 8, (4, 5, 6), range(4, 7)),  # or what it has
        (30, [1, 1, 1, 0, 0, 0, 0, 0], (), range(3, 6)),  # next to what others have
        (30, [1, 1, 1, 0, 0, 0, 0, 0], (0, 1, 2), range(3, 6)),
        (30, [1, 1, 0, 1, 1, 0, 1, 1], (), range(3)),
        (40, [1, 1, 0, 1, 1, 0, 1, 1], (), range(2, 6)),
        (30, [2, 2, 2, 1, 1, 1, 2, 2], (), range(3, 6)),  # what has the fewest replicas
        (9, [0] * 8, (), None),
    ],
)
def test_what_others_lack_most_is_chosen(
    most: int, others: list[int], have: tuple[int, ...], chosen: range | None
) -> None:
    assert choose(ALIKE, most, others, have) == chosen


def test_files_and_sizes_bound_the_choice() -> None:
    assert choose(sizes(50, 10, 10, 10, lacking=(3,)), 30, [0] * 4) == range(1, 3)
    tied = sizes(50, 10, 10, 50, shared=50)
    assert choose(tied, 70, [0] * 4) == range(4)  # the tied embedding counts once
    assert choose(tied, 69, [1, 0, 0, 0]) == range(2, 4)


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=12).flatmap(
        lambda of_unit: st.tuples(
            st.just(of_unit),
            st.lists(st.integers(0, 3), min_size=len(of_unit), max_size=len(of_unit)),
            st.integers(0, 60),
        )
    )
)
def test_a_choice_fits_and_no_other_closes_more(values: tuple[list[int], list[int], int]) -> None:
    of_unit, others, most = values
    found = choose(sizes(*of_unit), most, others)
    count = len(of_unit)

    def gap(units: range) -> int:
        return sum(of_unit[unit] for unit in missing(others, units))

    fitting = [
        range(a, b) for a in range(count) for b in range(a + 1, count + 1) if sum(of_unit[a:b]) <= most
    ]
    if found is None:
        assert not fitting
    else:
        assert found in fitting
        assert gap(found) == min(gap(each) for each in fitting)


@given(
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
    st.lists(st.integers(20, 60), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=40),
)
def test_changes_come_to_an_end(static: list[int], rooms: list[int], turns: list[int]) -> None:
    """Whatever the order in which choosers look: each change leaves less missing."""
    have: list[range] = [range(0)] * len(rooms)

    def others(index: int) -> list[int]:
        return [n + sum(unit in h for i, h in enumerate(have) if i != index) for unit, n in enumerate(static)]

    six = sizes(*[10] * 6)
    for index in [*range(len(rooms)), *(turn % len(rooms) for turn in turns)]:
        counts = others(index)
        new = choose(six, rooms[index], counts, have[index])
        assert new is not None
        if not have[index] or (new != have[index] and worth_changing(six, counts, have[index], new)):
            before = missing(counts, have[index])
            have[index] = new
            assert len(missing(counts, new)) < len(before) or not before


@pytest.mark.parametrize(
    ("others", "have", "new", "worth"),
    [
        ([1, 1, 0, 0], (0, 1), (2, 3), True),
        ([0, 0, 0, 0], (0, 1), (2, 3), False),  # as many would be missing
        ([1, 1, 1, 1], (0, 1), (2, 3), False),  # nothing is missing
        ([2, 2, 1, 1], (0, 1), (2, 3), False),
        ([0, 1, 0, 0], (0, 1), (2, 3), True),
        ([0, 0, 1, 0, 0, 0], (0, 1, 2), (3, 4, 5), False),  # a little less; not worth it
        ([0, 1, 1, 0, 0, 0], (0, 1, 2), (3, 4, 5), True),
    ],
)
def test_only_a_large_gain_is_worth_a_change(
    others: list[int], have: tuple[int, ...], new: tuple[int, ...], worth: bool
) -> None:
    assert worth_changing(sizes(*[10] * len(others)), others, have, new) is worth


def test_choosers_are_patient_for_different_times() -> None:
    first, last = PATIENCE_S
    waits = [patience_s(me, "abc") for me in "abc"]
    assert waits == sorted(set(waits))
    assert (waits[0], patience_s("x", [])) == (first, first)
    assert waits[-1] < last


def test_who_chooses_first() -> None:
    assert may_choose("b", 0.0, 0, [])
    assert may_choose("b", 0.0, 0, ["c"])
    assert not may_choose("b", 0.0, 0, ["a"])
    assert may_choose("b", SETTLE_S + TURN_S, 0, ["a"])  # it may hang
    assert not may_choose("b", SETTLE_S - 0.1, 1, [])
    assert may_choose("b", SETTLE_S, 1, [])


def test_sizes_of_a_model(tmp_path: Path) -> None:
    for tied in (False, True):
        path = make_tiny_llama(tmp_path / str(tied), n_blocks=3, tied=tied)
        config = read_config(path)
        found = read_sizes(path, config, "none")
        assert found.present == frozenset(range(5))
        assert found.shared == (found.of_unit[0] if tied else 0)
        assert found.of(range(5)) == sum(found.of_unit) - found.shared
        assert found.of_block == found.of_unit[1] == found.of_unit[3]


# --- nodes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    read_once(path)
    return path


def bytes_for(model: Path, units: str) -> int:
    return read_sizes(model, read_config(model), "none").of(parse_units(units, N_BLOCKS))


class Choosing:
    """A cluster of which `choosers` choose, and what they have chosen so far, by time."""

    def __init__(self, cluster: SimCluster, choosers: Mapping[str, int]) -> None:
        self.cluster = cluster
        self.names = list(choosers)
        self.changes: list[tuple[float, str, str]] = []

    def spans(self) -> dict[str, str]:
        nodes = {name: self.cluster.nodes[name].node for name in self.names}
        return {
            name: "" if node is None else format_spans(node.models[MODEL].loaded_spans())
            for name, node in nodes.items()
        }

    async def go_on(self, seconds: float) -> dict[str, str]:
        """What each has loaded after so many seconds; changes are noted."""
        end = trio.current_time() + seconds
        last = self.spans()
        while trio.current_time() < end:
            await trio.sleep(0.25)
            now = self.spans()
            self.changes += [
                (trio.current_time(), n, now[n]) for n in self.names if now[n] not in ("", last[n])
            ]
            last = now
        return last


def with_choosers(
    model: Path,
    seed: int,
    static: Mapping[str, str],
    choosers: Mapping[str, int],
    main: Callable[[Choosing], Awaitable[None]],
) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            spans = {**static, **dict.fromkeys(choosers, "")}
            rng = random.Random(f"auto {seed}")
            cluster = SimCluster(model, spans, rng, Log(), nursery, choosers=choosers)
            for name in spans:
                cluster.start(name)
            await main(Choosing(cluster, choosers))
            nursery.cancel_scope.cancel()

    run_seeded(seed, run)


def covered(*spans: str) -> set[int]:
    return set().union(*(parse_units(span, N_BLOCKS) for span in spans if span))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("room", ["embed,0-1", "0-1"], ids=["two", "three"])
def test_nodes_that_start_together_choose_different_blocks_once(model: Path, seed: int, room: str) -> None:
    count = 2 if room == "embed,0-1" else 3
    most = bytes_for(model, "2-3,head") if count == 2 else bytes_for(model, "embed,0")

    async def main(choosing: Choosing) -> None:
        spans = await choosing.go_on(20.0)
        assert covered(*spans.values()) == set(range(UNITS)), spans
        assert await choosing.go_on(300.0) == spans
        assert len(choosing.changes) == count

    with_choosers(model, seed, {}, dict.fromkeys("abc"[:count], most), main)


@pytest.mark.parametrize("seed", range(4))
def test_nodes_that_met_late_part_after_a_while(model: Path, seed: int) -> None:
    """They have chosen the same, each alone; one of them changes its mind, once."""

    async def main(choosing: Choosing) -> None:
        choosing.cluster.cut("a", "b", 20.0)
        spans = await choosing.go_on(15.0)
        assert spans["a"] == spans["b"]
        spans = await choosing.go_on(60.0)
        assert covered(*spans.values()) == set(range(UNITS)), spans
        assert await choosing.go_on(300.0) == spans
        assert len(choosing.changes) == 3

    with_choosers(model, seed, {}, dict.fromkeys("ab", bytes_for(model, "2-3,head")), main)


@pytest.mark.parametrize("seed", range(4))
def test_a_gap_is_closed_by_one_of_three_and_only_if_it_lasts(model: Path, seed: int) -> None:
    static = dict.fromkeys("xyz", "2-3,head")

    async def main(choosing: Choosing) -> None:
        cluster = choosing.cluster
        spans = await choosing.go_on(20.0)
        before = len(choosing.changes)
        assert set(spans.values()) == {"embed,0-1"}  # had by fewer, up to the last of them
        for name in static:
            cluster.kill(name, "eof", back_s=20.0)  # back before anybody's patience ends
        assert await choosing.go_on(60.0) == spans
        died = trio.current_time()
        for name in static:
            cluster.kill(name, "reset", back_s=1000.0)
        after = await choosing.go_on(100.0)
        assert sorted(after.values()) == ["2-3,head", "embed,0-1", "embed,0-1"]
        ((when, _, _),) = choosing.changes[before:]
        assert PATIENCE_S[0] <= when - died <= PATIENCE_S[1] + 10.0
        assert await choosing.go_on(300.0) == after

    with_choosers(model, seed, static, dict.fromkeys("abc", bytes_for(model, "2-3,head")), main)
