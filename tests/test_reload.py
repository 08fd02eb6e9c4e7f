"""Real nodes whose configuration changes while they are used: by `dgnctl reload` and by SIGHUP."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from disturbed import asked
from load import TWO_OF_THREE, Load, serving
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import ConfigError, NotFound


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=6, max_positions=4096)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An origin without blocks, and three nodes of which any two have the whole model."""
    with Cluster(tmp_path_factory.mktemp("four"), model) as cluster:
        cluster.add("origin")
        cluster.full_mesh(TWO_OF_THREE)
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """As it was begun with, whatever the test before wrote."""
    for name, node in running.nodes.items():
        others = [other for other in running.nodes if other != name]
        running.configure(name, TWO_OF_THREE, others)
        settled(node)
        node.ctl("reload")
        settled(node)
    origin = running.nodes["origin"]
    origin.wait_for(lambda: serving(origin) == set("abc"), what="offers of all")
    return running


def settled(node: TestNode) -> None:
    """Waits until nothing of a reload is left to be done."""
    node.wait_for(lambda: not any("reload:" in note for note in notes(node)), what="end of the reload")


def notes(node: TestNode) -> list[str]:
    with ControlClient(node.socket) as client:
        return list(client.call("status").notes)


def offered(origin: TestNode, name: str) -> str:
    with ControlClient(origin.socket) as client:
        return "".join(row.offered for row in client.call("map.show").rows if row.name == name)


def others_of(cluster: Cluster, name: str) -> list[str]:
    return [other for other in cluster.nodes if other != name]


def reload(node: TestNode) -> api.Reloaded:
    with ControlClient(node.socket) as client:
        return client.call("reload")


def respan(cluster: Cluster, name: str, span: str) -> None:
    """Gives a node other blocks, and waits until the origin sees them and the node is done."""
    node, origin = cluster.nodes[name], cluster.nodes["origin"]
    rows = [row for row in TWO_OF_THREE if row.peer != name]
    cluster.configure(name, [*rows, *([Row(name, span)] if span else [])], others_of(cluster, name))
    assert reload(node).changed == ["m is loaded anew", "blocks"]
    origin.wait_for(lambda: offered(origin, name) == span, what=f"offer of {span} by {name}")
    settled(node)


def test_blocks_are_added_and_given_up_under_load(cluster: Cluster) -> None:
    with Load(cluster.nodes["origin"]) as load:
        for span in ("embed,0-5,head", "2-4", "", "embed,0-3"):
            respan(cluster, "a", span)
            load.wait_for_more(4)
    assert load.errors == []
    assert load.wrong == []
    assert len(cluster.nodes["a"].worker_pids()) == 1


def test_the_only_node_with_some_blocks_changes_workers_in_mid_answer(model: Path, tmp_path: Path) -> None:
    """Its own answers, too: the new worker takes them over from the old one."""
    with Cluster(tmp_path, model) as pair:
        pair.full_mesh([Row("a", "embed,0-2"), Row("b", "3-5,head")])
        with Load(pair.nodes["a"], sessions=2) as load:
            for name in "ab":
                node = pair.nodes[name]
                (before,) = node.worker_pids()
                text = node.config.read_text()
                node.config.write_text(text.replace("[models.m]", "[models.m]\nthreads = 1"))
                assert reload(node).changed == ["m is loaded anew", "models.m"]
                settled(node)
                (after,) = node.worker_pids()
                assert before != after
                load.wait_for_more(4)
    assert load.errors == []
    assert load.wrong == []


def test_peers_come_and_go_under_load(cluster: Cluster) -> None:
    origin = cluster.nodes["origin"]
    with Load(origin) as load:
        cluster.configure("origin", [row for row in TWO_OF_THREE if row.peer != "c"], ["a", "b"])
        assert reload(origin).changed == ["peer c is let go", "blocks"]
        settled(origin)
        assert {peer["name"] for peer in origin.ctl_json("peers")} == {"a", "b"}
        load.wait_for_more(4)
        cluster.configure("origin", TWO_OF_THREE, ["a", "b", "c"])
        assert reload(origin).changed == ["new peer c", "blocks"]
        origin.wait_for(lambda: serving(origin) == set("abc"), what="offer of c")
        cluster.configure("b", TWO_OF_THREE, ["a", "c"])  # a peer lets the origin go
        assert reload(cluster.nodes["b"]).changed == ["peer origin is let go"]
        origin.wait_for(lambda: serving(origin) == set("ac"), what="loss of b")
        load.wait_for_more(4)
    assert load.errors == []
    assert load.wrong == []


