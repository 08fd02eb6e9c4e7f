"""Sessions of a simulated cluster whose hops come and go, on virtual time (see `sim`)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio
from sim.cluster import EVERYTHING, Log, SimCluster, read_once, tiny_model
from sim.determinism import run_seeded
from sim.net import Fault, untouched
from sim.oracle import right_ids

from dgnd.control import api
from dgnd.errors import PeerSilent
from dgnd.wire.messages import Frame, HopOpened, OpenHop, Probe, Sampling, StepFrame, TokenFrame

PROMPT = [7, 100, 31, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    read_once(path)
    return path


def simulate(
    model: Path, layout: Mapping[str, str], work: Callable[[SimCluster], Awaitable[None]], **keywords: float
) -> None:
    """`work` on a cluster that is ready."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            cluster = SimCluster(model, layout, random.Random(1), Log(), nursery, **keywords)
            for name in layout:
                cluster.start(name)
            await cluster.all_ready()
            with trio.fail_after(200):
                await work(cluster)
            nursery.cancel_scope.cancel()

    run_seeded(1, main)


def asked(count: int, **fields: object) -> api.GenerateParams:
    return api.GenerateParams(token_ids=PROMPT, max_tokens=count, **fields)  # type: ignore[arg-type]


def test_an_answer_cancelled_while_its_route_is_laid_leaves_a_session_that_goes_on(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 12)

    async def work(cluster: SimCluster) -> None:
        cancelled = trio.Event()

        def strike(came: int) -> None:
            if came == 5:
                cluster.kill("b", "reset", back_s=2.0)
                cluster.freeze("c", "node", 2.0)  # is asked to take over, and says nothing
                cluster.nursery.start_soon(cancel)

        async def cancel() -> None:
            await trio.sleep(0.5)
            cancelled.set()

        for at_once in (False, True):
            result = await cluster.ask("a", asked(12, session="s"), strike, cancelled)
            assert result.finish_reason == "cancelled"
            assert result.token_ids == right[: len(result.token_ids)]
            await trio.sleep(0 if at_once else 5)
            begun = trio.current_time()
            assert (await cluster.ask("a", asked(12, session="s"))).token_ids == right
            assert trio.current_time() - begun < 15
            await cluster.all_ready()
            cancelled = trio.Event()

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING}, work)


def refuse_to_open(cluster: SimCluster, names: str) -> None:
    """Nobody of `names` has room for a further session, from now on."""
    for name in names:
        node = cluster.nodes[name].node
        assert node is not None
        node.hops.set_limits(0, 1 << 20)


async def ask_while(
    cluster: SimCluster, count: int, strike: Callable[[], None], **fields: object
) -> api.GenerateResult:
    """An answer, with a strike in its middle."""
    return await cluster.ask("a", asked(count, **fields), lambda came: strike() if came == 8 else None)


def test_who_lost_what_it_offered_as_an_answer_begins_is_passed_over(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 12)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}
        cluster.node("a").engine.clear(None)
        offers = cluster.node("a").offers
        offers.peer_says = lambda peer, message: None  # type: ignore[method-assign]
        cluster.kill_worker(first)
        await trio.sleep(0.1)  # that it offers nothing any more is still on its way to "a"
        result = await cluster.ask("a", asked(12, session="s"))
        assert result.token_ids == right
        assert first not in {hop.name for hop in result.route}

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING, "d": EVERYTHING}, work)


@pytest.mark.parametrize("how", ["start", "kill", "drain"])
def test_who_has_no_room_is_passed_over_for_a_third(model: Path, how: str) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}
        full, third = sorted({"b", "c", "d"} - {first})

        def strike() -> None:
            if how == "kill":
                cluster.kill(first, "eof", back_s=100)
            elif how == "drain":
                cluster.drain(first)

        if how == "start":
            cluster.node("a").engine.clear(None)
            refuse_to_open(cluster, first + full)
        else:
            refuse_to_open(cluster, full)
        begun = trio.current_time()
        result = await ask_while(cluster, 30, strike, session="s")
        assert result.token_ids == right
        assert [hop.name for hop in result.route] == [third]
        assert trio.current_time() - begun < 2
        if how == "drain":
            assert (await cluster.node(first).drain.finished()).ended == 0

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING, "d": EVERYTHING}, work)


