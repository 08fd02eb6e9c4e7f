"""Sessions of a simulated cluster whose hops come and go, on virtual time (see `sim`)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
import pytest
import trio
from sim.cluster import EVERYTHING, Log, SimCluster, read_once, tiny_model
from sim.determinism import run_seeded
from sim.net import Fault, untouched
from sim.oracle import right_ids

from dgnd.control import api
from dgnd.errors import DgnError, PeerSilent, ProtocolError
from dgnd.hosting.admission import claimed_key
from dgnd.sessions.driver import STEP_TIMEOUT_S
from dgnd.sessions.laying import OPEN_TIMEOUT_S
from dgnd.sessions.recovery import MOST_MENDS
from dgnd.wire.messages import (
    Alive,
    Failure,
    Frame,
    HopKey,
    HopLength,
    HopOpened,
    OpenHop,
    Probe,
    Sampling,
    StepFrame,
    TokenFrame,
)

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
        node.hops.set_limits(0)


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
            cluster.node(other).hops.set_limits(64)
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


# --- hops that live and do not do what they should -----------------------------------------------------


def instead_of_steps(
    cluster: SimCluster, name: str, answer: Callable[[str, Frame], Frame | None], what: type = StepFrame
) -> list[Frame]:
    """The node answers frames of kind `what` so, and does nothing with them; these frames."""
    node = cluster.node(name)
    hears, heard = node.hops.on_frame, list[Frame]()

    def on_frame(sender: str, frame: Frame) -> None:
        if not isinstance(frame.message, what):
            hears(sender, frame)
            return
        heard.append(frame)
        said = answer(sender, frame)
        if said is not None:
            node.office.post(sender, said)

    node.hops.on_frame = on_frame  # type: ignore[method-assign]
    return heard


def refused(kind: str) -> Callable[[str, Frame], Frame]:
    """Answers a step with a failure."""

    def answer(sender: str, frame: Frame) -> Frame:
        step = frame.message
        assert isinstance(step, StepFrame)
        return Frame(
            Failure(kind=kind, message="out of memory", key=step.key, branch=step.branch, tag="step")
        )

    return answer


def test_workers_that_die_over_different_steps_of_a_session_do_not_end_it(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        first = (await cluster.ask("a", asked(3))).route[-1].name
        other = "c" if first == "b" else "b"

        async def kill_at_work(name: str) -> None:
            (worker,) = cluster.nodes[name].workers
            while not worker.at_work:  # noqa: ASYNC110 - of a simulated worker, which has no event for it
                await trio.sleep(0.0001)
            cluster.kill_worker(name)

        async def both() -> None:
            await kill_at_work(first)
            await kill_at_work(other)  # while it is filled
            struck.append(len(result_ids))

        def strike(came: int) -> None:
            result_ids[:] = range(came)
            if came == 8:
                cluster.nursery.start_soon(both)

        result_ids: list[int] = []
        struck: list[int] = []
        result = await cluster.ask("a", asked(30), strike)
        assert struck == [8] or struck == [9]
        assert result.token_ids == right

    simulate(model, {"a": "embed", "b": "0-3,head", "c": "0-3,head"}, work)


def test_who_says_that_it_lives_and_computes_nothing_is_given_up(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}
        begun = trio.current_time()
        deaf = lambda: deafen(cluster, first, (StepFrame,))  # noqa: E731
        result = await ask_while(cluster, 30, deaf, session="s")
        assert result.token_ids == right
        assert first not in {hop.name for hop in result.route}
        assert STEP_TIMEOUT_S < trio.current_time() - begun < STEP_TIMEOUT_S + 5

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING}, work)


def test_who_talks_instead_of_opening_is_passed_over(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3))).route}
        node = cluster.node(first)

        async def talk(sender: str, key: HopKey) -> None:
            while True:
                node.office.post(sender, Frame(HopLength(key=key, branch=99, length=0)))
                await trio.sleep(0.3)

        def on_open(sender: str, frame: Frame) -> None:
            assert isinstance(frame.message, OpenHop)
            key = claimed_key(frame.message)
            assert key is not None
            cluster.nursery.start_soon(talk, sender, key)

        def on_probe(sender: str, frame: Frame) -> Frame:
            assert isinstance(frame.message, Probe)
            return Frame(Alive(key=frame.message.key))

        instead_of_steps(cluster, first, on_open, OpenHop)
        instead_of_steps(cluster, first, on_probe, Probe)
        begun = trio.current_time()
        result = await cluster.ask("a", asked(30))
        assert result.token_ids == right
        assert first not in {hop.name for hop in result.route}
        assert trio.current_time() - begun < OPEN_TIMEOUT_S + 5

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING}, work)


@pytest.mark.parametrize("kind", ["backend", "internal", "protocol", "cancelled", "of_a_later_version"])
def test_what_one_hop_can_not_compute_another_one_does(model: Path, kind: str) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}
        begun = trio.current_time()
        fails = lambda: instead_of_steps(cluster, first, refused(kind))  # noqa: E731
        result = await ask_while(cluster, 30, fails, session="s")
        assert result.token_ids == right
        assert trio.current_time() - begun < 2

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING}, work)


@pytest.mark.parametrize("kind", ["backend", "cancelled", "peer", "worker_died"])
def test_what_nobody_else_can_compute_ends_the_answer_soon(model: Path, kind: str) -> None:
    async def work(cluster: SimCluster) -> None:
        heard = instead_of_steps(cluster, "b", refused(kind))
        begun = trio.current_time()
        with pytest.raises(DgnError, match=r"b \(embed,0-3,head\): out of memory"):
            await cluster.ask("a", asked(3))
        assert trio.current_time() - begun < 5
        assert 1 <= len(heard) <= MOST_MENDS + 1

    simulate(model, {"a": "", "b": EVERYTHING}, work)


def test_who_sends_a_token_of_no_vocabulary_is_passed_over_and_named(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        (first,) = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}

        def lies(name: str) -> None:
            hops = cluster.node(name).hops
            passes_on = hops.on_worker_frame

            def on_worker_frame(model: str, frame: Frame) -> None:
                if isinstance(frame.message, TokenFrame):
                    frame = Frame(msgspec.structs.replace(frame.message, token_id=1_000_000))
                passes_on(model, frame)

            hops.on_worker_frame = on_worker_frame  # type: ignore[method-assign]

        result = await ask_while(cluster, 30, lambda: lies(first), session="s")
        assert result.token_ids == right
        lies("c" if first == "b" else "b")
        with pytest.raises(ProtocolError, match=r"[bc] \(embed,0-3,head\) sent token id 1000000"):
            await cluster.ask("a", asked(3))

    simulate(model, {"a": "", "b": EVERYTHING, "c": EVERYTHING}, work)


def test_probabilities_come_from_a_head_far_away_as_from_one_here(model: Path) -> None:
    told: dict[str, list[api.TokenLogprobs]] = {}

    async def ask(cluster: SimCluster, name: str) -> None:
        def strike(came: int) -> None:
            if came == 4 and name == "split":
                cluster.kill(cluster.name_of(cluster.route("a")[-1].peer), "eof", back_s=1.0)

        result = await cluster.ask("a", asked(12, logprobs=3, repetition_penalty=1.3), strike)
        told[name] = result.logprobs
        assert [each.picked.token_id for each in told[name]] == result.token_ids
        assert all(len(each.likeliest) == 3 for each in told[name])

    async def alone(cluster: SimCluster) -> None:
        await ask(cluster, "alone")

    async def split(cluster: SimCluster) -> None:
        await ask(cluster, "split")

    simulate(model, {"a": EVERYTHING}, alone)
    simulate(model, {"a": "embed,0-1", "b": "2-3,head", "c": "2-3,head"}, split)
    assert told["split"] == told["alone"]


def test_what_is_mended_sent_again_and_refused_is_counted(model: Path) -> None:
    right = right_ids(model, PROMPT, Sampling(), 30)

    async def work(cluster: SimCluster) -> None:
        route = {hop.name for hop in (await cluster.ask("a", asked(3, session="s"))).route}
        (second,) = route - {"a"}
        result = await ask_while(cluster, 30, lambda: cluster.kill(second, "reset"), session="s2")
        assert result.token_ids == right
        counts = cluster.node("a").counts
        assert counts.model("m").mends == 1
        assert counts.model("m").replays >= 1  # from the journal of its own blocks
        assert counts.model("m").tokens == 33
        assert counts.model("m").answers == {"length": 2}
        assert sum(count.losses for count in counts.peers.values()) == 1
        (left,) = {"b", "c"} - {second}
        cluster.node(left).hops.set_limits(0)
        with pytest.raises(DgnError):
            await cluster.ask("a", asked(3, session="s3"))
        assert cluster.node(left).counts.refusals["no_room_now"] >= 1

    simulate(model, {"a": "embed,0-1", "b": "2-3,head", "c": "2-3,head"}, work)
