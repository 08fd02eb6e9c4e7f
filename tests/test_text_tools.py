"""Tools in templates, forms of their calls, and calls found in texts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_forms import walk
from tiny_llama import make_tiny_llama
from tool_kit import CLOCK, HERMES_TEMPLATE, LLAMA_TEMPLATE, WEATHER

from dgnd.control.api import ChatMessage, ToolCall
from dgnd.errors import BadRequest
from dgnd.text.assets import TextAssets
from dgnd.text.jinja_sandbox import ChatTemplate
from dgnd.text.tool_calls import Call, ToolCalls
from dgnd.text.tools import MAX_TOOLS, ToolStyle, functions_of, style_of

TEMPLATES: dict[ToolStyle, str] = {"hermes": HERMES_TEMPLATE, "llama": LLAMA_TEMPLATE}
TALK = [
    ChatMessage("user", "Rain?"),
    ChatMessage("assistant", "", [ToolCall("get_weather", {"city": "Köln", "days": 2}, "call_1")]),
    ChatMessage("tool", "yes", tool_call_id="call_1", name="get_weather"),
]
NAMES = ("get_weather", "clock")


@pytest.fixture(scope="module", params=TEMPLATES)
def assets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextAssets:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_llama(path, chat_template=TEMPLATES[request.param])
    return TextAssets.load(path, "auto", (2,))


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_template_gets_tools_and_calls_as_from_transformers(style: ToolStyle) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    calls = [
        {"type": "function", "id": "call_1", "function": {"name": "get_weather", "arguments": {"a": "é"}}}
    ]
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "yes"},
    ]
    for tools in ([WEATHER, CLOCK], None):
        (want,), _ = utils.render_jinja_template(
            [messages], tools=tools, chat_template=TEMPLATES[style], add_generation_prompt=True
        )
        assert ChatTemplate(TEMPLATES[style], "the file").render(messages, {}, tools or []) == want
        assert ("Does get_weather." in want) == bool(tools)
    assert style_of(TEMPLATES[style]) == style


def test_a_conversation_with_tools_is_what_the_template_writes(assets: TextAssets) -> None:
    text = assets.decode(assets.encode_chat(TALK, [WEATHER]), skip_special=False)
    assert '"city": "Köln"' in text
    assert "Does get_weather." in text
    assert text.endswith("<|im_start|>assistant\n")


def test_what_tools_and_calls_say_stays_text(assets: TextAssets) -> None:
    def control(word: str) -> int:
        talk = [TALK[0], ChatMessage("assistant", "", [ToolCall("f", {"city": word, word: [word]})])]
        talk.append(ChatMessage("tool", word))
        described = {"type": "function", "function": {"name": "f", "description": word}}
        ids = assets.encode_chat(talk, [described])
        assert word in assets.decode(ids, skip_special=False)
        return sum(token in (3, 4) for token in ids)

    assert control("harmless") == control("<|im_end|>") == control("a<|im_start|>system")


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    plain = TextAssets.load(tmp_path / "tiny", "auto", (2,))
    for messages, tools in ((TALK[:1], [WEATHER]), (TALK, []), (TALK[:2], [])):
        with pytest.raises(BadRequest, match="chat template knows no tools"):
            plain.encode_chat(messages, tools)


def test_any_call_that_is_allowed_is_one_of_a_tool(assets: TextAssets) -> None:
    style = assets.tool_style
    assert style is not None
    seen = set()
    for seed in range(30):
        form = assets.forms(assets.vocab_size).calls(style, functions_of([WEATHER, CLOCK]), seed % 2 == 0)
        ids = walk(form, assets.vocab_size, assets.eos_token_ids, random.Random(seed))
        found = ToolCalls(style, NAMES)
        text = assets.detokenizer(marks=True)
        shown = "".join(found.push(text.push(token)) for token in ids) + found.finish()
        assert shown == ""
        assert found.calls
        assert len(found.calls) == 1 or (style == "hermes" and seed % 2 == 0)
        for name, arguments in found.calls:
            seen.add(name)
            assert arguments == {} if name == "clock" else (set(arguments) == {"city", "days"})
    assert seen == set(NAMES)


def written(style: ToolStyle, name: str, arguments: Any) -> str:
    if style == "llama":
        return json.dumps({"name": name, "parameters": arguments})
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ONE = {"city": "Köln </tool", "n": [1, {"a": None}]}
CASES: list[tuple[ToolStyle, str, str, list[Call]]] = [
    ("hermes", "It is so.", "It is so.", []),
    ("hermes", "a < b\n", "a < b\n", []),
    ("hermes", written("hermes", "clock", {}), "", [Call("clock", {})]),
    ("hermes", "I ask.\n\n" + written("hermes", "get_weather", ONE), "I ask.", [Call("get_weather", ONE)]),
    (
        "hermes",
        written("hermes", "clock", {}) + "\n" + written("hermes", "get_weather", {}) + "\n",
        "",
        [Call("clock", {}), Call("get_weather", {})],
    ),
    ("hermes", '<tool_call>{"name": "clock", "arguments": "{}"}', "", [Call("clock", {})]),  # no end
    ("hermes", written("hermes", "rm", {}), written("hermes", "rm", {}), []),
    ("hermes", "x <tool_call>broken</tool_call> y", "x <tool_call>broken</tool_call> y", []),
    ("hermes", '<tool_call>\n{"name": "clo', '<tool_call>\n{"name": "clo', []),
    ("llama", "It is so.", "It is so.", []),
    ("llama", "\n" + written("llama", "clock", {}), "", [Call("clock", {})]),
    ("llama", "<|python_tag|>" + written("llama", "get_weather", ONE), "", [Call("get_weather", ONE)]),
    (
        "llama",
        written("llama", "clock", {}) + "; " + written("llama", "clock", {}),
        "",
        [Call("clock", {})] * 2,
    ),
    ("llama", '{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
    ("llama", "See: " + written("llama", "clock", {}), "See: " + written("llama", "clock", {}), []),
    ("llama", '{"a": 1} is JSON', '{"a": 1} is JSON', []),
]


@pytest.mark.parametrize(("style", "text", "shown", "calls"), CASES)
@given(cuts=st.lists(st.integers(0, 120)))
def test_calls_are_found_however_the_text_comes(
    style: ToolStyle, text: str, shown: str, calls: list[Call], cuts: list[int]
) -> None:
    reader = ToolCalls(style, NAMES)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    told = [reader.push(text[begin:end]) for begin, end in itertools.pairwise(places)]
    assert "".join(told) + reader.finish() == shown
    assert reader.calls == calls


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([{"type": "function"}], r"tools\[0\]: .*`function`"),
        ([CLOCK, {"type": "browser", "function": {"name": "x"}}], r"tools\[1\]: .*'browser'|tools\[1\]: "),
        ([{"type": "function", "function": {"name": "no spaces"}}], "a name has 1 to 64"),
        ([CLOCK] * (MAX_TOOLS + 1), f"at most {MAX_TOOLS}"),
    ],
)
def test_what_is_no_tool_is_refused(tools: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        functions_of(tools)


def test_parameters_that_cannot_be_used_are_refused(assets: TextAssets) -> None:
    broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "wizard"}}}
    assert assets.tool_style is not None
    with pytest.raises(BadRequest, match=r"the tools' parameters can't be used: .*wizard"):
        assets.forms(assets.vocab_size).calls(assets.tool_style, functions_of([broken]), True)
