"""Numbers and names as sentences have them. Pure."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`count` things of a noun that takes an s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, most: int) -> str:
    """The text, cut off beyond so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def format_bytes(count: int) -> str:
    """`count` with a unit that keeps it short: 5.2 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
