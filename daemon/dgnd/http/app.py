"""The paths of the HTTP API, and what answers each."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dgnd.errors import BadRequest, DgnError
from dgnd.http import health
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import JSON, Endpoint, Form, Handler, House, json_answer
from dgnd.http.ollama import answering
from dgnd.http.ollama import models as ollama_models
from dgnd.http.ollama.answers import ErrorAnswer
from dgnd.http.openai import chat, models, texts
from dgnd.http.openai.errors import answer_of
from dgnd.http.openai.stream import EVENTS, event
from dgnd.http.openapi import document
from dgnd.http.status import MAX_MESSAGE, NoSuchPath
from dgnd.words import shortened

OPENAI: Final = Form(answer_of, lambda error: (EVENTS, event(answer_of(error))))


def _ollama(error: DgnError) -> ErrorAnswer:
    return ErrorAnswer(shortened(error.message, MAX_MESSAGE))


OLLAMA: Final = Form(_ollama, lambda error: (answering.LINES, answering.line(_ollama(error))))


#: Browsers give pages of this machine what they ask for; to others they show nothing, whatever is answered.
_FOR_PAGES: Final = Middleware(
    CORSMiddleware,
    allow_origin_regex=r"https?://(localhost|127(\.\d+){3}|\[::1\])(:\d+)?",
    allow_methods=["GET", "POST"],
    allow_headers=["*"],
)


def make_app(house: House) -> Starlette:
    """The ASGI application."""

    def at(method: str, path: str, handler: Handler, form: Form = OPENAI, free: bool = False) -> Route:
        return Route(path, Endpoint(handler, house, form, free), methods=[method])

    app = Starlette(
        routes=[
            at("GET", "/", health.greeting, free=True),
            at("GET", "/health", health.health, free=True),
            at("GET", "/ready", health.ready, free=True),
            at("GET", "/openapi.json", _document, free=True),
            at("GET", "/v1/models", models.models),
            at("GET", "/v1/models/{model:path}", models.model),
            at("POST", "/v1/chat/completions", chat.chat),
            at("POST", "/v1/completions", texts.texts),
            at("POST", "/api/chat", answering.chat, OLLAMA),
            at("POST", "/api/generate", answering.generate, OLLAMA),
            at("GET", "/api/tags", ollama_models.tags, OLLAMA),
            at("POST", "/api/show", ollama_models.show, OLLAMA),
            at("GET", "/api/version", ollama_models.version, OLLAMA),
        ],
        middleware=[_FOR_PAGES],
        exception_handlers={HTTPException: _no_such_place},
    )
    app.router.redirect_slashes = False
    return app


async def _document(exchange: Exchange, desk: Desk) -> None:
    """What there is, for programs."""
    await json_answer(exchange, document((await desk.service.status()).version))


async def _no_such_place(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: "
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        problem: DgnError = BadRequest(f"{what}the method is not allowed here; it takes {allowed}")
    else:
        problem = NoSuchPath(f"{what}there is nothing here; docs/http-api.md has the paths")
    form = OLLAMA if request.url.path.startswith("/api/") else OPENAI
    body = msgspec.json.encode(form.body(problem))
    return Response(body, error.status_code, error.headers, JSON)
