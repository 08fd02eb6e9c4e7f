"""An answer whose only holder of some blocks is gone, on a node that may load them itself: real daemons, and
what takes its time on virtual time."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import trio
from cluster import Cluster, Row, TestNode
from disturbed import Asked, long_answer
from msgspec import structs
from sim.cluster import MODEL, Log, SimCluster, read_once, tiny_model
from sim.determinism import run_seeded
from tiny_llama import make_tiny_llama

from dgnd.config.schema import SessionsConfig
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import BlocksMissing
from dgnd.upkeep.gapfill import _WANTED_S
from dgnd.upkeep.ledger import PROGRAM_BYTES

FILL = "[sessions]\nfill_gaps = true\nrecover_s = {}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=6, max_positions=4096)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("pair"), model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-2"), Row("b", "3-5,head")], more=FILL.format(10))
        yield cluster


@pytest.fixture
def pair(running: Cluster) -> Cluster:
    node = running.nodes["b"]
    if node.process is None or node.process.poll() is not None:
        node.start()
    for each in running.nodes.values():
        each.wait_ready()
    alone(running.nodes["a"])
    return running


def spans(node: TestNode) -> list[str]:
    with ControlClient(node.socket) as client:
        return [worker.spans for worker in client.call("status").workers]


def alone(node: TestNode) -> None:
    """Waits until what was loaded for others is given back."""
    node.wait_for(lambda: spans(node) == ["embed,0-2"], what="end of the worker")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7}], ids=["greedy", "sampled"])
def test_an_answer_survives_the_only_holder_of_its_blocks(pair: Cluster, sampling: dict[str, object]) -> None:
    origin = pair.nodes["a"]
    params, right = long_answer(origin, sampling)
    request = Asked(origin, params, 60, lambda _: pair.nodes["b"].kill())
    assert request.ids() == right
    assert request.result is not None
    assert request.result.exact
    assert [(hop.name, hop.span) for hop in request.result.route] == [("a", "embed,0-2"), ("a", "3-5,head")]
    print(f"longest wait: {request.longest_s:.2f} s")
    status = origin.ctl("status").stdout
    assert "3-5,head of m: loaded for answers that lost it" in status
    alone(origin)  # the answer has ended


def test_blocks_are_given_back_when_others_serve_them_again(pair: Cluster) -> None:
    origin, other = pair.nodes["a"], pair.nodes["b"]
    params, right = long_answer(origin, {})
    first = Asked(origin, structs.replace(params, session="s"), 60, lambda _: other.kill())
    assert first.ids() == right
    assert spans(origin) == ["embed,0-2", "3-5,head"]  # the session is open
    other.start()
    alone(origin)
    with ControlClient(origin.socket) as client:
        result = client.generate(
            api.GenerateParams(prompt=" more", raw=True, session="s", max_tokens=5), lambda delta: None
        )
    assert [hop.name for hop in result.route] == ["a", "b"]
    origin.ctl("cache", "clear")
    # In mid-answer, too.
    middle = Asked(origin, params, 20, lambda _: other.kill())
    origin.wait_for(lambda: middle.result is not None or len(spans(origin)) == 2, what="load")
    other.start()
    assert middle.ids() == right
    alone(origin)


def test_answers_that_lack_the_same_blocks_share_a_load(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    wanted = [long_answer(origin, {}, prompt=prompt) for prompt in "xyz"]
    before = len(origin.log)
    requests = [Asked(origin, params, 0, lambda _: None) for params, _ in wanted]
    origin.wait_for(lambda: all(request.came > 20 for request in requests), what="answers under way")
    pair.nodes["b"].kill()
    assert [request.ids() for request in requests] == [right for _, right in wanted]
    assert origin.log[before:].count("is loaded here for an answer that lost it") == 1


def test_what_can_not_be_loaded_is_said(model: Path, tmp_path: Path) -> None:
    """The origin has no weights at all: with the switch on, the message says that too."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (bare / file).write_bytes((model / file).read_bytes())
    with Cluster(tmp_path, model) as cluster:
        cluster.add("a")
        cluster.add("b")
        settings = {"path": str(bare), "backend": "reference"}
        cluster.configure("a", [], ["b"], {"m": settings}, FILL.format(2))
        cluster.configure("b", [Row("b", "embed,0-5,head")], ["a"])
        cluster.start()
        params, _ = long_answer(cluster.nodes["a"], {})
        request = Asked(cluster.nodes["a"], params, 20, lambda _: cluster.nodes["b"].kill())
        with pytest.raises(BlocksMissing, match=r"this node can't load embed,0-5,head itself: .*has neither"):
            request.ids()


# --- on virtual time


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    read_once(path)
    return path


PARAMS = api.GenerateParams(token_ids=[5, 6, 7], max_tokens=40, temperature=0.0)


def simulated(
    tiny: Path, recover_s: float, main: Callable[[SimCluster, Callable[[int], None]], Awaitable[None]]
) -> None:
    """Runs `main` with two nodes, of which "b" has the only head; what it is given kills "b" at the tenth
    token."""

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            sessions = SessionsConfig(fill_gaps=True, recover_s=recover_s)
            spans = {"a": "embed,0-1", "b": "2-3,head"}
            cluster = SimCluster(tiny, spans, random.Random(1), Log(), nursery, sessions=sessions)
            for name in spans:
                cluster.start(name)
            await cluster.all_ready()

            def strike(came: int) -> None:
                if came == 10:
                    cluster.kill("b", "eof", back_s=1000.0)

            await main(cluster, strike)
            nursery.cancel_scope.cancel()

    run_seeded(1, run)


def test_a_load_that_moves_may_take_longer_than_recover_s(tiny: Path) -> None:
    async def main(cluster: SimCluster, strike: Callable[[int], None]) -> None:
        right = await cluster.ask("a", PARAMS)
        assert (await cluster.ask("a", PARAMS, strike)).token_ids == right.token_ids
        await trio.sleep(_WANTED_S + 1.0)
        node = cluster.nodes["a"].node
        assert node is not None
        assert node.models[MODEL].fillings == []

    simulated(tiny, 0.2, main)  # a simulated worker loads for 0.3 s at least


def test_a_load_that_does_not_move_is_given_up(tiny: Path) -> None:
    async def main(cluster: SimCluster, strike: Callable[[int], None]) -> None:
        this = cluster.nodes["a"]

        def strike_and_freeze(came: int) -> None:
            strike(came)
            if came == 10:
                cluster.nursery.start_soon(freeze)

        async def freeze() -> None:
            while len(this.workers) == 1:  # noqa: ASYNC110 - of the simulation, which has no event for it
                await trio.sleep(0.01)
            this.workers[1].freeze(True)

        begun = trio.current_time()
        with pytest.raises(
            BlocksMissing, match="can't load 2-3,head itself: loading it did not move for 3 s"
        ):
            await cluster.ask("a", PARAMS, strike_and_freeze)
        assert trio.current_time() - begun < 15.0

    simulated(tiny, 3.0, main)


def test_too_little_memory_is_said_in_numbers(tiny: Path) -> None:
    async def main(cluster: SimCluster, strike: Callable[[int], None]) -> None:
        numbers = r"that takes [\d.]+ KiB, and weights may take 700 B of the free memory"
        with (
            mock.patch("dgnd.upkeep.ledger.available_bytes", return_value=PROGRAM_BYTES + 1000),
            pytest.raises(BlocksMissing, match=f"this node can't load 2-3,head itself: {numbers}"),
        ):
            await cluster.ask("a", PARAMS, strike)

    simulated(tiny, 2.0, main)
