"""Tools over HTTP: the official clients of OpenAI and Ollama, against a daemon with models that know them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest
from http_kit import WAIT_S, HttpNode, http_node
from tool_kit import CLOCK, HERMES_TEMPLATE, LLAMA_TEMPLATE, WEATHER
from user_kit import readable_model, scripted_model

SAYS: Any = [{"role": "user", "content": "Will it rain?"}]
TOOLS = [WEATHER, CLOCK]
TALK: Any = [
    *SAYS,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpNode]:
    directory = tmp_path_factory.mktemp("tools")
    templates = {"hermes": HERMES_TEMPLATE, "llama": LLAMA_TEMPLATE}
    paths = {
        name: readable_model(directory / name, max_positions=4096, chat_template=template)
        for name, template in templates.items()
    }
    paths["plain"] = scripted_model(directory / "plain")
    models = {name: {"path": str(path), "backend": "reference"} for name, path in paths.items()}
    with http_node(directory / "nodes", models, dict.fromkeys(models, "embed,0-3,head")) as node:
        yield node


@pytest.fixture(scope="module")
def client(http: HttpNode) -> Iterator[openai.OpenAI]:
    with http.openai() as client:
        yield client


@pytest.mark.parametrize("model", ["hermes", "llama"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_required_comes(client: openai.OpenAI, model: str, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": model, "messages": TALK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False
    }  # fmt: skip
    (whole,) = client.chat.completions.create(**asked).choices
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    (call,) = whole.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in ("clock", "get_weather")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert set(arguments) == {"city", "days"}
        assert arguments["days"] in (1, 2)
    if choice != "required":
        assert call.function.name == "get_weather"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == [0]
    (function,) = [delta.function for delta in deltas]
    assert (function.name, json.loads(function.arguments)) == (call.function.name, arguments)
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    (cut,) = client.chat.completions.create(**asked, max_tokens=4).choices
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert cut.message.content


@pytest.mark.parametrize("model", ["hermes", "llama"])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_an_answer_in_words_stays_words(client: openai.OpenAI, model: str, choice: str) -> None:
    asked: dict[str, Any] = {
        "model": model, "messages": SAYS, "tools": TOOLS, "tool_choice": choice, "max_tokens": 12
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    (answer,) = whole.choices
    assert (answer.finish_reason, answer.message.tool_calls) == ("length", None)
    assert len(answer.message.content or "") == 12
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.message.content
    without = client.chat.completions.create(model=model, messages=SAYS, max_tokens=1)
    assert whole.usage is not None
    assert without.usage is not None
    assert (whole.usage.prompt_tokens > without.usage.prompt_tokens) == (choice == "auto")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": "plain"}, "chat template knows no tools"),
        ({"model": "plain", "tools": [], "messages": TALK}, "chat template knows no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "there is no tool 'rm'"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\]"),
        ({"response_format": {"type": "json_object"}}, "exclude each other"),
        ({"messages": [{**TALK[1], "role": "user", "content": "x"}]}, "only an assistant calls tools"),
        (
            {"messages": [{**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "it is no JSON object",
        ),
    ],
)
def test_tools_that_cannot_be_had_are_refused(
    client: openai.OpenAI, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(**{"model": "hermes", "messages": SAYS, "tools": TOOLS, **wrong})


def test_ollamas_client_has_tools(http: HttpNode, request: pytest.FixtureRequest) -> None:
    client = ollama.Client(host=http.url, timeout=WAIT_S)
    request.addfinalizer(client._client.close)
    assert client.show("hermes").capabilities == ["completion", "tools"]
    assert client.show("plain").capabilities == ["completion"]
    talk = [
        *SAYS,
        ollama.Message(
            role="assistant",
            tool_calls=[
                ollama.Message.ToolCall(function=ollama.Message.ToolCall.Function(name="clock", arguments={}))
            ],
        ),
        ollama.Message(role="tool", content="noon", tool_name="clock"),
    ]
    options = {"num_predict": 12}
    whole = client.chat("hermes", talk, tools=TOOLS, options=options)
    assert len(whole.message.content or "") == 12
    assert whole.message.tool_calls is None
    lines = client.chat("hermes", talk, tools=TOOLS, options=options, stream=True)
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    with pytest.raises(ollama.ResponseError, match="chat template knows no tools"):
        client.chat("plain", SAYS, tools=TOOLS)
