"""Models by the names that Ollama's clients give them: `NAME`, or `NAME:latest`."""

from __future__ import annotations

from dgnd.control import api
from dgnd.errors import NotFound
from dgnd.http.desk import Desk

_LATEST = ":latest"


async def known(name: str, desk: Desk) -> api.ModelInfo:
    """The configured model of that name. Raises NotFound."""
    found = {model.name: model for model in await desk.service.models_list()}
    model = found.get(name) or found.get(name.removesuffix(_LATEST))
    if model is None:
        raise NotFound(f"model {name!r} not found; there is: {', '.join(found) or 'none'}")
    return model


async def known_name(name: str, desk: Desk) -> str:
    """The name in the configuration. Raises NotFound."""
    return (await known(name, desk)).name
