"""Real daemons: a node whose backend became slow is left at the next answer, and status shows why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cluster import Cluster, Row, TestNode
from plugin_site import Site
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient

FAST_S, SLOW_S = 0.005, 0.2
#: Takes as long for a batch as the file says.
BACKEND = """
import os, pathlib, time
from dgn_backends.reference import ReferenceBackend

class Dragging:
    name = "dragging"
    def devices(self): return ["cpu"]
    def load(self, request, progress):
        runner, file = ReferenceBackend().load(request, progress), pathlib.Path(os.environ["DRAG_FILE"])
        forward = runner.forward
        def slow(steps):
            time.sleep(float(file.read_text()))
            return forward(steps)
        runner.forward = slow
        return runner
"""


@dataclass
class Replicas:
    """Node "a" begins, "b" and "c" have the same blocks."""

    cluster: Cluster

    @property
    def origin(self) -> TestNode:
        return self.cluster.nodes["a"]

    def drag(self, name: str, seconds: float) -> None:
        file = self.cluster.nodes[name].directory / "drag"
        file.with_suffix(".new").write_text(str(seconds))
        file.with_suffix(".new").rename(file)

    def answer(self, session: str | None = None, tokens: int = 20) -> str:
        """The node that computed an answer's blocks."""
        with ControlClient(self.origin.socket) as client:
            params = api.GenerateParams(
                prompt="hello", raw=True, max_tokens=tokens, session=session, temperature=1.0
            )
            result = client.generate(params, lambda _: None)
        assert result.exact
        return result.route[-1].name

    def step_ms(self, name: str) -> float | None:
        """What the origin knows of a node's speed."""
        with ControlClient(self.origin.socket) as client:
            status = client.call("status")
        (node,) = [node for node in status.speeds if node.name == name]
        (figures,) = node.figures
        found: float | None = figures.step_ms
        return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    directory = tmp_path_factory.mktemp("replicas")
    site = Site(directory / "site")
    site.add("dragging-backend", {"dragging": "dragging_backend:Dragging"}, {"dragging_backend": BACKEND})
    model = make_tiny_llama(directory / "model", n_blocks=4, max_positions=2048, eos=[])
    with Cluster(directory / "nodes", model, backend="dragging") as cluster:
        found = Replicas(cluster)
        for name in "abc":
            node = cluster.add(name)
            node.extra_env |= {**site.environment, "DRAG_FILE": str(node.directory / "drag")}
            found.drag(name, FAST_S)
        cluster.full_mesh([Row("a", "embed"), Row("b", "0-3,head"), Row("c", "0-3,head")])
        yield found


def test_a_node_that_became_slow_is_left_at_the_next_answer_and_status_shows_why(replicas: Replicas) -> None:
    origin = replicas.origin
    origin.wait_for(lambda: replicas.answer() and all(map(replicas.step_ms, "bc")), what="figures of both")
    first = replicas.answer("long")
    other = "c" if first == "b" else "b"
    replicas.drag(first, SLOW_S)
    replicas.answer("long")
    origin.wait_for(lambda: (replicas.step_ms(first) or 0.0) > 500 * SLOW_S, what="the slow node's figure")
    assert replicas.answer("long") == other
    assert f"session long moves to a embed, {other} 0-3,head" in origin.log
    assert {replicas.answer() for _ in range(5)} == {other}

    lines = {tuple(line.split()[:3]): line.split() for line in origin.ctl("status").stdout.splitlines()}
    slow, fast = lines["m", first, "0-3,head"], lines["m", other, "0-3,head"]
    assert float(slow[3]) > 500 * SLOW_S
    assert float(slow[3]) > 2 * float(fast[3]) > 0
    assert float(slow[7]) > 0  # the round trip
    shown = {row["name"]: row for row in origin.ctl_json("map")["rows"]}
    assert shown[first]["figures"][0]["step_ms"] > 500 * SLOW_S


def test_what_the_nodes_between_them_measured_is_shown(replicas: Replicas) -> None:
    def trips() -> Any:
        return {peer["name"]: peer["trips"] for peer in replicas.origin.ctl_json("peers")}

    replicas.origin.wait_for(lambda: all(len(to) == 2 for to in trips().values()), what="round trips")
    found = trips()
    assert found["b"].keys() == {"a", "c"}
    assert found["c"].keys() == {"a", "b"}
    assert all(0 < trip < 1000 for to in found.values() for trip in to.values())
    (peer,) = [peer for peer in replicas.origin.ctl_json("peers") if peer["name"] == "b"]
    figures = peer["offers"][0]["figures"][0]
    assert figures["span"] == "0-3,head"
    assert figures["step_ms"] is not None
    assert figures["free_kv"] > 1000
