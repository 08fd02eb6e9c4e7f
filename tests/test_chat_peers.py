"""`dgnctl chat` with a peer that dies and with one that is slow, in two sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from seat import Seat
from slow_backend import NAME as SLOW
from slow_backend import slow_site
from user_kit import chat_ids, readable_model

from dgnctl.chat_watch import RouteNews
from dgnctl.token_file import read_ids
from dgnd.control.api import RouteHop

SIZES = [(80, 24), (200, 60)]
#: Of a position on the slow peer; a prompt has about 30.
SLOW_S = 0.4


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """b and c have the same blocks."""
    path = readable_model(tmp_path_factory.mktemp("models") / "long", max_positions=4096)
    rows = [Row("a", "embed,0-1"), Row("b", "2-3,head"), Row("c", "2-3,head")]
    with Cluster(tmp_path_factory.mktemp("nodes"), path) as cluster:
        cluster.full_mesh(rows)
        yield cluster


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """b takes its time."""
    path = readable_model(tmp_path_factory.mktemp("models") / "long", max_positions=4096)
    rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
    environment = slow_site(tmp_path_factory.mktemp("site"), SLOW_S)
    with Cluster(tmp_path_factory.mktemp("nodes"), path) as cluster:
        for name in ("a", "b"):
            cluster.add(name)
        for name, other, backend in (("a", "b", "reference"), ("b", "a", SLOW)):
            models = {"m": {"path": str(path), "backend": backend}}
            cluster.configure(name, rows, [other], models=models)
        cluster.nodes["b"].extra_env.update(environment)
        cluster.start()
        yield cluster


def seated(node: TestNode, *options: str, columns: int, rows: int) -> Seat:
    return Seat("chat", "--socket", str(node.socket), *options, columns=columns, rows=rows)


def stop(seat: Seat) -> None:
    seat.keys(" ")
    seat.shows(r"^\(stopped\)$")
    seat.prompt()


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_a_peer_that_dies_is_one_dim_line(replicas: Cluster, columns: int, rows: int) -> None:
    a = replicas.nodes["a"]
    with seated(a, "--temperature", "0", columns=columns, rows=rows) as seat:
        seat.prompt()
        seat.keys("go\r")
        name = seat.shows(r"^m · a → ([bc]) · .* tok/s .* space stops$")[1]
        victim, other = replicas.nodes[name], "c" if name == "b" else "b"
        victim.kill()
        said = f"({name} (2-3,head) left the answer, which goes on through a → {other})"
        seat.until(lambda: said in seat.rows(), "the line")
        seat.shows(rf"^m · a → {other} · .* tok/s")
        time.sleep(0.5)  # some more of the answer
        stop(seat)
        assert seat.everything().count("left the answer") == 1
        assert b"\x1b[2m" + said.encode() in seat.raw
        seat.say("/save x.csv")
        seat.keys("exit\r")
        assert seat.ends() == 0
    prompt = chat_ids(("user", "go"))
    ids = read_ids(Path("x.csv"))[len(prompt) :]
    assert len(ids) > 10
    undisturbed = a.ctl_json("run", "--temperature", "0", "--max-tokens", str(len(ids)), "go")
    assert undisturbed["token_ids"] == ids  # none lost, none twice
    victim.start()
    victim.wait_ready()
    a.wait_for(lambda: len([each for each in a.status().speeds if each.name == name]) == 1, what=name)


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_a_slow_peer_is_waited_for_in_sight_and_stops_within_a_token(
    slow: Cluster, columns: int, rows: int
) -> None:
    a, b = slow.nodes["a"], slow.nodes["b"]
    prompt = chat_ids(("user", "go"))
    with seated(a, "--temperature", "0", columns=columns, rows=rows) as seat:
        seat.prompt()
        seat.keys("go\r")
        seat.shows(r"waits [2-9] s · .* space stops$")
        seat.until(lambda: len(answer(seat)) >= 3, "three tokens")
        shown = len(answer(seat))
        stop(seat)
        (before,) = [each.position for each in b.status().sessions]
        time.sleep(4 * SLOW_S)
        assert [each.position for each in b.status().sessions] == [before]  # nothing is computed any more
        seat.say("/save x.csv")
        ids = read_ids(Path("x.csv"))
        assert ids[: len(prompt)] == prompt
        assert 0 <= len(ids) - len(prompt) - shown <= 2  # one on its way, and one that b was at
        seat.keys("exit\r")
        assert seat.ends() == 0
    for node in (a, b):
        node.wait_for(lambda node=node: node.status().sessions == [], what="end of the session")


def answer(seat: Seat) -> str:
    """What is shown between what was said and the status line; a token is a character."""
    rows = seat.rows()
    begin = rows.index("> go")
    return "".join(row for row in rows[begin + 1 :] if "space stops" not in row)


def test_news_of_a_route_are_told_once() -> None:
    a, b, c = (
        RouteHop(name * 8, name, span) for name, span in (("a", "embed,0-1"), ("b", "2-3"), ("c", "2-3"))
    )
    news = RouteNews()
    assert news.route([a, b]) == ""
    assert news.route([a, b]) == ""
    assert news.waits("b died") == "b died"
    assert news.waits("b died") == ""
    assert news.route([a, c]) == "b (2-3) left the answer, which goes on through a → c"
    assert news.route([a, c]) == ""
    assert news.waits("b died") == "b died"  # another time
    assert news.route([a, c, b]) == "the answer goes on through a → c → b"
