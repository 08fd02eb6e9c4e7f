"""Checked reading of JSON files: every wrong type or value is a ModelError with one line naming file and key.

Knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dgn_backends.errors import ModelError
from dgn_backends.regular_file import open_regular

_MAX_FILE_BYTES = 16 << 20
_Default = TypeVar("_Default", str, None)


@dataclass(frozen=True, slots=True)
class JsonObject:
    """One object of a JSON file. `prefix` is where it stands in the file, such as `rope_scaling.`.

    A key with the value null counts as absent. A reader without a default demands the key.
    """

    path: Path
    values: dict[str, object]
    prefix: str = ""

    def error(self, key: str, problem: str) -> ModelError:
        """An error about `key`; `problem` continues the sentence."""
        return ModelError(
            f"{self.path}: {self.prefix}{key} {problem}", file=str(self.path), key=self.prefix + key
        )

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the key is there with the value null."""
        return key in self.values and self.values[key] is None

    def empty(self, key: str) -> JsonObject:
        """What an absent object at `key` reads as."""
        return JsonObject(self.path, {}, f"{self.prefix}{key}.")

    def object(self, key: str) -> JsonObject | None:
        """The object at `key`, or None when it is absent or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, not {_show(value)}")
        return JsonObject(self.path, value, f"{self.prefix}{key}.")

    def refuse_nested(self) -> None:
        """Raises where a value is itself an object: a layout that we don't know, and must not ignore."""
        for key, value in self.values.items():
            if isinstance(value, dict):
                raise self.error(key, "is an object, and values nested in it are not supported")

    def integer(self, key: str, *, least: int, most: int, default: int | None = None) -> int:
        """A whole number in `[least, most]`."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be a whole number, not {_show(value)}")
        if not least <= value <= most:
            raise self.error(key, f"is {_show(value)}; it must be between {least} and {most}")
        return value

    def number(
        self, key: str, *, above: float = -math.inf, least: float = -math.inf, default: float | None = None
    ) -> float:
        """A finite number greater than `above` and not less than `least`."""
        value = self.optional_number(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if value <= above:
            raise self.error(key, f"is {value:g}; it must be greater than {above:g}")
        if value < least:
            raise self.error(key, f"is {value:g}; it must be at least {least:g}")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {_show(value)}")
        if abs(value) > 1e30 or math.isnan(value):
            raise self.error(key, f"is {_show(value)}, which is not a usable number")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_show(value)}")
        return value

    def string(self, key: str, *, default: _Default) -> str | _Default:
        """A string."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_show(value)}")
        return value

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"must be a list of strings, not {_show(value)}")
        return value

    def zeros_and_ones(self, key: str) -> list[bool] | None:
        """A list of 0 and 1, or None when absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int and item in (0, 1) for item in value):
            raise self.error(key, f"must be a list of 0 and 1, not {_show(value)}")
        return [item == 1 for item in value]

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or a list of them, without repetitions; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.error(key, f"must be a token id or a list of token ids, not {_show(value)}")
            if not 0 <= item < vocab_size:
                raise self.error(key, f"names token {_show(item)}; the vocabulary is 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(items))


def read_json_object(path: Path) -> JsonObject:
    """The object that the file `path` holds; ModelError when it can't be read, or is not JSON, or no
    object."""
    try:
        with open_regular(path) as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}", file=str(path)) from error
    if len(raw) > _MAX_FILE_BYTES:
        raise ModelError(f"{path}: is larger than {_MAX_FILE_BYTES} bytes", file=str(path))
    return JsonObject(path, parse_json_object(raw, path))


def parse_json_object(raw: bytes, path: Path) -> dict[str, object]:
    """The JSON object in `raw`, which came from `path`; ModelError with line and column when it is broken."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8 text (byte {error.start})", file=str(path)) from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}:{error.lineno}:{error.colno}: broken JSON: {error.msg}", file=str(path)
        ) from error
    except (RecursionError, ValueError) as error:  # too deep, or an integer of thousands of digits
        raise ModelError(f"{path}: unusable JSON: {error}", file=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {_show(value)}", file=str(path))
    return value


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
