"""`GET /health`: the daemon answers. `GET /ready`: it can answer prompts. Both without an API key."""

from __future__ import annotations

import msgspec

from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import json_answer


class Health(msgspec.Struct, frozen=True):
    """The daemon answers."""

    status: str = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """Whether every model can be asked; else the blocks of each that nobody serves now."""

    ready: bool
    state: str
    missing: dict[str, str]


async def greeting(exchange: Exchange, _desk: Desk) -> None:
    """For people who open the address, and clients that look whether anything is there."""
    await exchange.whole(200, "text/plain; charset=utf-8", b"dgnd is running\n", {})


async def health(exchange: Exchange, _desk: Desk) -> None:
    """200 as long as the daemon's event loop runs."""
    await json_answer(exchange, Health())


async def ready(exchange: Exchange, desk: Desk) -> None:
    """200 when every model can be asked, else 503."""
    status = await desk.service.status()
    good = status.state == "ready"
    await json_answer(exchange, Readiness(good, status.state, status.missing), 200 if good else 503)
