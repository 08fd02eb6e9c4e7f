"""Real processes that die in mid-answer: another node, or the same one again, goes on with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from disturbed import SAMPLINGS, Asked, long_answer
from load import serving
from msgspec import structs
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.errors import BadRequest, BlocksMissing, Inexact, NotFound


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a long context, so that an answer can be interrupted."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=6, max_positions=4096)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    rows = [
        Row("a", "embed"),
        *(Row(name, "0-2") for name in "bc"),
        *(Row(name, "3-5,head") for name in "de"),
    ]
    with Cluster(tmp_path_factory.mktemp("five"), model) as cluster:
        cluster.full_mesh(rows)
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """Everyone is up, whatever the test before did to them."""
    for node in running.nodes.values():
        if node.process is None or node.process.poll() is not None:
            node.start()
    for node in running.nodes.values():
        node.wait_ready()
    return running


def kill_worker(node: TestNode) -> None:
    os.kill(node.worker_pids()[0], signal.SIGKILL)


@pytest.fixture
def stopped() -> Iterator[list[int]]:
    """Processes to be let go on at the end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("how", ["node", "worker", "two nodes"])
@pytest.mark.parametrize("after", [1, 60])
def test_an_answer_survives(cluster: Cluster, sampling: dict[str, object], how: str, after: int) -> None:
    origin = cluster.nodes["a"]
    params, right = long_answer(origin, sampling)

    def strike(names: list[str]) -> None:
        assert len(names) == 3
        for name in names[1:] if how == "two nodes" else names[-1:]:
            node = cluster.nodes[name]
            kill_worker(node) if how == "worker" else node.kill()

    before = recoveries(origin)
    assert Asked(origin, params, after, strike).ids() == right
    origin.wait_for(lambda: recoveries(origin) > before, what="word of the recovery in the log")
    nothing_is_left(cluster)


def recoveries(origin: TestNode) -> int:
    """How often an answer of it had to go on elsewhere or again, as its log says."""
    return origin.log.count(" goes on after ")


def nothing_is_left(cluster: Cluster) -> None:
    """No survivor keeps anything of a session that has ended."""
    for node in cluster.nodes.values():
        if node.process is not None and node.process.poll() is None:
            node.wait_for(lambda node=node: held(node) == [0, 0, 0, 0], what=f"end of sessions: {held(node)}")


def held(node: TestNode) -> list[int]:
    """Sessions, open hops, bytes of journals, bytes of KV."""
    status = node.status()
    kv = sum(worker.kv_bytes for worker in status.workers)
    return [len(status.sessions), status.hops, status.journal_bytes, kv]


