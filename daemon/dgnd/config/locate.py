"""Where each key of a TOML text stands: a path of keys and indexes to a line and a column.

tomli checks a document and gives its values, but not where they came from. This scanner walks a text
that tomli has already accepted, so it only has to find its way, not to judge. Knows nothing of what the
keys mean.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from dataclasses import dataclass

import tomli

#: `("blocks", 1, "span")`: keys by name, items of arrays by index.
KeyPath = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"[ \t]*")
_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}#\r\n]*")
_STRINGS = (
    re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}', re.S),
    re.compile(r"'''.*?'{3,5}", re.S),
    re.compile(r'"(?:[^"\\]|\\.)*"'),
    re.compile(r"'[^']*'"),
)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a text; both count from 1, the column in characters."""

    line: int
    column: int


def locate_keys(text: str) -> Mapping[KeyPath, Position]:
    """The place of every table header, key and array item of `text`, which must be valid TOML.

    A key's place is where its name begins; a table's is its header (the first one, when several define it).
    """
    scanner = _Scanner(text)
    scanner.document()
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    places: dict[KeyPath, Position] = {}
    for path, offset in scanner.found.items():
        line = bisect.bisect_right(starts, offset)
        places[path] = Position(line, offset - starts[line - 1] + 1)
    return places


class _Scanner:
    """One pass over the text; `found` maps paths to offsets."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[KeyPath, int] = {}
        self.array_tables: dict[KeyPath, int] = {}  # path of an array of tables: its last index

    def document(self) -> None:
        table: KeyPath = ()
        self.skip(_GAP)
        while self.at < len(self.text):
            if self.text.startswith("[", self.at):
                table = self.header()
            else:
                self.pair(table)
            self.skip(_GAP)

    def header(self) -> KeyPath:
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        start = self.at + len(_match(_BLANK, self.text, self.at))
        keys = [key for key, _ in self.dotted_key()]
        self.at += 2 if is_array else 1
        path: KeyPath = ()
        for key in keys[:-1]:
            path = self.last_item((*path, key))
            self.found.setdefault(path, start)
        path = (*path, keys[-1])
        if not is_array:
            self.found.setdefault(path, start)
            return self.last_item(path)
        self.found.setdefault(path, start)
        index = self.array_tables[path] = self.array_tables.get(path, -1) + 1
        self.found[(*path, index)] = start
        return (*path, index)

    def last_item(self, path: KeyPath) -> KeyPath:
        """A header that goes through an array of tables means its last item."""
        return (*path, self.array_tables[path]) if path in self.array_tables else path

    def pair(self, table: KeyPath) -> None:
        path = table
        for key, offset in self.dotted_key():
            path = (*path, key)
            self.found.setdefault(path, offset)
        self.at += 1  # the equals sign
        self.skip(_BLANK)
        self.value(path)

    def dotted_key(self) -> list[tuple[str, int]]:
        keys: list[tuple[str, int]] = []
        while True:
            self.skip(_BLANK)
            keys.append((self.simple_key(), self.at))
            self.at = self.key_end
            self.skip(_BLANK)
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def simple_key(self) -> str:
        """The key at `at`, which stays; `key_end` is where it ends."""
        raw = _match(_BARE, self.text, self.at)
        if not raw:
            raw = _match(_STRINGS[3 if self.text[self.at] == "'" else 2], self.text, self.at)
        self.key_end = self.at + len(raw)
        return str(tomli.loads(f"k = {raw}")["k"]) if raw[:1] in {'"', "'"} else raw

    def value(self, path: KeyPath) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self.items(path, "]")
        elif opening == "{":
            self.items(path, "}")
        elif opening in "\"'":
            self.at += next(len(raw) for form in _STRINGS if (raw := _match(form, self.text, self.at)))
        else:
            self.skip(_SCALAR)

    def items(self, path: KeyPath, closing: str) -> None:
        """The items of an array, or the pairs of an inline table."""
        self.at += 1
        index = 0
        self.skip(_GAP)
        while not self.text.startswith(closing, self.at):
            if closing == "]":
                self.found[(*path, index)] = self.at
                self.value((*path, index))
            else:
                self.pair(path)
            index += 1
            self.skip(_GAP)
            if self.text.startswith(",", self.at):
                self.at += 1
                self.skip(_GAP)
        self.at += 1

    def skip(self, form: re.Pattern[str]) -> None:
        self.at += len(_match(form, self.text, self.at))


def _match(form: re.Pattern[str], text: str, at: int) -> str:
    found = form.match(text, at)
    return found[0] if found else ""
