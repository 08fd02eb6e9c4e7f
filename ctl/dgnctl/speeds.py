"""Figures of nodes, in words and in a table."""

from __future__ import annotations

from dgnctl.output import table
from dgnd.control.api import Figures, NodeFigures


def ms(value: float | None) -> str:
    """A time in ms as people read it; a dash where it was not measured."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def speed_table(speeds: list[NodeFigures]) -> str:
    """One row for each span of each node."""
    rows = [
        (node.model, node.name or node.peer, item.span, *_figures(item), ms(node.trip_ms))
        for node in speeds
        for item in node.figures
    ]
    return table(("MODEL", "PEER", "BLOCKS", "MS/TOKEN", "MS/PROMPT", "QUEUE", "KV FREE", "TRIP MS"), rows)


def _figures(item: Figures) -> tuple[str, str, str, str]:
    has_blocks = any(char.isdigit() for char in item.span)  # embedding and head have no KV
    free = str(item.free_kv) if has_blocks else "-"
    return ms(item.step_ms), ms(item.prefill_ms), f"{item.queue:.1f}", free


def in_words(item: Figures) -> str:
    """What is known of one span, in a few words; empty where nothing was measured."""
    words = []
    if item.step_ms is not None:
        words.append(f"{ms(item.step_ms)} ms a token")
    if item.prefill_ms is not None:
        words.append(f"{ms(item.prefill_ms)} ms a prompt position")
    if item.queue >= 0.05:
        words.append(f"{item.queue:.1f} sessions at work")
    return ", ".join(words)
