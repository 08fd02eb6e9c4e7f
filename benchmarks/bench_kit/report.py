"""Figures as a table for people or as one line of JSON for programs. Knows nothing of what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence


def quantile(values: Sequence[float], q: float) -> float:
    """The value at rank `q` (0 to 1) by linear interpolation, as numpy's default; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The middle value; NaN of nothing."""
    return quantile(values, 0.5)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, as Markdown: the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def show(
    as_json: bool, where: Mapping[str, str], figures: Mapping[str, object], lines: Sequence[str]
) -> None:
    """Prints conditions and figures: one JSON object, or the conditions and then `lines`."""
    if as_json:
        print(json.dumps({"conditions": where, "figures": figures}))
        return
    for name, words in where.items():
        print(f"{name + ':':11} {words}")
    print()
    print("\n".join(lines))
