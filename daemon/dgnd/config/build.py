"""Values as TOML gives them to the frozen sections of the schema: unknown, missing and mistyped keys.

Walks the schema beside the values, so that every finding knows the key that it is about. Knows nothing
of files or of what the values mean.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dgnd.config.locate import KeyPath
from dgnd.config.schema import Config, Section

S = TypeVar("S", bound=Section)

#: A plain field's type: the Python types of TOML values that it takes, and its name.
_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a string"),
    Path: ((str,), "a string"),
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
}
_TYPE_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a fraction",
    list: "an array",
    dict: "a table",
}


class KeyProblem(Exception):
    """What is wrong with the key at `key_path`."""

    def __init__(self, key_path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.key_path = key_path
        self.message = message


def build(values: dict[str, Any]) -> Config:
    """The configuration that `values`, a TOML document, describes. Raises KeyProblem at the first bad key."""
    return _section(Config, values, ())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `; did you mean "x"?`, or what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known here: {', '.join(names)}" if names else "; there are none"


def key_name(key_path: KeyPath) -> str:
    """A key as people write it: `models.llama.path`, `blocks[1].span`."""
    name = ""
    for key in key_path:
        name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
    return name


def _section(cls: type[S], values: object, at: KeyPath) -> S:
    if not isinstance(values, dict):
        raise KeyProblem(at, f"{key_name(at)} must be a table, not {_toml_type(values)}")
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    for key in values:
        if key not in fields:
            where = f" in {key_name(at)}" if at else ""
            raise KeyProblem((*at, key), f'unknown key "{key}"{where}{did_you_mean(key, fields)}')
    for field in fields.values():
        if field.required and field.name not in values:
            raise KeyProblem(at, f'{key_name(at)} lacks the key "{field.name}"')
    return cls(**{key: _value(fields[key].type, value, (*at, key)) for key, value in values.items()})


def _value(kind: Any, value: object, at: KeyPath) -> object:
    """`value` as the type `kind` of a field: a section, a table or an array of sections, or a plain value."""
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Section):
        return _section(kind, value, at)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise KeyProblem(at, f"{key_name(at)} must be a table of tables, not {_toml_type(value)}")
        return {name: _section(arguments[1], item, (*at, name)) for name, item in value.items()}
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise KeyProblem(at, f"{key_name(at)} must be an array, not {_toml_type(value)}")
        return tuple(_value(arguments[0], item, (*at, index)) for index, item in enumerate(value))
    plain = next((each for each in arguments if each is not type(None)), kind)
    accepted, wanted = _PLAIN[plain]
    if type(value) not in accepted:
        raise KeyProblem(at, f"{key_name(at)} must be {wanted}, not {_toml_type(value)}")
    if plain is Path and (not value or "\x00" in str(value)):
        raise KeyProblem(at, f"{key_name(at)} is no path")
    return plain(value)


def _toml_type(value: object) -> str:
    return _TYPE_NAMES.get(type(value), "a date or a time")
