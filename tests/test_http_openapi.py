"""The published document, and requests made from it by schemathesis: none of them is a fault of dgnd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from http_kit import WAIT_S, HttpNode, http_node
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tool_kit import HERMES_TEMPLATE
from user_kit import scripted_model

from dgnd.http.app import make_app
from dgnd.http.bodies import BodyLedger
from dgnd.http.desk import Desk
from dgnd.http.forms import House
from dgnd.http.guards import Guard
from dgnd.http.openapi import OPERATIONS, Operation, document

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = schemathesis.openapi.from_dict(document("0"))
MODEL = "scripted"
#: Requests for each operation: all of them take about a minute in a slow CI.
EXAMPLES = 50
#: What is refused for itself, which leaves nothing else to find out.
REFUSED = (
    "logit_bias", "functions", "modalities", "logprobs", "top_logprobs", "suffix",
    "best_of", "template", "context", "images", "think",
)  # fmt: skip
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    directory = tmp_path_factory.mktemp("openapi")
    models = {
        MODEL: {
            "path": str(scripted_model(directory / "scripted", chat_template=HERMES_TEMPLATE)),
            "backend": "reference",
        }
    }
    with http_node(directory / "nodes", models, {MODEL: "embed,0-3,head"}) as node:
        yield node


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each.method} {each.path}")
def test_no_request_is_a_fault(http: HttpNode, operation: Operation, mode: GenerationMode) -> None:
    """Requests as the document allows, and others."""
    found = SCHEMA[operation.path][operation.method]
    if mode.is_negative and operation.request is None:
        pytest.skip("nothing in it can be wrong")

    @given(case=found.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        _aim(case.body)
        response = case.call(base_url=http.url, timeout=WAIT_S)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    statuses: set[int] = set()
    ask()
    if not mode.is_negative and "{" not in operation.path:
        assert 200 in statuses  # what is behind the checks was asked, too


def _aim(body: Any) -> None:
    """Most requests for a model are to reach one, and none is to be long."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 4 != 1:
        odd = len(body["model"]) % 2
        body["model"] = MODEL
        for key in REFUSED:
            body.pop(key, None)
        if not odd:  # few of the schemas and tools that are made up can be used
            for key in ("response_format", "tools", "tool_choice"):
                body.pop(key, None)
            messages = body.get("messages")
            for message in messages if isinstance(messages, list) else ():
                if isinstance(message, dict):
                    message.pop("tool_calls", None)
    for key in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(key), int) and body[key] > 3:
            body[key] = 3


def test_the_daemon_went_on(http: HttpNode) -> None:
    assert "fault" not in http.node.log
    assert http.sessions() == 0


def test_the_document_in_docs_is_the_published_one(http: HttpNode) -> None:
    with http.plain() as plain:
        served = plain.get("/openapi.json").json()
    kept = json.loads((ROOT / "docs/openapi.json").read_text())
    assert served["info"].pop("version") == http.node.status().version
    kept["info"].pop("version")
    assert kept == served, "run scripts/openapi.py"


def test_every_path_is_in_the_documents() -> None:
    house = House(Desk(None, 1, 1), Guard(None), BodyLedger())  # type: ignore[arg-type]  # no request is made
    there = {
        (method.lower(), route.path.replace(":path", ""))  # type: ignore[attr-defined]  # all are Routes
        for route in make_app(house).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    listed = {(each.method, each.path) for each in OPERATIONS}
    assert there == listed | {("get", "/openapi.json")}
    text = (ROOT / "docs/http-api.md").read_text()
    for method, path in there - {("get", "/")}:
        assert f"`{method.upper()} {path.replace('{model}', 'NAME')}`" in text


def test_every_field_of_a_request_is_in_the_documents() -> None:
    text = (ROOT / "docs/http-api.md").read_text()
    schemas = document("")["components"]["schemas"]
    for name in (
        "openai.ChatRequest",
        "TextRequest",
        "openai.Message",
        "ollama.ChatRequest",
        "GenerateRequest",
        "Options",
    ):
        for field in schemas[name]["properties"]:
            assert f"`{field}`" in text, f"{name}.{field}"
