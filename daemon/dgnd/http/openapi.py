"""The published OpenAPI document, made from the types that requests are read as and answers are written from.

`GET /openapi.json` and `docs/openapi.json` are this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from dgnd.http import health
from dgnd.http.ollama import answers as ollama_answers
from dgnd.http.ollama import requests as ollama_requests
from dgnd.http.openai import answers, requests

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
LINES: Final = "application/x-ndjson"
_REF: Final = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answer: type | None  #: None: plain text
    request: type | None = None
    stream: str | None = None  #: the media type of an answer in pieces
    free: bool = False  #: needs no API key
    not_ready: bool = False  #: 503 has the same body

    @property
    def error(self) -> type:
        """What an error is told in."""
        return ollama_answers.ErrorAnswer if self.path.startswith("/api/") else answers.ErrorAnswer


OPERATIONS: Final = (
    Operation("get", "/", "whether anything is here", None, free=True),
    Operation("get", "/health", "whether the daemon answers", health.Health, free=True),
    Operation(
        "get", "/ready", "whether every model can be asked", health.Readiness, free=True, not_ready=True
    ),
    Operation("get", "/v1/models", "the models", answers.ModelList),
    Operation("get", "/v1/models/{model}", "one model", answers.Model),
    Operation(
        "post", "/v1/chat/completions", "the next message of a conversation",
        answers.ChatCompletion, requests.ChatRequest, EVENTS,
    ),
    Operation(
        "post", "/v1/completions", "bare text continued", answers.TextCompletion, requests.TextRequest, EVENTS
    ),
    Operation(
        "post", "/api/chat", "the next message of a conversation",
        ollama_answers.ChatLine, ollama_requests.ChatRequest, LINES,
    ),
    Operation(
        "post", "/api/generate", "the answer to one prompt",
        ollama_answers.TextLine, ollama_requests.GenerateRequest, LINES,
    ),
    Operation("get", "/api/tags", "the models", ollama_answers.Tags),
    Operation("post", "/api/show", "one model", ollama_answers.Shown, ollama_requests.ShowRequest),
    Operation("get", "/api/version", "dgn's version", ollama_answers.Version),
)  # fmt: skip


def document(version: str) -> dict[str, Any]:
    """The document, for dgn's `version`."""
    types = {
        kind
        for each in OPERATIONS
        for kind in (each.answer, each.request, each.error, answers.ChatChunk)
        if kind is not None
    }
    ordered = sorted(types, key=lambda kind: (kind.__module__, kind.__name__))
    schemas, components = _short_names(msgspec.json.schema_components(ordered, ref_template=_REF))
    refs = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _operation(each, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dgnd",
            "version": version,
            "description": "The HTTP API of a node of Distributed-GPT-Node: OpenAI's and Ollama's forms.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _short_names(made: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Names that both APIs have, which come with their modules, as `openai.NAME` and `ollama.NAME`."""
    text = msgspec.json.encode(made).decode()
    for name in made[1]:
        if "." in name:
            short = f"{'ollama' if '.ollama.' in name else 'openai'}.{name.rpartition('.')[2]}"
            text = text.replace(f'/{name}"', f'/{short}"').replace(f'"{name}"', f'"{short}"')
    schemas, components = msgspec.json.decode(text)
    return schemas, components


def _operation(each: Operation, refs: dict[type, dict[str, Any]]) -> dict[str, Any]:
    error = {"description": "refused, or failed", "content": {JSON: {"schema": refs[each.error]}}}
    if each.answer is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {JSON: {"schema": refs[each.answer]}}
    if each.stream is not None:
        what = "events, each with a piece" if each.stream == EVENTS else "lines of JSON, each with a piece"
        content[each.stream] = {"schema": {"description": what}}
    responses: dict[str, Any] = {"200": {"description": "as asked", "content": content}}
    if each.not_ready:
        responses["503"] = {"description": "not now", "content": content}
    responses["default"] = error
    made: dict[str, Any] = {"summary": each.summary, "responses": responses}
    if each.free:
        made["security"] = []
    if each.request is not None:
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": refs[each.request]}}}
    if "{model}" in each.path:
        made["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return made
