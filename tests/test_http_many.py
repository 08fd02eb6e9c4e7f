"""Many clients at once: all are served, with the text that each would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
from http_kit import http_node
from user_kit import ANSWER, scripted_model

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
