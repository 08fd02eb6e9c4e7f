"""`GET /v1/models`: the models that can be asked."""

from __future__ import annotations

import time

from dgnd.errors import NotFound
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import json_answer
from dgnd.http.openai.answers import Model, ModelList

_SINCE = int(time.time())


async def models(exchange: Exchange, desk: Desk) -> None:
    """All of them."""
    found = await desk.service.models_list()
    await json_answer(exchange, ModelList([Model(model.name, _SINCE) for model in found]))


async def model(exchange: Exchange, desk: Desk) -> None:
    """One, by its name."""
    name = exchange.path["model"]
    names = [item.name for item in await desk.service.models_list()]
    if name not in names:
        raise NotFound(
            f"no model {name!r} is configured; there is: {', '.join(names) or 'none'}", setting="model"
        )
    await json_answer(exchange, Model(name, _SINCE))
