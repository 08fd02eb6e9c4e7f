"""What one rendering of a template may use, and what the things it does cost.

Knows nothing of how jinja2 runs a template; `dgnd.text.jinja_bounds` charges for what it does.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TypeVar

import jinja2
import jinja2.utils

MAX_STEPS = 1_000_000
MAX_TEXT = 16 << 20
MAX_ITEMS = 200_000
MAX_HANDLED = 256 << 20
MAX_RANGE = 100_000
MAX_SECONDS = 5.0
_MAX_BITS = 4096  # of a whole number
_LONG_NUMBER = re.compile(r"\d{5}|\*")  # a width in a format string that is refused


class TemplateLimit(jinja2.TemplateRuntimeError):
    """The template asks for more than it may have."""


class Allowance:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._handled = MAX_HANDLED
        self._deadline = time.monotonic() + MAX_SECONDS

    def take_steps(self, count: int) -> None:
        """Charges iterations or calls."""
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimit(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise TemplateLimit(f"it takes more than {MAX_SECONDS:g} s")

    def take_text(self, size: int) -> None:
        """Charges characters or items that are about to be made."""
        if size > MAX_TEXT:
            raise TemplateLimit(f"it makes a value of more than {MAX_TEXT} characters or {MAX_ITEMS} items")
        self._handled -= size
        if self._handled < 0:
            raise TemplateLimit(f"it handles more than {MAX_HANDLED} characters")
        self.take_steps(1)


T = TypeVar("T")
_current: ContextVar[Allowance | None] = ContextVar("template_allowance", default=None)


def with_allowance(run: Callable[[], T]) -> T:
    """Calls `run` with a fresh allowance."""
    token = _current.set(Allowance())
    try:
        return run()
    finally:
        _current.reset(token)


def current_allowance() -> Allowance:
    """The current one; while a template is compiled (constants are folded) a fresh one for each use."""
    return _current.get() or Allowance()


def weight(value: object) -> int:
    """Characters and items of a value as it would be written out; what has too many items weighs too much."""
    total = 0
    items = 0
    todo: list[object] = [value]
    while todo:
        item = todo.pop()
        items += 1
        total += 2
        if items + len(todo) > MAX_ITEMS or total > MAX_TEXT:
            return MAX_TEXT + 1
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, jinja2.utils.Namespace):
            todo.extend(object.__getattribute__(item, "_Namespace__attrs").values())
        elif isinstance(item, Mapping):
            todo.extend(itertools.chain.from_iterable(item.items()))
        elif isinstance(item, list | tuple | set | frozenset):
            todo.extend(item)
        elif not (item is None or isinstance(item, int | float)):
            total += 64
    return total


def check_numbers(values: Iterable[object]) -> None:
    """Refuses whole numbers beyond the range, which would be widths, counts or exponents."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_RANGE:
            raise TemplateLimit(f"it passes a number beyond {MAX_RANGE} to a function")


def bits(value: object) -> int:
    """Bits of a whole number, 0 for anything else."""
    return value.bit_length() if isinstance(value, int) else 0


def check_bits(count: int) -> None:
    """Refuses a whole number of so many bits."""
    if count > _MAX_BITS:
        raise TemplateLimit(f"it makes a number of more than {_MAX_BITS} bits")


def check_format(form: str) -> None:
    """Refuses a format string with a very large width."""
    if _LONG_NUMBER.search(form):
        raise TemplateLimit("it formats with a width of more than 9999")


def result_size(text: str, name: str, args: tuple[object, ...]) -> int:
    """At least the size of what a method or filter of this name makes of the text and `args`."""
    numbers = sum(abs(arg) for arg in args if isinstance(arg, int))
    match name:
        case "replace" if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            return len(text) + text.count(args[0]) * len(args[1])
        case "join":
            return weight(args) * (len(text) + 1)
        case "format" | "format_map":
            check_format(text)
            return len(text) + text.count("{") * 10_000 + text.count("%") * 10_000 + weight(args)
        case "wordwrap" | "translate":
            return len(text) * (weight(args) + 1)
        case "indent" | "expandtabs":
            lines = text.count("\n") + text.count("\t") + 1
            return len(text) + lines * (
                numbers + 8 + max((len(a) for a in args if isinstance(a, str)), default=0)
            )
        case "center" | "ljust" | "rjust" | "zfill" | "batch" | "slice":
            return len(text) + numbers
        case _:
            return len(text)
