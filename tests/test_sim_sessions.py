"""Sessions of a simulated cluster whose hops come and go, on virtual time (see `sim`)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio
from sim.cluster import EVERYTHING, Log, SimCluster, read_once, tiny_model
from sim.determinism import run_seeded
from sim.oracle import right_ids

from dgnd.control import api
from dgnd.wire.messages import Sampling

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
