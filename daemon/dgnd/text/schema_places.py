"""Where in a JSON schema a keyword stands, so that a refusal can say it. Pure; knows nothing of refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

#: Below these are names, each with a schema.
_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
#: Below these are values, not schemas.
_VALUES: Final = frozenset({"enum", "const", "default", "examples"})


def place_of(schema: dict[str, Any], keyword: str) -> str | None:
    """The first schema in `schema` that has `keyword`, as a JSON pointer such as "#/properties/tags"."""
    return next((place for place, found in _schemas(schema) if keyword in found), None)


def _schemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas in a schema, each with its place; itself first."""
    waiting: list[tuple[str, object]] = [("#", schema)]
    while waiting:
        place, found = waiting.pop(0)
        if isinstance(found, list):
            waiting += [(f"{place}/{number}", each) for number, each in enumerate(found)]
        elif isinstance(found, dict):
            yield place, found
            for key, below in found.items():
                at = f"{place}/{_escaped(key)}"
                if key in _NAMED and isinstance(below, dict):
                    waiting += [(f"{at}/{_escaped(name)}", each) for name, each in below.items()]
                elif key not in _VALUES:
                    waiting.append((at, below))


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
