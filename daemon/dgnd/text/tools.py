"""Tools that a model may call: how its template wants calls written, and the form of an answer that is one.

A tool is as OpenAI's API has it, `{"type": "function", "function": {"name", "description", "parameters"}}`,
and so it is given to templates, as transformers does. Knows nothing of what tools do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from dgnd.errors import BadRequest

#: `hermes`: `<tool_call>{"name", "arguments"}</tool_call>`, also after text and several times (Qwen, Hermes,
#: SmolLM). `llama`: an answer that is nothing but `{"name", "parameters"}` (Llama 3).
ToolStyle = Literal["hermes", "llama"]
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
#: Texts of calls that stay in the answer's text, also where they are special tokens.
MARKS = frozenset({CALL_BEGIN, CALL_END, PYTHON_TAG})
MAX_TOOLS = 128
MAX_BYTES = 256 << 10  #: of all tools as JSON
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_USES_TOOLS = re.compile(r"\btools\b")


class Function(msgspec.Struct, frozen=True):
    """What a tool is called with."""

    name: str
    parameters: dict[str, Any] | None = None


class _Tool(msgspec.Struct, frozen=True):
    function: Function
    type: Literal["function"] = "function"


def style_of(template: str) -> ToolStyle | None:
    """How a template wants calls written; None where it knows no tools, or writes calls in another way."""
    if not _USES_TOOLS.search(template):
        return None
    if CALL_BEGIN in template:
        return None if "<function=" in template else "hermes"
    return "llama" if PYTHON_TAG in template or '"parameters": dictionary' in template else None


def functions_of(tools: Sequence[dict[str, Any]]) -> list[Function]:
    """Names and parameters of tools. Raises BadRequest naming the one that is none."""
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools: {len(tools)} of them; at most {MAX_TOOLS}", setting="tools")
    try:
        if len(msgspec.json.encode(tools)) > MAX_BYTES:
            raise BadRequest(f"tools: more than {MAX_BYTES} bytes", setting="tools")
    except RecursionError:
        raise BadRequest("tools: nested too deeply", setting="tools") from None
    found: list[Function] = []
    for index, tool in enumerate(tools):
        try:
            function = msgspec.convert(tool, _Tool).function
        except msgspec.ValidationError as error:
            raise BadRequest(f"tools[{index}]: {error}", setting="tools") from None
        if not _NAME.fullmatch(function.name):
            raise BadRequest(
                f"tools[{index}]: a name has 1 to 64 letters, digits, _, . or -", setting="tools"
            )
        found.append(function)
    return found


def calls_grammar(style: ToolStyle, functions: Sequence[Function], several: bool) -> str:
    """The form of an answer that calls one of `functions`, or with `several` perhaps more than one, in
    llguidance's dialect of Lark."""
    key = "arguments" if style == "hermes" else "parameters"
    lines = []
    if style == "hermes":
        one = f"{_text(CALL_BEGIN)} {_text(chr(10))} body {_text(chr(10))} {_text(CALL_END)}"
        lines += ["start: call more*" if several else "start: call", f"call: {one}"]
        lines += [f"more: {_text(chr(10))} call"] if several else []
    else:
        lines.append("start: body")
    lines.append("body: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        begin = '{"name": ' + json.dumps(function.name) + f', "{key}": '
        schema = {"type": "object"} if function.parameters is None else function.parameters
        lines.append(f"call_{index}: {_text(begin)} arguments_{index} {_text('}')}")
        space = {"x-guidance": {"whitespace_pattern": r"[ \n]{1,16}"}}
        lines.append(f"arguments_{index}: %json {json.dumps({**schema, **space})}")
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return json.dumps(text)
