"""The calls of tools in the text of an answer, as it comes: what is shown, and what was called.

Text that may be the beginning of a call is held back. What looks like a call and is none (broken JSON, a tool
that there is not) is text. Knows nothing of tokens or of any API.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec

from dgnd.text.tools import CALL_BEGIN, CALL_END, PYTHON_TAG, ToolStyle


class Call(NamedTuple):
    """One call."""

    name: str
    arguments: dict[str, Any]


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | str | None = None
    parameters: dict[str, Any] | str | None = None


class ToolCalls:
    """Follows one answer. `names`: of the tools that there are."""

    def __init__(self, style: ToolStyle, names: Collection[str]) -> None:
        self._style, self._names = style, names
        self._held = ""
        self._shown = False  # text that is no white space
        self.calls: list[Call] = []  #: so far

    def push(self, text: str) -> str:
        """Takes a piece; returns what may be shown of the answer's text."""
        self._held += text
        return self._told(self._hermes() if self._style == "hermes" else self._llama())

    def finish(self) -> str:
        """The answer has ended; returns the rest of its text."""
        rest, self._held = self._held, ""
        if self._style == "llama":
            body = rest.strip().removeprefix(PYTHON_TAG)
            if not self._shown and body and all(map(self._take, _pieces(body))):
                return ""
            self.calls.clear()
        elif rest.lstrip().startswith(CALL_BEGIN) and self._take(rest.lstrip().removeprefix(CALL_BEGIN)):
            return ""
        return "" if self.calls and not rest.strip() else rest

    def _told(self, text: str) -> str:
        self._shown = self._shown or bool(text.strip())
        return text

    def _llama(self) -> str:
        """All is held back as long as it may be one call."""
        body = self._held.lstrip()
        if not self._shown and (body.startswith("{") or PYTHON_TAG.startswith(body[: len(PYTHON_TAG)])):
            return ""
        text, self._held = self._held, ""
        return text

    def _hermes(self) -> str:
        text = ""
        while (at := self._held.find(CALL_BEGIN)) >= 0:
            end = self._held.find(CALL_END, at)
            before, whole = self._held[:at], self._held[at : end + len(CALL_END)]
            if end < 0:
                text += before.rstrip()
                self._held = self._held[len(before.rstrip()) :]
                return text
            self._held = self._held[end + len(CALL_END) :]
            if self._take(whole[len(CALL_BEGIN) : -len(CALL_END)]):
                text += before.rstrip()
            else:
                text += before + whole
        keep = _maybe_begun(self._held)
        text, self._held = text + self._held[:keep], self._held[keep:]
        return text

    def _take(self, body: str) -> bool:
        try:
            written = msgspec.json.decode(body.strip(), type=_Written)
            arguments = written.arguments if written.arguments is not None else written.parameters
            if isinstance(arguments, str):
                arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            return False
        if written.name not in self._names:
            return False
        self.calls.append(Call(written.name, arguments or {}))
        return True


def _maybe_begun(text: str) -> int:
    """Where the white space and the beginning of a call that `text` ends with begin."""
    for length in range(min(len(text), len(CALL_BEGIN) - 1), 0, -1):
        if CALL_BEGIN.startswith(text[-length:]):
            return len(text[:-length].rstrip())
    return len(text.rstrip())


def _pieces(body: str) -> list[str]:
    """Calls that are separated by semicolons, where the whole is not one."""
    try:
        msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return body.split(";")
    return [body]