def test_models_come_and_go_under_load(cluster: Cluster, model: Path) -> None:
    node = cluster.nodes["a"]
    two = {name: {"path": str(model), "backend": "reference"} for name in ("m", "second")}
    with Load(cluster.nodes["origin"]) as load, ControlClient(node.socket) as client:
        rows = [*TWO_OF_THREE, Row("a", "embed,0-5,head", "second")]
        cluster.configure("a", rows, others_of(cluster, "a"), models=two)
        assert reload(node).changed == ["new model second", "blocks"]
        params = asked(model="second", session="s", max_tokens=5, wait=60.0)
        assert len(client.generate(params, lambda delta: None).token_ids) > 0
        cluster.configure("a", TWO_OF_THREE, others_of(cluster, "a"))
        assert reload(node).changed == ["model second is given up", "blocks"]
        settled(node)
        with pytest.raises(NotFound, match="no model 'second' is configured"):
            client.generate(params, lambda delta: None)
        assert len(node.worker_pids()) == 1
        load.wait_for_more(4)
    assert load.errors == []
    assert load.wrong == []


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ('[peers.x]\nid = "nobody"', r"dgn.toml:\d+:1: .*dgnd init"),
        ('[[blocks]]\nmodel = "m"\npeer = "self"\nspan = "7"', r'dgn.toml:\d+:1: model "m"'),
        ('[[blocks]]\nmodel = "m"\npeer = "self"\nspan = "3-4"', r"dgn.toml:\d+:1: an earlier row"),
        ('[models.n]\npath = "/nowhere"', r"dgn.toml:\d+:1: .*/nowhere"),
        ("[nodes]", r'dgn.toml:\d+:2: unknown key "nodes"; did you mean "node"'),
    ],
)
def test_what_is_wrong_changes_nothing(cluster: Cluster, bad: str, match: str) -> None:
    node, origin = cluster.nodes["a"], cluster.nodes["origin"]
    rows = [*(row for row in TWO_OF_THREE if row.peer != "a"), Row("a", "2-4")]
    before, pids = node.log, node.worker_pids()
    cluster.configure("a", rows, others_of(cluster, "a"), more=bad)
    with pytest.raises(ConfigError, match=match):
        reload(node)
    node.signal(signal.SIGHUP)
    node.wait_for(lambda: "stays as it was" in node.log[len(before) :], what="line of the log")
    assert re.search(match, node.log[len(before) :])
    assert node.worker_pids() == pids
    assert offered(origin, "a") == "embed,0-3"


def test_what_needs_a_restart_is_named_and_the_rest_counts(cluster: Cluster) -> None:
    node = cluster.nodes["a"]
    text = node.config.read_text()
    text = re.sub(r"listen = .*", 'listen = ["/ip4/127.0.0.1/tcp/1"]', text)
    text = text.replace('name = "a"', 'name = "other"').replace("[control]", "drain_s = 2.5\n[control]")
    node.config.write_text(text + "[sessions]\nmax_sessions = 5\n")
    assert reload(node) == api.Reloaded(
        ["node.drain_s", "sessions.max_sessions"], ["node.name", "node.listen"]
    )
    assert node.ctl("reload").stdout == (
        "nothing else changed\nafter a restart of dgnd only: node.name, node.listen\n"
    )


def test_a_hangup_signal_reloads(cluster: Cluster) -> None:
    node, origin = cluster.nodes["a"], cluster.nodes["origin"]
    rows = [*(row for row in TWO_OF_THREE if row.peer != "a"), Row("a", "2-4")]
    cluster.configure("a", rows, others_of(cluster, "a"))
    node.signal(signal.SIGHUP)
    origin.wait_for(lambda: offered(origin, "a") == "2-4", what="other blocks of a")
