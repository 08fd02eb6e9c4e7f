"""The paths of the HTTP API, and what answers each."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dgnd.errors import BadRequest, DgnError
from dgnd.http import health
from dgnd.http.forms import JSON, Endpoint, Form, Handler, House
from dgnd.http.openai import chat, models, texts
from dgnd.http.openai.errors import answer_of
from dgnd.http.openai.stream import EVENTS, event
from dgnd.http.status import NoSuchPath

OPENAI: Final = Form(answer_of, lambda error: (EVENTS, event(answer_of(error))))


def make_app(house: House) -> Starlette:
    """The ASGI application."""

    def get(path: str, handler: Handler, free: bool = False) -> Route:
        return Route(path, Endpoint(handler, house, OPENAI, free), methods=["GET"])

    def post(path: str, handler: Handler) -> Route:
        return Route(path, Endpoint(handler, house, OPENAI), methods=["POST"])

    app = Starlette(
        routes=[
            get("/health", health.health, free=True),
            get("/ready", health.ready, free=True),
            get("/v1/models", models.models),
            get("/v1/models/{model:path}", models.model),
            post("/v1/chat/completions", chat.chat),
            post("/v1/completions", texts.texts),
        ],
        exception_handlers={HTTPException: _no_such_place},
    )
    app.router.redirect_slashes = False
    return app


async def _no_such_place(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: "
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        problem: DgnError = BadRequest(f"{what}the method is not allowed here; it takes {allowed}")
    else:
        problem = NoSuchPath(f"{what}there is nothing here; docs/http-api.md has the paths")
    body = msgspec.json.encode(OPENAI.body(problem))
    return Response(body, error.status_code, error.headers, JSON)
