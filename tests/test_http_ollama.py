"""The official `ollama` client, unmodified, against a real daemon: the demo model, and one of known words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import ollama
import pytest
from http_kit import DEMO, WAIT_S, HttpNode, http_node
from user_kit import ANSWER, chat_ids, readable_model, scripted_model

SAYS = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    directory = tmp_path_factory.mktemp("ollama")
    models: dict[str, dict[str, Any]] = {
        DEMO: {"backend": "onnx"},
        "scripted": {"path": str(scripted_model(directory / "scripted")), "backend": "reference"},
        "endless": {
            "path": str(readable_model(directory / "endless", max_positions=2048)),
            "backend": "reference",
        },
    }
    spans = {DEMO: "embed,0-7,head", "scripted": "embed,0-3,head", "endless": "embed,0-3,head"}
    with http_node(directory / "nodes", models, spans) as node:
        yield node


@pytest.fixture(scope="module")
def client(http: HttpNode) -> Iterator[ollama.Client]:
    client = ollama.Client(host=http.url, timeout=WAIT_S)
    yield client
    client._client.close()


def test_models_are_listed_and_shown(http: HttpNode, client: ollama.Client) -> None:
    models = {model.model: model for model in client.list().models}
    assert list(models) == [DEMO, "scripted", "endless"]
    demo = models[DEMO]
    assert demo.digest is not None
    assert len(demo.digest) >= 32
    assert demo.size is not None
    assert demo.details is not None
    assert (demo.details.family, demo.details.format) == ("llama", "safetensors")
    shown = client.show(DEMO)
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.block_count"] == 8
    parameters = shown.modelinfo["general.parameter_count"]
    assert demo.size in (2 * parameters, 4 * parameters)  # 16 or 32 bits each
    with http.plain() as plain:
        version = plain.get("/api/version").json()["version"]
        assert version == http.node.status().version
        assert plain.get("/").status_code == plain.head("/").status_code == 200


def test_a_chat_in_one_and_line_by_line(http: HttpNode, client: ollama.Client) -> None:
    asked: Any = [{"role": "user", "content": "What is dgn?"}]
    whole = client.chat(DEMO, asked)
    wanted = http.node.ctl_json("run", "--model", DEMO, "What is dgn?")
    assert whole.message.content == wanted["text"]
    assert (whole.message.role, whole.done, whole.done_reason) == ("assistant", True, "stop")
    counts = (whole.prompt_eval_count, whole.eval_count)
    assert counts == (wanted["usage"]["prompt_tokens"], wanted["usage"]["completion_tokens"])
    assert whole.total_duration is not None
    assert whole.eval_duration is not None
    assert whole.total_duration >= whole.eval_duration > 0
    lines = list(client.chat(f"{DEMO}:latest", asked, stream=True))
    assert "".join(line.message.content or "" for line in lines) == wanted["text"]
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert (lines[-1].prompt_eval_count, lines[-1].eval_count) == counts


def test_a_conversation_counts_all_its_messages(client: ollama.Client) -> None:
    turns = [("system", "be short"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    answer = client.chat("scripted", [{"role": role, "content": text} for role, text in turns])
    assert answer.message.content == ANSWER
    assert answer.prompt_eval_count == len(chat_ids(*turns))


def test_a_prompt_with_a_system_and_raw(client: ollama.Client) -> None:
    answer = client.generate("scripted", "hello", system="be short")
    assert answer.response == ANSWER
    assert answer.prompt_eval_count == len(chat_ids(("system", "be short"), ("user", "hello")))
    raw = client.generate("scripted", "abc", raw=True, options={"num_predict": 4})
    assert (raw.response, raw.done_reason, raw.eval_count) == ("defg", "length", 4)
    pieces = [line.response for line in client.generate("scripted", "A", raw=True, stream=True)]
    assert [piece for piece in pieces if piece] == ["😀", "日", "B"]


def test_settings(client: ollama.Client) -> None:
    def ask(**options: Any) -> str | None:
        return client.generate("endless", "hi", options={"num_predict": 16, **options}).response

    hot = {"temperature": 1.5, "seed": 4}
    assert ask(**hot) == ask(**hot)
    assert ask(**hot) != ask(**{**hot, "seed": 5})
    assert ask(**hot, top_k=1) == ask(temperature=0.0)
    assert ask(**hot, top_p=0.0) == ask(temperature=0.0)
    stopped = client.generate(
        "scripted", "hello", options={"stop": ["mn"], "num_ctx": 4096, "num_predict": -1}
    )
    assert (stopped.response, stopped.done_reason) == ("abcdefghijkl", "stop")


def test_probabilities(client: ollama.Client) -> None:
    asked: Any = {"logprobs": True, "top_logprobs": 2, "options": {"num_predict": 3}}
    answer = client.generate("scripted", "abc", raw=True, **asked)
    assert answer.logprobs is not None
    assert [each.token for each in answer.logprobs] == ["d", "e", "f"]
    for each in answer.logprobs:
        assert each.top_logprobs is not None
        assert len(each.top_logprobs) == 2
        assert (each.top_logprobs[0].token, each.top_logprobs[0].logprob) == (each.token, each.logprob)
    lines = client.chat("scripted", SAYS, stream=True, **asked)
    assert [each.token for line in lines for each in line.logprobs or ()] == ["a", "b", "c"]


def test_nothing_to_say_loads_a_model(client: ollama.Client) -> None:
    assert client.generate("scripted").done_reason == "load"
    assert client.chat("scripted").done_reason == "load"
    assert client.generate("scripted", keep_alive=0).done_reason == "unload"


def test_errors_have_ollamas_form(http: HttpNode, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'llama9' not found") as caught:
        client.chat("llama9", SAYS)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.show("llama9")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"format": {"type": "wizard"}}, "Invalid type: wizard"),
        ({"think": True}, "does not support thinking"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "template knows no tools"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGVsbG8="]}]}, "only text"),
        ({"messages": [{"role": "user", "content": "x" * 10_000}]}, "tokens, the context of"),
    ]
    for more, says in wrong:
        with pytest.raises(ollama.ResponseError, match=says) as refused:
            list(client.chat(**{"model": "scripted", "messages": SAYS, "stream": True, **more}))
        assert refused.value.status_code == 400
    with http.plain() as plain:
        for method, path, status in (("POST", "/api/pull", 404), ("GET", "/api/chat", 405)):
            response = plain.request(method, path)
            assert (response.status_code, set(response.json())) == (status, {"error"})


def test_a_client_that_hangs_up_frees_its_session(http: HttpNode, client: ollama.Client) -> None:
    lines = client.generate("endless", "hi", stream=True)
    next(iter(lines))
    assert http.sessions() == 2
    del lines
    http.node.wait_for(lambda: http.sessions() == 0, what="an end of the session")


def test_an_answer_has_the_format_that_is_asked_for(http: HttpNode, client: ollama.Client) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "many": {"type": "integer", "maximum": 99}},
        "required": ["colour", "many"],
        "additionalProperties": False,
    }
    said: Any = SAYS
    whole = client.chat("endless", said, format=schema)
    jsonschema_rs.validate(schema, json.loads(whole.message.content or ""))
    lines = client.chat("endless", said, format=schema, stream=True)
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert whole.done_reason == "stop"
    with http.plain() as plain:
        refused = plain.post("/api/chat", json={"model": "endless", "messages": said, "format": "xml"})
    assert (refused.status_code, refused.json()) == (400, {"error": 'format: "json", or a JSON schema'})
    text = client.generate("endless", "hello", format="json", options={"num_predict": 9}).response
    assert text.startswith("{")
