"""Real nodes that choose their blocks themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from disturbed import asked
from tiny_llama import make_tiny_llama

from dgn_backends.hf_config import read_config
from dgnd.control.client import ControlClient
from dgnd.models.sizes import read_sizes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=6, max_positions=4096)


def offered(node: TestNode, name: str) -> str:
    with ControlClient(node.socket) as client:
        return "".join(row.offered for row in client.call("map.show").rows if row.name == name)


def ids(node: TestNode, wait: float = 0.0) -> list[int]:
    with ControlClient(node.socket) as client:
        return client.generate(asked(max_tokens=30, wait=wait), lambda delta: None).token_ids


def notes(node: TestNode) -> str:
    with ControlClient(node.socket) as client:
        return "\n".join(client.call("status").notes)


def room(model: Path, units: range) -> int:
    return read_sizes(model, read_config(model), "none").of(units)


def test_a_node_takes_over_what_a_killed_one_served(model: Path, tmp_path: Path) -> None:
    """It has chosen the blocks that only one other node had, and leaves them for those that nobody has."""
    with Cluster(tmp_path, model) as cluster:
        rows = [Row("a", "3-5,head"), Row("b", "embed,0-2")]
        for name in "abc":
            cluster.add(name)
        for name in "abc":
            own = [Row("c", "auto", max_bytes=room(model, range(4, 8)))] if name == "c" else []
            cluster.configure(name, [*rows, *own], [other for other in "abc" if other != name])
        cluster.start()
        a, b, c = (cluster.nodes[name] for name in "abc")
        assert offered(c, "c") == "3-5,head"
        assert "m chose 3-5,head itself, since only 1 other node had 3-5,head" in notes(c)
        a.wait_for(lambda: offered(a, "c") == "3-5,head", what="offer of c")
        assert "chosen by the node itself" in a.ctl("map").stdout
        right = ids(a)
        b.kill()
        c.wait_for(lambda: "m: nobody has had embed,0-2 for" in notes(c), what="note of the gap")
        assert ids(a, wait=90.0) == right
        c.wait_for(lambda: offered(c, "c") == "embed,0-2", what="its own view")
        assert "chose embed,0-2 itself, since nobody else had embed,0-2" in c.ctl("map").stdout
        b.start()
        b.wait_ready()
        assert offered(c, "c") == "embed,0-2"
        assert "nobody has had" not in notes(c)


def test_rows_change_while_a_node_runs(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, model) as cluster:
        for name in "ab":
            cluster.add(name)
        cluster.configure("a", [Row("a", "embed,0-2")], ["b"])
        cluster.configure("b", [Row("b", "auto", max_bytes=room(model, range(4, 8)))], ["a"])
        cluster.start()
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        assert offered(b, "b") == "3-5,head"
        right = ids(a)
        for rows, span in (
            ([Row("b", "auto", max_bytes=room(model, range(8)))], "embed,0-5,head"),
            ([Row("b", "2-5,head")], "2-5,head"),
            ([Row("b", "auto", max_bytes=room(model, range(5, 8)))], "4-5,head"),
            ([], ""),
            ([Row("b", "auto", max_bytes=room(model, range(4, 8)))], "3-5,head"),
        ):
            cluster.configure("b", rows, ["a"])
            b.ctl("reload")
            b.wait_for(lambda: offered(b, "b") == span, what=f"choice of {span}")  # noqa: B023 - at once
        a.wait_for(lambda: offered(a, "b") == "3-5,head", what="offer of b")
        assert ids(a) == right
        cluster.configure("b", [Row("b", "auto", max_bytes=7)], ["a"])
        assert "max_bytes is 7, and a block of" in b.ctl("reload", check=False).stderr
        assert offered(b, "b") == "3-5,head"
