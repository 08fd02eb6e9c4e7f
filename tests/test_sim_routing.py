"""Routes by what nodes measure, on a simulated cluster: the slow are left, tried again, and not relied on."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from sim.cluster import EVERYTHING, MODEL, Log, SimCluster, read_once, tiny_model
from sim.determinism import run_seeded

from dgnd.control import api
from dgnd.routing.figures import AGAIN_S, LOOK_S
from dgnd.routing.search import Offer
from dgnd.worker.speed import REST_S

REPLICAS = {"a": "", "b": EVERYTHING, "c": EVERYTHING}
#: For figures to get from a worker to the other nodes: it is asked every 2 s, and told every 2 s.
SPREAD_S = 3 * LOOK_S


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    read_once(directory)
    return directory


class Talk:
    """One session's answers at node "a", and where they were computed."""

    def __init__(self, cluster: SimCluster, session: str | None) -> None:
        self.cluster, self.session = cluster, session
        self.said = [7, 11, 13]

    async def answer(self, tokens: int = 30) -> list[str]:
        """The nodes of one further answer, in the order of its route."""
        params = api.GenerateParams(token_ids=[*self.said, 17], max_tokens=tokens, session=self.session)
        result = await self.cluster.ask("a", params)
        self.said = [*self.said, 17, *result.token_ids]
        assert result.exact
        return [self.cluster.name_of(hop.peer) for hop in result.route]


def slow_down(cluster: SimCluster, name: str, times: float) -> None:
    for worker in cluster.nodes[name].workers:
        worker.slower = times


def run(
    model: Path, layout: dict[str, str], main: Callable[[SimCluster], Awaitable[None]], seed: int = 1
) -> str:
    """Does `main` on a cluster that is ready; returns the digest of all that happened."""
    log = Log()

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            cluster = SimCluster(model, layout, random.Random(seed), log, nursery)
            for name in layout:
                cluster.start(name)
            await cluster.all_ready()
            await main(cluster)
            nursery.cancel_scope.cancel()

    run_seeded(seed, work)
    return log.digest


async def measure_both(cluster: SimCluster) -> None:
    """Short answers until both replicas have figures, which are known at "a"."""
    for number in range(60):
        await Talk(cluster, None).answer(20)
        await trio.sleep(1.0)
        if number > 5 and all(offer.step_ms is not None for offer in offers(cluster)):
            break
    await trio.sleep(SPREAD_S)
    assert all(offer.step_ms is not None for offer in offers(cluster))


def offers(cluster: SimCluster) -> list[Offer]:
    node = cluster.nodes["a"].node
    assert node is not None
    return node.offers.offers(node.models[MODEL])


async def where(cluster: SimCluster, count: int = 20) -> Counter[str]:
    """Where sessions that begin one after the other run."""
    found: Counter[str] = Counter()
    for _ in range(count):
        found.update(await Talk(cluster, None).answer(6))
        await trio.sleep(0.5)
    return found


def test_a_session_leaves_a_node_that_became_slow_at_the_next_answer_and_it_is_tried_again(
    model: Path,
) -> None:
    async def main(cluster: SimCluster) -> None:
        await measure_both(cluster)
        talk = Talk(cluster, "long")
        (first,) = await talk.answer()
        other = "c" if first == "b" else "b"
        slow_down(cluster, first, 20.0)
        assert await talk.answer(60) == [first]  # nobody knows yet, and in mid-answer nothing moves
        await trio.sleep(SPREAD_S)
        assert await talk.answer() == [other]
        assert set(await where(cluster)) == {other}
        slow_down(cluster, first, 1.0)  # it is well again, but nobody asks it
        await trio.sleep(REST_S)
        assert set(await where(cluster, 30)) == {first, other}
        assert await talk.answer() == [other]  # nothing is much better there

    run(model, REPLICAS, main)


def test_a_node_that_stays_slow_is_tried_ever_more_seldom(model: Path) -> None:
    async def main(cluster: SimCluster) -> None:
        await measure_both(cluster)
        slow_down(cluster, "b", 20.0)
        trials: list[float] = []
        while trio.current_time() < 1000.0 + 6 * REST_S * 16:
            if await Talk(cluster, None).answer(20) == ["b"]:
                now = trio.current_time()
                if not trials or now - trials[-1] > REST_S / 2:
                    trials.append(now)
            await trio.sleep(25.0)
        assert 3 <= len(trials) <= 9  # rests of 1, 2, 4, 8, 16, 32 minutes
        apart = [b - a for a, b in itertools.pairwise(trials)]
        assert apart[-1] > 3 * apart[0]

    run(model, REPLICAS, main)


def test_a_node_that_comes_is_tried_and_gets_its_share(model: Path) -> None:
    async def main(cluster: SimCluster) -> None:
        cluster.kill("c", "eof", back_s=100.0)
        for _ in range(10):
            assert await Talk(cluster, None).answer() == ["b"]
            await trio.sleep(1.0)
        await trio.sleep(100.0)
        await cluster.all_ready()
        found = await where(cluster, 40)
        assert found["b"] > 5
        assert found["c"] > 5

    run(model, REPLICAS, main)


def test_sessions_that_begin_together_are_spread_at_once(model: Path) -> None:
    async def main(cluster: SimCluster) -> None:
        await measure_both(cluster)
        found: Counter[str] = Counter()

        async def one() -> None:
            found.update(await Talk(cluster, None).answer(40))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert found["b"] + found["c"] == 8
        assert 3 <= found["b"] <= 5

    for seed in range(3):
        run(model, REPLICAS, main, seed)


def test_a_slow_link_counts(model: Path) -> None:
    async def main(cluster: SimCluster) -> None:
        await measure_both(cluster)
        cluster.net.slow_link(cluster.nodes["a"].me, cluster.nodes["b"].me, 0.1)
        await trio.sleep(SPREAD_S)
        assert set(await where(cluster)) == {"c"}

    run(model, REPLICAS, main)


def test_figures_do_not_flood(model: Path) -> None:
    """Whatever happens they are said every 2 s at most, and an idle cluster says them every 25 s."""

    async def main(cluster: SimCluster) -> None:
        said: list[float] = []

        node = cluster.nodes["b"].node
        assert node is not None
        announce, network = node.network.announce, node.network

        def counted() -> None:
            said.append(trio.current_time())
            announce()

        network.announce = counted  # type: ignore[method-assign]
        for number in range(30):
            slow_down(cluster, "b", 1.0 + 3.0 * (number % 2))
            await Talk(cluster, None).answer(40)
        assert len(said) > 1
        assert min(b - a for a, b in itertools.pairwise(said)) >= LOOK_S - 1e-6
        await trio.sleep(2 * REST_S)
        said.clear()
        await trio.sleep(10 * AGAIN_S)
        assert 5 <= len(said) <= 11

    run(model, REPLICAS, main)


def test_figures_come_from_the_seed_too(model: Path) -> None:
    async def main(cluster: SimCluster) -> None:
        slow_down(cluster, "b", 5.0)
        await where(cluster, 10)
        await trio.sleep(REST_S)

    assert run(model, REPLICAS, main, 5) == run(model, REPLICAS, main, 5)
