"""Many clients at once: all are served, with the text that each would get alone."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import psutil
from http_kit import http_node
from user_kit import ANSWER, readable_model, scripted_model

from dgnd.http.server import SPARE_CONNECTIONS

CLIENTS = 100


def test_a_hundred_streaming_clients_are_served(tmp_path: Path) -> None:
    """More than there are sessions: some wait for their turn."""
    models = {"scripted": {"path": str(scripted_model(tmp_path / "m")), "backend": "reference"}}
    sessions = "[sessions]\nmax_sessions = 24\n"
    with http_node(tmp_path / "nodes", models, {"scripted": "embed,0-3,head"}, sessions=sessions) as http:
        texts = anyio.run(_all, http.url, backend="trio")
        assert texts == [ANSWER[start:] for start in _STARTS]
        http.node.wait_for(lambda: http.sessions() == 0, what="an end of all sessions")
        assert "ERROR" not in http.node.log


#: Where in the alphabet each client's prompt ends.
_STARTS = [1 + number % 20 for number in range(CLIENTS)]


async def _all(url: str) -> list[str]:
    texts = [""] * CLIENTS
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:

        async def one(number: int) -> None:
            asked = {
                "model": "scripted",
                "prompt": ANSWER[: _STARTS[number]],
                "max_tokens": 60,
                "stream": True,
            }
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                assert response.status_code == 200
                lines = [line async for line in response.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            events: list[Any] = [msgspec.json.decode(line.removeprefix("data: ")) for line in lines[:-1]]
            texts[number] = "".join(event["choices"][0]["text"] for event in events)

        async with anyio.create_task_group() as tasks:
            for number in range(CLIENTS):
                tasks.start_soon(one, number)
    return texts


def test_connections_on_which_nothing_runs_give_way(tmp_path: Path) -> None:
    models = {"scripted": {"path": str(scripted_model(tmp_path / "m")), "backend": "reference"}}
    with http_node(tmp_path / "nodes", models, {"scripted": "embed,0-3,head"}, "max_requests = 2") as http:
        clients = [http.plain() for _ in range(2 * SPARE_CONNECTIONS)]
        try:
            for client in clients:
                assert client.get("/health").status_code == 200  # and the connection is kept
            assert clients[-1].get("/health").status_code == 200
            assert http.node.process is not None
            port = int(http.url.rpartition(":")[2])
            open_now = [
                each for each in psutil.Process(http.node.process.pid).net_connections("tcp")
                if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port
            ]  # fmt: skip
            assert len(open_now) <= 2 + SPARE_CONNECTIONS
        finally:
            for client in clients:
                client.close()


def test_a_daemon_ends_while_a_client_does_not_read(tmp_path: Path) -> None:
    """What hypercorn sends is shielded; the end of the daemon must not wait for it."""
    model = readable_model(tmp_path / "m", max_positions=4096)
    models = {"endless": {"path": str(model), "backend": "reference"}}
    with http_node(tmp_path / "nodes", models, {"endless": "embed,0-3,head"}) as http:
        host, port = http.url.removeprefix("http://").split(":")
        body = b'{"model": "endless", "prompt": "a", "stream": true, "n": 8, "max_tokens": 4000}'
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            deaf.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            deaf.sendall(head.encode() + body)
            http.node.wait_for(lambda: http.sessions() > 0, what="a session")
            assert http.node.terminate(timeout=60) == 0
