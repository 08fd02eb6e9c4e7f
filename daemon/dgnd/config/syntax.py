"""What is wrong with a file, in a line of words for people who edit it. Knows nothing of what its keys mean.

The parser's own words are kept where they say enough.
"""

from __future__ import annotations

import re
from typing import Final

import tomli

from dgnd.config.locate import Position

_TABLE_TWICE: Final = re.compile(r"Cannot declare \((.*)\) twice")
_MANY_DIGITS: Final = re.compile(r"[0-9_]{4000,}")  # more than Python makes an integer of
_LONG_QUOTE: Final = re.compile(r'"([^"\s]{100})[^"\s]+"')


def one_line(message: str) -> str:
    """A message with what a file has in it: what would end the line or steer a terminal is escaped, long
    values are cut off."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
    return _LONG_QUOTE.sub(r'"\1…"', shown)


def explained(text: str, error: Exception) -> tuple[Position, str]:
    """Where the mistake is, and what. `error`: what `tomli.loads` raised for `text`."""
    if isinstance(error, tomli.TOMLDecodeError):
        return Position(error.lineno, error.colno), _of_parser(text, error)
    if isinstance(error, RecursionError):
        return Position(1, 1), "tables or arrays are nested too deeply"
    number = _MANY_DIGITS.search(text)
    if number is None:
        return Position(1, 1), str(error)
    line = text.count("\n", 0, number.start()) + 1
    return Position(
        line, number.start() - text.rfind("\n", 0, number.start())
    ), "a number has too many digits"


def _of_parser(text: str, error: tomli.TOMLDecodeError) -> str:
    twice = _TABLE_TWICE.fullmatch(error.msg)
    if twice:
        keys = re.findall(r"'([^']*)'", twice[1])
        return f"the table {'.'.join(keys)} is there already; keep one of the two"
    if error.msg == "Cannot overwrite a value":
        key, equals, _ = text.split("\n")[error.lineno - 1].partition("=")
        name = f"{key.strip()} " if equals else "this key "
        return f"{name}is set already; keep one of the two"
    return error.msg
