"""Numbers and names as sentences have them. Pure."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`count` things of a noun that takes an s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
