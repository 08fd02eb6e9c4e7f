"""`dgnctl top`: what it shows of looks at a node, and a real one at a terminal and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from echo_service import EchoDaemon
from seat import Seat
from tiny_llama import make_tiny_llama

from dgnctl.cli import run_command
from dgnctl.top_view import Look, describe, rates
from dgnd.control import api
from dgnd.control.client import ControlClient


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    with Cluster(tmp_path_factory.mktemp("top"), model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-3,head")])
        yield cluster.nodes["a"]


def look(at: float, *generated: int, prompt: int = 0) -> Look:
    route = [api.RouteHop("me", "a", "embed,0-3,head")]
    sessions = [
        api.SessionStatus(f"s{i}", "m", "me", prompt + tokens, 0, route, generated=tokens)
        for i, tokens in enumerate(generated)
    ]
    status = api.Status("1", 1, "me", "a", "ready", [], {}, sessions)
    peers = [api.PeerInfo(f"p{i}", f"peer-{i}", "connected", [], 1.0, []) for i in range(30)]
    return Look(at, status, peers)


def test_speeds_are_of_what_came_between_two_looks() -> None:
    found = rates(look(10.0, 100, 50, 9), look(12.0, 110, 40, 9, 7))
    assert found == {"s0": 5.0, "s1": 0.0, "s2": 0.0, "s3": 0.0}
    assert rates(look(1.0, 1), look(1.0, 9)) == {"s0": 0.0}  # no time has passed
    assert rates(look(1.0, 1), look(2.0, 3, prompt=4000)) == {"s0": 2.0}  # a prompt is not generated


def test_a_prompt_is_no_token_a_second(node: TestNode) -> None:
    with ControlClient(node.socket) as client:
        for tokens in (3, 6):
            turn = api.GenerateParams(token_ids=list(range(5, 65)), session="s", max_tokens=3)
            client.generate(turn, lambda _: None)
            (found,) = node.status().sessions
            assert (found.generated, found.position) == (tokens, 63)
        client.call("cache.clear", api.CacheClearParams(session="s"))


def test_lists_are_cut_to_the_screen_and_the_busiest_stay() -> None:
    before, now = look(0.0, *[10] * 30), look(1.0, *[10] * 29, 18)
    lines = describe(before, now, rows=23).splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert "8.0 tok/s" in lines[0]
    assert any(line.startswith("s29 ") for line in lines)
    assert sum(" more" in line for line in lines) == 2


@pytest.mark.parametrize("interval", ["nan", "inf", "0", "soon"])
def test_what_is_no_interval_is_said(capsys: pytest.CaptureFixture[str], interval: str) -> None:
    assert run_command(["top", "--interval", interval]) == 2
    assert "--interval" in capsys.readouterr().err


def test_without_a_terminal_it_prints_once(node: TestNode) -> None:
    shown = node.ctl("top", "--interval", "0.2").stdout
    assert shown.startswith("a: ready   0.0 tok/s   0 sessions")
    assert "embed,0-3,head" in shown
    assert "\x1b" not in shown
    found = json.loads(node.ctl("top", "--interval", "0.2", "--json").stdout)
    assert (found["status"]["name"], found["peers"], found["tokens_per_s"]) == ("a", [], {})


def test_at_a_terminal_it_goes_on_until_ctrl_c(node: TestNode) -> None:
    with Seat("--socket", str(node.socket), "top", "--interval", "0.2", columns=80, rows=24) as seat:
        seat.shows("a: ready")
        assert "embed,0-3,head" in "\n".join(seat.rows())
        seat.keys("\x03")
        assert seat.ends() != 0
    assert b"Traceback" not in seat.raw


def test_it_goes_on_with_the_next_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with EchoDaemon(path):
        seat = Seat("--socket", str(path), "top", "--interval", "0.2").__enter__()
        seat.shows("desk: degraded")
    with seat:
        seat.shows("its next start is waited for")
        with EchoDaemon(path):
            seat.shows("desk: degraded")
            seat.keys("\x03")
            assert seat.ends() == 130


def test_a_node_that_is_gone_is_one_line(tmp_path: Path, node: TestNode) -> None:
    done = TestNode("x", tmp_path, 0).ctl("top", check=False)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in done.stderr