def test_who_leaves_goes_on_where_its_replacement_fails(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)
    layout = {"a": "embed", "b": "0-3,head", "c": "0-3,head"}

    async def work(cluster: SimCluster) -> None:
        first = (await cluster.ask("a", asked(3))).route[-1].name
        other = "c" if first == "b" else "b"

        def full() -> None:
            refuse_to_open(cluster, other)
            cluster.drain(first)

        def fails_while_it_is_filled() -> None:
            cluster.node(other).hops.set_limits(64, 1 << 20)
            cluster.drain(first)
            cluster.net.tamper = strike_at_replay

        def strike_at_replay(sender: str, receiver: str, frame: Frame) -> Fault | None:
            if isinstance(frame.message, StepFrame) and cluster.name_of(receiver) == other:
                cluster.net.tamper = untouched
                cluster.kill_worker(other)
            return None

        for strike in (full, fails_while_it_is_filled):
            result = await ask_while(cluster, 30, strike)
            assert result.token_ids == right
            assert result.route[-1].name == first  # it had it all the time
            assert (await cluster.node(first).drain.finished()).ended == 0
            assert not any(node.hops.hops for node in map(cluster.node, layout))
            cluster.node(first).drain.undo()
            await cluster.all_ready()

    simulate(model, layout, work)


def deafen(cluster: SimCluster, name: str, what: tuple[type, ...]) -> None:
    """The node answers pings, and nothing of `what`."""
    hops = cluster.node(name).hops
    hears = hops.on_frame

    def on_frame(sender: str, frame: Frame) -> None:
        if not isinstance(frame.message, what):
            hears(sender, frame)

    hops.on_frame = on_frame  # type: ignore[method-assign]


@pytest.mark.parametrize("when", ["start", "middle"])
def test_who_answers_nothing_but_pings_is_passed_over_soon(model: Path, when: str) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}
        deaf = lambda: deafen(cluster, first, (OpenHop, Probe, StepFrame))  # noqa: E731
        if when == "start":
            cluster.node("a").engine.clear(None)
            deaf()
        begun = trio.current_time()
        result = await ask_while(cluster, 30, deaf if when == "middle" else lambda: None, session="s")
        assert result.token_ids == right
        assert [hop.name for hop in result.route] != [first]
        assert 2 < trio.current_time() - begun < 4
        begun = trio.current_time()
        assert (await cluster.ask("a", asked(3))).token_ids == right[:3]  # it is known by now
        assert trio.current_time() - begun < 1

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING}, work)


def test_who_alone_has_the_blocks_and_answers_nothing_but_pings_is_named(model: Path) -> None:
    async def work(cluster: SimCluster) -> None:
        deafen(cluster, "b", (OpenHop, Probe))
        begun = trio.current_time()
        with pytest.raises(PeerSilent, match=r"b \(embed,0-3,head\) answers pings, but nothing about this"):
            await cluster.ask("a", asked(3))
        assert trio.current_time() - begun < 4

    simulate(model, {"a": "", "b": EVERYTHING}, work)


@pytest.mark.parametrize("what", [HopOpened, TokenFrame])
def test_who_is_busy_is_waited_for(model: Path, what: type) -> None:
    """An answer of its worker takes six seconds, whose time is computed through."""
    right = right_ids(model, PROMPT, Sampling(), 12)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3))).route}
        hops = cluster.node(first).hops
        passes_on = hops.on_worker_frame

        async def later(model: str, frame: Frame) -> None:
            await trio.sleep(6)
            passes_on(model, frame)

        def on_worker_frame(model: str, frame: Frame) -> None:
            if not isinstance(frame.message, what):
                passes_on(model, frame)
                return
            hops.on_worker_frame = passes_on
            cluster.nursery.start_soon(later, model, frame)

        hops.on_worker_frame = on_worker_frame
        begun = trio.current_time()
        result = await cluster.ask("a", asked(12))
        assert result.token_ids == right
        assert [hop.name for hop in result.route] == [first]
        assert trio.current_time() - begun > 6

    simulate(model, {"a": "", "b": EVERYTHING, "c": ""}, work)
