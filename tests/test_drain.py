"""Real nodes that leave while answers run through them: by SIGTERM, or drained by their operator."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from disturbed import SAMPLINGS, TOKENS, Asked, asked, long_answer
from load import TWO_OF_THREE, Load, restart, serving
from tiny_llama import make_endless_llama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import BlocksMissing, Draining, ShuttingDown

#: What these nodes have for their goodbye, and the most that it may take on a busy machine.
DRAIN_S, END_S = 4.0, 30.0
ENDLESS = asked(max_tokens=4000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=6)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An origin without blocks, and two replicas for each part."""
    rows = [Row(name, span) for span, names in PARTS.items() for name in names]
    with Cluster(tmp_path_factory.mktemp("seven"), model) as cluster:
        cluster.add("origin")
        cluster.full_mesh(rows, node={"drain_s": DRAIN_S})
        yield cluster


PARTS = {"embed,0-1": "ab", "2-3": "cd", "4-5,head": "ef"}


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """Everyone is up and takes sessions, whatever the test before did to them."""
    for node in running.nodes.values():
        if node.process is None or node.process.poll() is not None:
            node.start()
    for node in running.nodes.values():
        node.wait_for(lambda node=node: node.state() is not None, what="socket")
        if node.state() in ("draining", "drained"):
            node.ctl("drain", "--undo")
        node.wait_ready()
    origin = running.nodes["origin"]
    origin.wait_for(lambda: serving(origin) == set("abcdef"), what="offers of all")
    return running


def undisturbed(origin: TestNode, **fields: object) -> tuple[api.GenerateParams, list[int]]:
    """A request, and its answer's ids where nobody leaves."""
    params = asked(**fields)
    return params, ask(origin, params).token_ids


def ask(origin: TestNode, params: api.GenerateParams) -> api.GenerateResult:
    request = Asked(origin, params, 0, lambda route: None)
    request.ids()
    assert request.result is not None
    return request.result


def drained(node: TestNode) -> api.Drained:
    with ControlClient(node.socket) as client:
        return client.call("drain", api.DrainParams())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("how", ["drain", "SIGTERM"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "head"])
def test_an_answer_goes_on_elsewhere(
    cluster: Cluster, sampling: dict[str, object], how: str, place: int
) -> None:
    origin = cluster.nodes["origin"]
    params, right = long_answer(origin, sampling)
    leaver = Leaver(cluster, place, how)
    answer = Asked(origin, params, 20, leaver.leave)
    assert answer.ids() == right
    assert answer.result is not None
    assert leaver.node.name not in [hop.name for hop in answer.result.route]
    leaver.wait()
    if how == "drain":
        assert leaver.found == api.Drained(state="drained", left=1, ended=0)
        assert origin.state() == "ready"  # the others cover everything
        assert drained(leaver.node) == leaver.found  # again: there is nothing to do
        with ControlClient(leaver.node.socket) as client, pytest.raises(Draining):
            client.generate(asked(), lambda delta: None)
    else:
        assert leaver.found == 0


class Leaver:
    """The node at `place` of a route, which is told to leave without anybody waiting for it."""

    def __init__(self, cluster: Cluster, place: int, how: str) -> None:
        self.found: api.Drained | int | None = None  #: what came of it; an exit code
        self._cluster, self._place, self._how = cluster, place, how

    def leave(self, route: list[str]) -> None:
        """Begins it."""
        self.node = self._cluster.nodes[route[self._place]]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.found = drained(self.node) if self._how == "drain" else self.node.terminate(END_S)

    def wait(self) -> None:
        """Waits until it has left."""
        self._thread.join(2 * END_S)
        assert self.found is not None, "it does not leave"


def test_what_was_drained_serves_again_when_asked(cluster: Cluster) -> None:
    origin, node = cluster.nodes["origin"], cluster.nodes["a"]
    assert node.ctl("drain").stdout.startswith("drained: 0 sessions")
    assert node.state() == "drained"
    origin.wait_for(lambda: serving(origin) == set("bcdef"), what="word of the draining")
    rows = {row["name"]: row["state"] for row in origin.ctl_json("map")["rows"]}
    assert rows["a"] == "leaving"
    assert node.ctl_json("drain", "--undo") == {"state": "ready", "left": 0, "ended": 0}
    origin.wait_for(lambda: serving(origin) == set("abcdef"), what="offers of all")


def test_a_session_between_two_turns_goes_on_elsewhere(cluster: Cluster) -> None:
    origin = cluster.nodes["origin"]
    plain, talk = (ask(origin, asked(session=name, max_tokens=20)) for name in ("plain", "talk"))
    assert plain.token_ids == talk.token_ids
    second = {"prompt": "and then", "max_tokens": 20}
    right = ask(origin, asked(session="plain", **second))
    leaver = cluster.nodes[talk.route[1].name]
    assert drained(leaver).ended == 0  # it waits for no turn
    found = ask(origin, asked(session="talk", **second))
    assert found.token_ids == right.token_ids
    assert leaver.name not in [hop.name for hop in found.route]
    origin.ctl("cache", "clear")


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes without a replica."""
    rows = [Row("a", "embed,0-2"), Row("b", "3-5,head")]
    with Cluster(tmp_path_factory.mktemp("pair"), model) as cluster:
        cluster.full_mesh(rows, more="[sessions]\nrecover_s = 1", node={"drain_s": DRAIN_S})
        yield cluster


def test_without_a_replica_an_answer_that_ends_in_time_is_not_disturbed(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    params, right = undisturbed(origin)
    leaver = Leaver(pair, 0, "drain")
    assert Asked(origin, params, TOKENS - 50, leaver.leave).ids() == right
    leaver.wait()
    assert leaver.found == api.Drained(state="drained", left=1, ended=0)
    assert leaver.node.ctl_json("drain", "--undo")["state"] == "ready"
    origin.wait_ready()


@pytest.mark.parametrize("leaving", ["a", "b"])
def test_without_a_replica_what_does_not_end_in_time_fails_by_name(pair: Cluster, leaving: str) -> None:
    leaver = Leaver(pair, 0, "SIGTERM")
    error = ShuttingDown if leaving == "a" else BlocksMissing
    match = "the node is leaving" if leaving == "a" else "3-5,head of model m within 1 s; b had them last"
    with pytest.raises(error, match=match):
        Asked(pair.nodes["a"], ENDLESS, 5, lambda _: leaver.leave([leaving])).ids()
    leaver.wait()
    assert leaver.found == 0
    leaver.node.start()
    for node in pair.nodes.values():
        node.wait_ready()


def test_a_second_signal_waits_for_nobody(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-5,head")], node={"drain_s": 3000})
        node = cluster.nodes["a"]
        answer = Asked(node, ENDLESS, 5, lambda _: node.signal(signal.SIGTERM))
        node.wait_for(lambda: node.state() == "draining", what="draining")
        assert node.terminate(3 * END_S) == 0
        with pytest.raises(ShuttingDown, match="the node is leaving"):
            answer.ids()


def test_all_nodes_are_restarted_under_load(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, model) as cluster:
        origin = cluster.add("origin")
        cluster.full_mesh(TWO_OF_THREE)
        with Load(origin) as load:
            for name in "abc":
                restart(cluster, origin, name)
                load.wait_for_more()
        assert load.errors == []
        assert load.wrong == []
