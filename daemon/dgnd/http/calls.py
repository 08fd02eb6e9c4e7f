"""Calls of tools taken out of answers' texts, for both APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dgnd.http.desk import Desk
from dgnd.text.tool_calls import Call, ToolCalls
from dgnd.text.tools import ToolStyle, functions_of


class CallReader:
    """Follows one answer; without a style it has no calls. `tools` as they were asked with."""

    def __init__(self, style: ToolStyle | None, tools: Sequence[dict[str, Any]]) -> None:
        names = {function.name for function in functions_of(tools)}
        self._reader = None if style is None else ToolCalls(style, names)
        self._told = 0

    @property
    def called(self) -> int:
        """How many calls were told of."""
        return self._told

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Takes a piece; returns what is to be shown of the text, and the calls that are new."""
        return (text, []) if self._reader is None else (self._reader.push(text), self._new())

    def finish(self) -> tuple[str, list[Call]]:
        """The same of what was held back; the answer has ended."""
        return ("", []) if self._reader is None else (self._reader.finish(), self._new())

    def whole(self, text: str) -> tuple[str, list[Call]]:
        """The same of an answer that is there as a whole."""
        begin, calls = self.push(text)
        rest, more = self.finish()
        return begin + rest, [*calls, *more]

    def _new(self) -> list[Call]:
        assert self._reader is not None
        new = self._reader.calls[self._told :]
        self._told += len(new)
        return new


async def tool_style(desk: Desk, model: str, tools: Sequence[dict[str, Any]]) -> ToolStyle | None:
    """How `model` writes calls; None where nobody may call anything, or the model can't."""
    if not tools:
        return None
    found = {each.name: each.tools for each in await desk.service.models_list()}
    match found.get(model):
        case "hermes":
            return "hermes"
        case "llama":
            return "llama"
        case _:
            return None
