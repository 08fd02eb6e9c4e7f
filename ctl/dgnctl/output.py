"""What goes to stdout: text as it comes, JSON lines, tables for people.

A stdout that nobody reads ends the program quietly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

_CONTROL: Final = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class StdoutClosed(Exception):
    """Nobody reads stdout any more. No OSError, which click would turn into an exit code of its own."""


def emit(text: str) -> None:
    """Writes to stdout at once; control characters of a terminal are left out where it is one.

    Raises:
        StdoutClosed: nobody reads it.
    """
    emit_raw(printable(text) if sys.stdout is not None and sys.stdout.isatty() else text)


def emit_raw(shown: str) -> None:
    """Writes to stdout at once, what steers a terminal too.

    Raises:
        StdoutClosed: nobody reads it.
    """
    if sys.stdout is None:
        raise StdoutClosed
    try:
        try:
            sys.stdout.write(shown)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding
            sys.stdout.write(shown.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except (BrokenPipeError, ValueError) as error:
        raise StdoutClosed from error


def emit_json(value: object) -> None:
    """One line of JSON, always UTF-8.

    Raises:
        StdoutClosed: nobody reads it.
    """
    import msgspec  # `dgnctl --help` does without

    if sys.stdout is None:
        raise StdoutClosed
    try:
        sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError) as error:
        raise StdoutClosed from error


def discard_stdout() -> None:
    """Lets the interpreter end without complaint about a stdout that nobody reads."""
    if sys.stdout is not None:
        with open(os.devnull, "wb") as null:  # noqa: PTH123 - a device, not a path of ours
            os.dup2(null.fileno(), 1)


def printable(text: str) -> str:
    """Without the characters that steer a terminal, which text of models and peers must not do."""
    return text.translate(_CONTROL)


def width() -> int:
    """Columns to fill: those of the terminal, 80 where there is none, at most 100."""
    try:
        return max(40, min(100, os.get_terminal_size(1).columns or 80))
    except OSError:
        return 80


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Aligned columns; the last one is wrapped to fit the width, but long words stay whole, to be copied."""
    import textwrap  # `dgnctl --help` does without

    lines = [list(headers), *([printable(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers) - 1)]
    used = len(indent) + sum(widths) + 2 * len(widths)
    out = []
    for line in lines:
        lead = indent + "".join(cell.ljust(size) + "  " for cell, size in zip(line, widths, strict=False))
        room = max(20, width() - used)
        last = textwrap.wrap(line[-1], room, break_on_hyphens=False, break_long_words=False) or [""]
        out.append((lead + last[0]).rstrip())
        out.extend(" " * used + more for more in last[1:])
    return "\n".join(out) + "\n"


def wrapped(text: str, indent: str = "", hanging: str | None = None) -> str:
    """A sentence in lines that fit the width; `hanging`: the indent of all but the first."""
    import textwrap  # `dgnctl --help` does without

    filled = textwrap.fill(
        printable(text).replace("\n", " "), width() - 1, initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return filled + "\n"


def size(count: int) -> str:
    """Bytes as people read them."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    units = iter(("KB", "MB", "GB", "TB"))
    while True:
        value /= 1000
        unit = next(units)
        if value < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
