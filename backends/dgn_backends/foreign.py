"""What foreign code raised, in one bounded line. Knows nothing of who called it or why."""

from __future__ import annotations

_MOST_CHARACTERS = 500


def raised(error: BaseException) -> str:
    """Type and message of an error of a plugin, in one line; also where its own `__str__` fails."""
    kind = type(error).__name__
    if isinstance(error, SystemExit):
        return f"sys.exit({_text(error)})"
    text = _text(error)
    return f"{kind}: {text}" if text else kind


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - it is foreign code too
        return "its message can't be made"
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * _MOST_CHARACTERS])
    line = " ".join(shown.split())
    return line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + "…"
