"""The official `openai` client, unmodified, against a real daemon: the demo model, and one of known words."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from http_kit import DEMO, HttpNode, http_node
from user_kit import ANSWER, chat_ids, readable_model, scripted_model

SAYS = [{"role": "user", "content": "hello"}]
EMPTY_PART = [{"type": "text"}]
PICTURE = [{"type": "image_url"}]
QUESTION = [{"role": "user", "content": "What is dgn?"}]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    directory = tmp_path_factory.mktemp("http")
    models: dict[str, dict[str, Any]] = {
        DEMO: {"backend": "onnx"},
        "scripted": {"path": str(scripted_model(directory / "scripted")), "backend": "reference"},
        "endless": {
            "path": str(readable_model(directory / "endless", max_positions=4096)), "backend": "reference"
        },
    }  # fmt: skip
    spans = {DEMO: "embed,0-7,head", "scripted": "embed,0-3,head", "endless": "embed,0-3,head"}
    with http_node(directory / "nodes", models, spans) as node:
        yield node


@pytest.fixture(scope="module")
def client(http: HttpNode) -> Iterator[openai.OpenAI]:
    with http.openai() as client:
        yield client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEMO, "scripted", "endless"]
    assert client.models.retrieve(DEMO).id == DEMO
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is configured"):
        client.models.retrieve("gpt")


def test_health_and_readiness(http: HttpNode) -> None:
    with http.plain() as plain:
        assert plain.get("/health").json() == {"status": "ok"}
        assert plain.get("/ready").json() == {"ready": True, "state": "ready", "missing": {}}
        assert plain.head("/health").status_code == 200


def test_an_answer_in_one_is_that_of_the_socket(http: HttpNode, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=DEMO, messages=QUESTION)  # type: ignore[arg-type]
    wanted = http.node.ctl_json("run", "--model", DEMO, "What is dgn?")
    (choice,) = answer.choices
    assert choice.message.content == wanted["text"]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == wanted["usage"]["completion_tokens"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_has_the_same_text_and_the_usage_when_asked(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "scripted", "messages": SAYS}
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(text) == ANSWER
    assert len([piece for piece in text if piece]) == len(ANSWER)  # every token came by itself
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    prompt = len(chat_ids(("user", "hello")))
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (prompt, len(ANSWER) + 1)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**asked, stream=True))


def test_stops_and_limits(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        (choice,) = client.chat.completions.create(model="scripted", messages=SAYS, **more).choices  # type: ignore[call-overload]
        return choice.message.content, choice.finish_reason

    assert ask(stop="mn") == ("abcdefghijkl", "stop")
    assert ask(stop=["zzz", "cd"]) == ("ab", "stop")
    assert ask(max_tokens=3) == ("abc", "length")
    assert ask(max_completion_tokens=4, max_tokens=9) == ("abcd", "length")
    assert ask(presence_penalty=2.0, frequency_penalty=0.5, max_tokens=2)[1] == "length"


def test_a_seed_makes_the_same_answer_and_another_seed_another(client: openai.OpenAI) -> None:
    def ask(seed: int, **more: Any) -> str | None:
        answer = client.chat.completions.create(
            model="endless", messages=SAYS, temperature=1.5, seed=seed, max_tokens=24, **more  # type: ignore[arg-type]
        )  # fmt: skip
        text: str | None = answer.choices[0].message.content
        return text

    assert ask(7) == ask(7)
    assert ask(7) != ask(8)
    assert ask(-7) == ask(-7)
    assert ask(7, top_p=0.0) == ask(8, top_p=0.0)  # the likeliest token alone


def test_several_answers_differ_and_the_first_is_that_of_the_seed_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "endless",
        "messages": SAYS,
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 12,
    }
    one = client.chat.completions.create(**asked)
    three = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == one.choices[0].message.content
    assert three.usage is not None
    assert three.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_probabilities_are_the_models_own_whatever_the_settings(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "endless", "messages": SAYS, "max_tokens": 6, "logprobs": True}
    greedy = client.chat.completions.create(**asked, top_logprobs=4, temperature=0.0).choices[0]
    assert greedy.logprobs is not None
    tokens = greedy.logprobs.content
    assert tokens is not None
    assert "".join(token.token for token in tokens) == greedy.message.content
    for token in tokens:
        likeliest = token.top_logprobs
        assert len(likeliest) == 4
        assert (likeliest[0].token, likeliest[0].logprob) == (token.token, token.logprob)
        assert [each.logprob for each in likeliest] == sorted(
            (each.logprob for each in likeliest), reverse=True
        )
        assert sum(math.exp(each.logprob) for each in likeliest) <= 1.0
        assert token.bytes == list(token.token.encode())
    hot = client.chat.completions.create(**asked, top_logprobs=4, temperature=2.0, seed=1).choices[0]
    assert hot.logprobs is not None
    assert hot.logprobs.content is not None
    # of the same prompt, in a batch of another shape: alike, not bit for bit
    same = [each.token for each in tokens[0].top_logprobs]
    assert [each.token for each in hot.logprobs.content[0].top_logprobs] == same
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, temperature=0.0, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert [each.token for each in streamed] == [each.token for each in tokens]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in tokens])
    assert all(token.top_logprobs == [] for token in streamed)
    told: dict[str, Any] = {"model": "scripted", "messages": SAYS}
    ended = client.chat.completions.create(**told, logprobs=True).choices[0]
    assert ended.logprobs is not None
    assert ended.logprobs.content is not None
    assert "".join(token.token for token in ended.logprobs.content) == ANSWER  # not the eos
    assert client.chat.completions.create(**told).choices[0].logprobs is None


def test_a_conversation_with_parts_and_a_developer(http: HttpNode, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    answer = client.chat.completions.create(model="scripted", messages=messages)
    same = [("system", "be short"), ("user", "one two"), ("assistant", "three"), ("user", "four")]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat_ids(*same))
    assert answer.choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("wrong", "says", "param"),
    [
        ({"max_tokens": 0}, ">= 1", "max_tokens"),
        ({"temperature": -1}, ">= 0", "temperature"),
        ({"top_p": 2}, "<= 1", "top_p"),
        ({"stop": [""]}, "length >= 1", "stop[0]"),
        ({"messages": []}, "length >= 1", "messages"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "only text", "messages[0].content"),
        ({"messages": [{"role": "user", "content": EMPTY_PART}]}, "needs its text", "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "Invalid enum", "messages[0].role"),
        ({"top_logprobs": 2}, "it needs logprobs", "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "not supported", "logit_bias"),
        ({"model": 5}, "Expected `str`", "model"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, wrong: dict[str, Any], says: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.chat.completions.create(**{"model": "scripted", "messages": SAYS, **wrong})
    body: Any = caught.value.body
    assert (body["param"], body["type"]) == (param, "invalid_request_error")


def test_an_error_does_not_repeat_whatever_was_asked_for(client: openai.OpenAI) -> None:
    said: Any = SAYS
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="x" * 1_000_000, messages=said)
    assert len(caught.value.response.content) < 5000


def test_far_too_many_messages_are_no_fault_of_dgnd(client: openai.OpenAI) -> None:
    many: list[Any] = [{"role": "user", "content": "x"}] * 100_000
    with pytest.raises(openai.BadRequestError, match="100000 messages") as caught:
        client.chat.completions.create(model="scripted", messages=many)
    assert caught.value.code == "context_length_exceeded"


def test_errors_have_openais_form(http: HttpNode, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=SAYS)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
    long: Any = [{"role": "user", "content": "x" * 10_000}]
    with pytest.raises(openai.BadRequestError, match="tokens, the context of") as refused:
        client.chat.completions.create(model="scripted", messages=long, stream=True)
    assert refused.value.code == "context_length_exceeded"
    with http.plain() as plain:
        for method, path, status in (("POST", "/v1/chat", 404), ("GET", "/v1/chat/completions", 405)):
            response = plain.request(method, path)
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        for body in (b"", b"{", b'"x"', b"\xff", b"[" * 100_000):
            assert plain.post("/v1/chat/completions", content=body).status_code == 400


def test_a_body_that_is_too_long_is_refused(http: HttpNode) -> None:
    with http.plain() as plain:
        try:
            response = plain.post("/v1/chat/completions", content=b" " * (9 << 20))
        except httpx.TransportError:  # refused before all of it was read
            return
        assert response.status_code == 413


def test_a_page_of_another_site_is_refused(http: HttpNode) -> None:
    asked = json.dumps({"model": "scripted", "messages": SAYS}).encode()
    with http.plain() as plain:
        for headers in ({"Origin": "https://example.com"}, {"Host": "rebound.example.com"}):
            response = plain.post("/v1/chat/completions", content=asked, headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


def test_a_page_of_this_machine_may_read_answers(http: HttpNode) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with http.plain() as plain:
        for origin, allowed in (("http://localhost:3000", True), ("http://localhost.example.com", False)):
            before = plain.options("/v1/chat/completions", headers={"Origin": origin, **asks})
            models = plain.get("/v1/models", headers={"Origin": origin})
            for response in (before, models):
                assert (response.headers.get("access-control-allow-origin") == origin) is allowed
                assert (response.status_code == 200) is allowed


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/nowhere"])
def test_a_connection_can_be_used_again_when_a_request_was_refused_before_its_body_came(
    http: HttpNode, path: str
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: rebound.example.com\r\nContent-Length: 4\r\n\r\n".encode()
    with socket.create_connection(http.address(), timeout=60) as sock:
        for _ in range(2):
            sock.sendall(head)
            time.sleep(0.2)  # what the server does without the body, it has done
            sock.sendall(b"{}\r\n")
            response = HTTPResponse(sock)
            response.begin()
            assert response.status in (403, 404, 405)
            response.read()


def test_a_connection_whose_request_does_not_come_whole_is_said_to_close(http: HttpNode) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
    with socket.create_connection(http.address(), timeout=60) as sock:
        sock.sendall(head)
        response = HTTPResponse(sock)
        response.begin()
        assert (response.status, response.headers["Connection"]) == (404, "close")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_session(http: HttpNode, stream: bool) -> None:
    asked = {"model": "endless", "messages": SAYS, "stream": stream}
    with http.plain() as plain:
        if stream:
            with plain.stream("POST", "/v1/chat/completions", json=asked) as response:
                pieces = response.iter_bytes()  # kept: when it goes, so does the connection
                next(pieces)
                assert http.sessions() == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                plain.post("/v1/chat/completions", json=asked, timeout=httpx.Timeout(10, read=0.5))
        http.node.wait_for(lambda: http.sessions() == 0, what="an end of the session")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_PERSON = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}


@pytest.mark.parametrize("model", [DEMO, "endless"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "seed": 4, "frequency_penalty": 0.5}])
def test_an_answer_has_the_form_that_is_asked_for(
    client: openai.OpenAI, model: str, settings: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"model": model, "messages": SAYS, "response_format": AS_PERSON, **settings}
    (whole,) = client.chat.completions.create(**asked).choices
    assert whole.finish_reason == "stop"
    jsonschema_rs.validate(PERSON, json.loads(whole.message.content or ""))
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole.message.content
    (cut,) = client.chat.completions.create(**asked, max_tokens=3).choices
    assert cut.finish_reason == "length"
    assert (whole.message.content or "").startswith(cut.message.content or "-")
    (some,) = client.chat.completions.create(
        **{**asked, "response_format": {"type": "json_object"}}, max_tokens=30
    ).choices
    assert (some.message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"type": "json_schema"}, "schema: it is required"),
        ({"type": "xml"}, "Invalid enum"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, '"not" at #: '),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "Expected `object"),
    ],
)
def test_a_form_that_cannot_be_had_is_refused(
    client: openai.OpenAI, wanted: dict[str, Any], says: str
) -> None:
    for stream in (False, True):
        asked: dict[str, Any] = {"model": DEMO, "messages": SAYS, "response_format": wanted, "stream": stream}
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            client.chat.completions.create(**asked)
        assert (caught.value.param or "").startswith("response_format")
