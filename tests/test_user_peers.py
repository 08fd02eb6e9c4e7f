"""Nodes that meet, or don't, as their operators see it: refusals, connect, disconnect, the map.

a lists b and c. b lists nobody, and its file holds only its own row. c lists a, overlaps with a and b, and
serves other blocks than a's row says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Row, TestNode
from user_kit import Dgnctl, readable_model, spans

ROWS = {
    "a": [Row("a", "embed,0-1"), Row("b", "2-3,head"), Row("c", "2")],
    "b": [Row("b", "2-3,head")],
    "c": [Row("c", "1-2")],
}
LISTED = {"a": ["b", "c"], "b": [], "c": ["a"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = readable_model(tmp_path_factory.mktemp("model") / "m")
    with Cluster(tmp_path_factory.mktemp("nodes"), model) as cluster:
        for name in ROWS:
            cluster.add(name)
        for name, rows in ROWS.items():
            cluster.configure(name, rows, LISTED[name])
            cluster.nodes[name].start()
        for node in cluster.nodes.values():
            node.wait_for(lambda node=node: own_worker_ready(node), what="worker")
        yield cluster


@pytest.fixture
def ctl(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> dict[str, Dgnctl]:
    return {name: Dgnctl(node, capfd) for name, node in cluster.nodes.items()}


def own_worker_ready(node: TestNode) -> bool:
    """Loaded, and its files known by digest."""
    return node.ctl_json("status", check=False).get("state") in ("ready", "degraded")


def peer(node: TestNode, other: TestNode) -> Any:
    """What `peers --json` says of one."""
    found = [item for item in node.ctl_json("peers") if item["id"] == other.peer_id]
    return found[0] if found else {"state": "unknown"}


def wait_state(node: TestNode, other: TestNode, state: str) -> Any:
    node.wait_for(lambda: peer(node, other)["state"] == state, what=f"{state} {other.name}")
    return peer(node, other)


def test_one_lists_the_other_who_does_not(cluster: Cluster, ctl: dict[str, Dgnctl]) -> None:
    """From the refusal, with nothing but what it says, to a working pair; until the daemon ends."""
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    refused = wait_state(a, b, "refused")
    line = f"dgnctl connect {a.address}"
    said = f"b closed the connection: it probably doesn't list this node; run there: {line}"
    assert refused["detail"] == said
    assert said in ctl["a"]("peers")[1]
    a.wait_for(lambda: a.ctl_json("status")["missing"] == {"m": "3,head"}, what="all but b")
    assert said in a.ctl_json("status")["notes"]
    assert a.address in ctl["a"]("status")[1]  # whole, to be copied
    assert "b refused this node" in ctl["a"].error("run", "hello")["message"]
    assert "1 turned away here" in ctl["b"]("status")[1]

    (record,) = b.ctl_json("peers", "--refused")
    assert record["id"] == a.peer_id
    assert record["addr"].startswith("/ip4/127.0.0.1/tcp/")
    assert tomllib.loads(record["paste"])["peers"].popitem()[1]["id"] == a.peer_id
    _, shown, _ = ctl["b"]("peers", "--refused")
    assert record["paste"] in shown
    assert "dgnctl connect" in shown
    assert "1 refused" in ctl["b"]("peers")[1]

    error = ctl["a"].error("connect", b.address)
    assert error["kind"] == "peer_refused"
    assert line in error["message"]

    code, out, err = ctl["b"](*line.split()[1:])
    assert (code, err) == (0, "")
    assert out == "connected: a offers m embed,0-1\n"
    wait_state(a, b, "connected")
    for node in (a, b):
        node.wait_ready()
    results = [ctl[name].run("hello", "--max-tokens", "8") for name in "ab"]
    assert results[0]["token_ids"] == results[1]["token_ids"]
    assert spans(results[0]) == spans(results[1]) == [("a", "embed,0-1"), ("b", "2-3,head")]
    assert b.ctl_json("peers", "--refused") == []
    assert set(peer(b, a)) >= {"id", "name", "state", "addrs", "rtt_ms", "offers"}
    assert peer(b, a)["offers"][0]["spans"] == "embed,0-1"

    assert b.terminate() == 0
    b.start()
    wait_state(a, b, "refused")


def test_disconnect_and_connect_again(cluster: Cluster, ctl: dict[str, Dgnctl]) -> None:
    a, c = cluster.nodes["a"], cluster.nodes["c"]
    wait_state(a, c, "connected")
    assert ctl["a"]("disconnect", "c") == (0, "disconnected from c\n", "")
    assert peer(a, c)["state"] == "unreachable"
    assert "dgnctl connect" in peer(a, c)["detail"]
    wait_state(c, a, "refused")  # it dials again, and isn't let in
    (record,) = [item for item in a.ctl_json("peers", "--refused") if item["id"] == c.peer_id]
    assert "disconnected here" in record["reason"]
    code, out, _ = ctl["a"]("connect", c.address)
    assert (code, out) == (0, "connected: c offers m 1-2\n")
    wait_state(c, a, "connected")
    error = ctl["a"].error("disconnect", "nosuch")
    assert (error["kind"], error["exit"]) == ("not_found", 2)
    assert "dgnctl peers" in error["message"]


def test_another_identity_than_named(cluster: Cluster, ctl: dict[str, Dgnctl]) -> None:
    a, b, c = cluster.nodes.values()
    wrong = f"/ip4/127.0.0.1/tcp/{a.port}/p2p/{b.peer_id}"
    error = ctl["c"].error("connect", wrong)
    assert (error["kind"], error["exit"]) == ("identity_mismatch", 7)
    assert a.peer_id in error["message"]
    assert b.peer_id in error["message"]
    assert peer(c, b)["state"] == "unknown"  # a mistyped id is not kept
    wait_state(c, a, "connected")


def test_names_of_dns(cluster: Cluster, ctl: dict[str, Dgnctl]) -> None:
    """b and c don't list each other: c is told so; when b's operator connects, by name, both are."""
    b, c = cluster.nodes["b"], cluster.nodes["c"]
    named = f"/dns4/localhost/tcp/{b.port}/p2p/{b.peer_id}"
    error = ctl["c"].error("connect", named)
    assert error["kind"] == "peer_refused"
    assert error["message"] == (
        f"localhost:{b.port} closed the connection: it probably doesn't list this node; "
        f"run there: dgnctl connect {c.address}"
    )
    code, out, _ = ctl["b"]("connect", f"/dns4/localhost/tcp/{c.port}/p2p/{c.peer_id}")
    assert (code, out) == (0, "connected: c offers m 1-2\n")
    assert wait_state(c, b, "connected")["name"] == "b"
    ctl["b"]("disconnect", "c")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/ip4/127.0.0.1/tcp/4001", "p2p"),
        ("127.0.0.1:4001", "/ip4/"),
        ("/dns4/no-such-host.invalid/tcp/4001/p2p/{b}", "no-such-host.invalid"),
        ("/ip4/127.0.0.1/tcp/1/p2p/{b}", "127.0.0.1"),
        ("/ip4/127.0.0.1/tcp/1/p2p/{c}", "this node itself"),
    ],
)
def test_connect_that_can_not_work(
    cluster: Cluster, ctl: dict[str, Dgnctl], address: str, words: str
) -> None:
    error = ctl["c"].error(
        "connect", address.format(**{name: node.peer_id for name, node in cluster.nodes.items()})
    )
    assert words in error["message"]
    assert "Traceback" not in cluster.nodes["c"].log


def test_the_map_shows_where_my_rows_and_live_offers_differ(cluster: Cluster, ctl: dict[str, Dgnctl]) -> None:
    a, c = cluster.nodes["a"], cluster.nodes["c"]
    wait_state(a, c, "connected")
    a.wait_for(lambda: peer(a, c)["offers"], what="offers of c")
    rows = {row["name"]: row for row in a.ctl_json("map")["rows"]}
    assert (rows["c"]["span"], rows["c"]["offered"], rows["c"]["state"]) == (
        "2",
        "1-2",
        "differs from this map",
    )
    assert (rows["a"]["span"], rows["a"]["offered"], rows["a"]["state"]) == (
        "embed,0-1",
        "embed,0-1",
        "ready",
    )
    _, shown, _ = ctl["a"]("map")
    (line,) = [line for line in shown.splitlines() if line.split()[:2] == ["m", "c"]]
    assert line.split()[2:4] == ["2", "1-2"]
    assert line.endswith("differs from this map")
    # c's word counts: with b away, block 2 is there, and 3 is not
    a.wait_for(lambda: a.ctl_json("status")["missing"] == {"m": "3,head"}, what="all but b")
    assert a.ctl_json("map")["missing"] == {"m": "3,head"}


@pytest.mark.parametrize(("name", "missing"), [("a", ""), ("b", "embed,0-1"), ("c", "embed,0,3,head")])
def test_check_warns_of_what_no_row_serves(cluster: Cluster, name: str, missing: str) -> None:
    """Overlaps are legal, and so is a file with nothing but its own row."""
    check = [sys.executable, "-m", "dgnd", "check", "--config", str(cluster.nodes[name].config)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("warning" in done.stdout) == bool(missing)
    assert f"no row of this file serves {missing}" in done.stdout or not missing


def test_a_lonely_node_says_what_is_missing(cluster: Cluster, ctl: dict[str, Dgnctl]) -> None:
    b = cluster.nodes["b"]
    b.wait_for(lambda: own_worker_ready(b), what="worker")
    status = b.ctl_json("status")
    assert (status["state"], status["missing"]) == ("degraded", {"m": "embed,0-1"})
    assert "embed,0-1" in ctl["b"]("status")[1]
    assert ctl["b"].error("run", "hello")["data"]["missing"] == "embed,0-1"


def test_a_replica_is_used_where_the_other_is_gone(tmp_path: Path) -> None:
    """Both b and c have the second half: with b dead the same answer comes through c."""
    model = readable_model(tmp_path / "m")
    with Cluster(tmp_path, model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-1"), Row("b", "2-3,head"), Row("c", "1-3,head")])
        a = cluster.nodes["a"]
        first = a.run("hello", "--max-tokens", "8")
        used = cluster.nodes[spans(first)[1][0]]
        used.kill()
        a.wait_for(lambda: peer(a, used)["state"] != "connected", what="notice of the death")
        second = a.run("hello", "--max-tokens", "8")
        assert second["token_ids"] == first["token_ids"]
        assert {name for name, _ in spans(first)} | {name for name, _ in spans(second)} == {"a", "b", "c"}
        assert json.loads(a.ctl("status", "--json").stdout)["missing"] == {}
