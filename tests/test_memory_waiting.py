"""An answer that waits for memory beside another one: who asked is told its place, at every door."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from http_kit import HttpNode, http_node
from seat import Seat
from slow_backend import NAME as SLOW
from slow_backend import slow_site
from user_kit import readable_model

from dgn_backends.hf_config import read_config
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import NoRoomNow
from dgnd.worker.kv_budget import PAGE_POSITIONS

WAITS = "[limits]\nwaiting = 2\nwait_s = 600"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    """A slow node with memory for the KV cache of one answer."""
    directory = tmp_path_factory.mktemp("narrow")
    path = readable_model(directory / "m", max_positions=1024)
    block = read_config(path).block
    page = PAGE_POSITIONS * 4 * 2 * block.n_kv_heads * block.head_dim * 4  # of four blocks, in f32
    models = {"m": {"path": str(path), "backend": SLOW, "kv_bytes": page * 3 // 2}}
    site = slow_site(directory / "site", 0.3)
    with http_node(directory / "nodes", models, {"m": "embed,0-3,head"}, sessions=WAITS, env=site) as http:
        yield http


@contextmanager
def full(http: HttpNode) -> Iterator[None]:
    """Meanwhile an answer has the memory; it would go on for a minute and more."""
    with ControlClient(http.node.socket) as client:
        stream = client.start_generate(api.GenerateParams(prompt="a", raw=True, max_tokens=220))
        stream.wait()
        yield


def waiting(http: HttpNode) -> int:
    return sum(each.waiting is not None for each in http.node.status().sessions)


def test_a_stream_says_its_place_and_official_clients_pass_over_it(narrow: HttpNode) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": "b", "stream": True, "max_tokens": 2, "temperature": 0.0}
    texts: list[str] = []

    def official() -> None:
        with narrow.openai() as client:
            pieces = client.completions.create(**asked)
            texts.append("".join(piece.choices[0].text for piece in pieces))

    other = threading.Thread(target=official)
    with narrow.plain() as plain:
        with full(narrow):
            response = plain.send(plain.build_request("POST", "/v1/completions", json=asked), stream=True)
            lines = response.iter_lines()
            assert next(lines) == ": waiting for memory: 0 ahead"
            other.start()
            narrow.node.wait_for(lambda: waiting(narrow) == 2, what="two that wait")
        events = [line for line in lines if line and not line.startswith(":")]
        response.close()
    other.join(120)
    assert all(line.startswith("data: ") for line in events)
    assert events[-1] == "data: [DONE]"
    assert len(texts[0]) == 2


def test_run_says_it_at_a_terminal(narrow: HttpNode) -> None:
    with Seat("--socket", str(narrow.node.socket), "run", "--raw", "--max-tokens", "2", "b") as seat:
        with full(narrow):
            seat.shows(r"^\(waiting for memory: 0 ahead\)$")
        assert b"\x1b[2m(waiting" in seat.raw
        while seat.feed():
            pass
        seat.child.close()
        assert seat.child.exitstatus == 0
        assert len(seat.rows()[1]) == 2


def test_who_waited_in_vain_is_refused_with_the_numbers(narrow: HttpNode) -> None:
    config = narrow.node.config.read_text()
    narrow.node.config.write_text(config.replace("wait_s = 600", "wait_s = 0.5"))
    try:
        narrow.node.ctl("reload")
        with full(narrow), ControlClient(narrow.node.socket) as client, pytest.raises(NoRoomNow) as error:
            client.generate(api.GenerateParams(prompt="b", raw=True, max_tokens=2), lambda _: None)
        with full(narrow), narrow.plain() as plain:
            asked = {"model": "m", "prompt": "b", "max_tokens": 2}
            response = plain.post("/v1/completions", json=asked)
    finally:
        narrow.node.config.write_text(config)
        narrow.node.ctl("reload")
    assert "it waited 0.5 s (wait_s in [limits]), 0 ahead of it" in error.value.message
    assert response.status_code == 429
    assert "it waited 0.5 s (wait_s in [limits]), 0 ahead of it" in response.json()["error"]["message"]
    data = error.value.data
    needed, budget, held = (data[name] for name in ("needed", "budget", "held"))
    assert isinstance(needed, int)
    assert isinstance(budget, int)
    assert isinstance(held, int)
    assert needed > budget - held >= 0
    for number in (needed, budget, held, budget - held):
        assert f" {number:,}" in error.value.message