@pytest.mark.parametrize("what", ["node", "daemon", "worker"])
@pytest.mark.parametrize("which", [1, 2], ids=["middle", "last"])
def test_an_answer_survives_what_hangs(cluster: Cluster, stopped: list[int], what: str, which: int) -> None:
    """SIGSTOP: no connection ends, nobody says anything. `Asked.ids` has a deadline."""
    params, right = long_answer(cluster.nodes["a"], {})

    def strike(names: list[str]) -> None:
        victim = cluster.nodes[names[which]]
        assert victim.process is not None
        daemon = [victim.process.pid] if what != "worker" else []
        for pid in daemon + (victim.worker_pids() if what != "daemon" else []):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)

    request = Asked(cluster.nodes["a"], params, 60, strike)
    assert request.ids() == right
    print(f"longest wait: {request.longest_s:.2f} s")
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    nothing_is_left(cluster)  # nor who was stopped, and was told nothing meanwhile


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes without a replica."""
    with Cluster(tmp_path_factory.mktemp("pair"), model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-2"), Row("b", "3-5,head")], more="[sessions]\nrecover_s = 60")
        yield cluster


@pytest.mark.parametrize("victim", ["a", "b"])
def test_without_a_replica_an_answer_waits_for_the_worker_to_be_back(pair: Cluster, victim: str) -> None:
    params, right = long_answer(pair.nodes["a"], {})
    strike = lambda _: kill_worker(pair.nodes[victim])  # noqa: E731
    assert Asked(pair.nodes["a"], params, 20, strike).ids() == right


def test_without_a_replica_an_answer_waits_for_the_node_to_be_back(pair: Cluster) -> None:
    origin, node = pair.nodes["a"], pair.nodes["b"]
    params, right = long_answer(origin, {})

    def waiting() -> list[dict[str, object]]:
        return [s["waiting"] for s in origin.ctl_json("status")["sessions"] if s["waiting"]]

    def strike(_: list[str]) -> None:
        node.kill()
        origin.wait_for(waiting, what="an answer that waits")
        (found,) = waiting()
        assert found["missing"] == "3-5,head"
        assert 0 < float(str(found["left_s"])) <= 60
        assert re.search(r"3-5,head of m +[1-6]?\d s", origin.ctl("status").stdout)
        node.start()

    assert Asked(origin, params, 20, strike).ids() == right
    assert not waiting()


def test_a_worker_stopped_while_nobody_asks_is_not_offered(cluster: Cluster, stopped: list[int]) -> None:
    origin, node = cluster.nodes["a"], cluster.nodes["b"]
    params, right = long_answer(origin, {}, tokens=20)
    (pid,) = node.worker_pids()
    stopped.append(pid)
    os.kill(pid, signal.SIGSTOP)
    origin.wait_for(lambda: serving(origin) == set("acde"), 20, "word of the stopped worker")
    (worker,) = node.ctl_json("status")["workers"]
    assert worker["state"] == "silent"
    assert f"(pid {pid}) neither answers nor computes" in worker["detail"]
    before = recoveries(origin)
    assert Asked(origin, params, 0, lambda _: None).ids() == right
    assert recoveries(origin) == before  # nobody had to find out
    os.kill(pid, signal.SIGCONT)
    origin.wait_for(lambda: serving(origin) == set("abcde"), what="offers of all")
    node.wait_ready()


def test_what_nobody_covers_in_time_is_named_with_who_had_it(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-2"), Row("b", "3-5,head")], more="[sessions]\nrecover_s = 1")
        origin = cluster.nodes["a"]
        params, _ = long_answer(origin, {})
        with pytest.raises(
            BlocksMissing, match="nobody reachable serves 3-5,head of model m within 1 s; b had them"
        ):
            Asked(origin, params, 20, lambda _: cluster.nodes["b"].kill()).ids()
        with pytest.raises(NotFound, match="session 's' has no answer to go on with"):
            Asked(origin, api.GenerateParams(session="s", resume=True), 0, lambda _: None).ids()
        with pytest.raises(BadRequest, match="it takes a session, and nothing to say"):
            Asked(origin, structs.replace(params, resume=True), 0, lambda _: None).ids()


def test_exact_takes_no_replacement_that_computes_otherwise(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, model) as cluster:
        rows = [Row("a", "embed,0-2"), Row("b", "3-5,head"), Row("c", "3-5,head")]
        for name in "abc":
            cluster.add(name)
        for name in "abc":
            quant = "int8" if name == "c" else "none"
            settings = {"path": str(model), "backend": "reference", "quant": quant}
            others = [other for other in "abc" if other != name]
            cluster.configure(name, rows, others, {"m": settings}, "[sessions]\nrecover_s = 15")
        cluster.start("a", "b")
        origin = cluster.nodes["a"]
        params, right = long_answer(origin, {"exact": True})

        def replace(_: list[str]) -> None:
            cluster.nodes["b"].kill()
            cluster.nodes["c"].start()

        left = "b had them last; c has 3-5,head with quant int8, not none"
        with pytest.raises(BlocksMissing, match=f"exactly as before within 15 s; {left}"):
            Asked(origin, params, 20, replace).ids()
        cluster.nodes["c"].wait_ready()
        mixed = Asked(origin, structs.replace(params, max_tokens=5), 0, lambda _: None)
        alone = "no exact route for model m: c has 3-5,head with quant int8, not none; ask without --exact"
        with pytest.raises(Inexact, match=alone):
            mixed.ids()
        mixed = Asked(origin, structs.replace(params, exact=False), 0, lambda _: None)
        assert len(mixed.ids()) > 0
        assert mixed.result is not None
        assert not mixed.result.exact
        cluster.nodes["b"].start()  # c stays, and is passed over
        cluster.nodes["b"].wait_ready()
        again = Asked(origin, params, 20, lambda _: kill_worker(cluster.nodes["b"]))
        assert again.ids() == right
        assert again.result is not None
        assert again.result.exact
