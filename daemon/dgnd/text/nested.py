"""What a template is given beside texts: calls of tools and the tools themselves, as nested JSON values.

Knows nothing of templates or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest

#: What a tool's schema may be nested.
_DEPTH = 64


def as_templates_have_it(message: ChatMessage) -> dict[str, Any]:
    """What a message has beside role and content, as transformers gives it to templates."""
    found: dict[str, Any] = {}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        found |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return found


def texts_in(value: Any) -> list[str]:
    """All texts in a JSON value, keys too. Raises BadRequest for one that is nested too deeply."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    changed(value, note)
    return found


def changed(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """The value with every text in it changed, keys too. Raises BadRequest as `texts_in`."""
    if depth > _DEPTH:
        raise BadRequest(f"tools and their calls may be nested {_DEPTH} deep, no deeper", setting="tools")
    match value:
        case str():
            return change(value)
        case dict():
            return {change(key): changed(item, change, depth + 1) for key, item in value.items()}
        case list():
            return [changed(item, change, depth + 1) for item in value]
        case _:
            return value
