"""Spans: which part of a model. Knows nothing of models on disk, peers or routes.

A model is a line of *units*: unit 0 is the embedding, unit i+1 is block i, unit n_blocks+1 is the head. A
span is a contiguous run of units; a span's notation is what people write in the config, with inclusive
ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ITEM = re.compile(r"(?P<end>embed|head)|(?P<first>[0-9]{1,6})(?:-(?P<last>[0-9]{1,6}))?")


class SpanSyntaxError(ValueError):
    """A span that can't be read; the message quotes the item and says what is expected."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `[start, stop)` with two optional ends: `embed` before block 0, `head` after the last block.

    A span of an end alone is empty in blocks: `Span(0, 0, embed=True)`, `Span(n_blocks, n_blocks,
    head=True)`.
    """

    start: int
    stop: int
    embed: bool = False
    head: bool = False

    def units(self) -> range:
        """The units covered; the head's unit follows the last block of the span."""
        return range(self.start + (not self.embed), self.stop + 1 + self.head)

    def contains(self, other: Span) -> bool:
        """Whether `other`, a span of the same model, lies within this one."""
        return (
            self.start <= other.start
            and other.stop <= self.stop
            and (self.embed or not other.embed)
            and (self.head or not other.head)
        )

    def __str__(self) -> str:
        return format_spans([self])


def span_of_units(units: range, n_blocks: int) -> Span:
    """The span covering the contiguous, non-empty `units` of a model with `n_blocks` blocks."""
    first, last = units[0], units[-1]
    embed, head = first == 0, last == n_blocks + 1
    return Span(start=max(first - 1, 0), stop=min(last, n_blocks), embed=embed, head=head)


def parse_units(text: str, n_blocks: int) -> frozenset[int]:
    """The units that a notation such as `"embed,0,3-5,head"` names.

    Raises SpanSyntaxError for an unreadable item, a range that runs backwards, a unit named twice, or a block
    beyond the model.
    """
    units: set[int] = set()
    for raw in text.split(","):
        item = raw.strip()
        match = _ITEM.fullmatch(item)
        if match is None:
            raise SpanSyntaxError(
                f'"{item}" in span "{text}" is none of: embed, head, a block number, a range such as 0-13'
            )
        if match["end"]:
            new = {0 if match["end"] == "embed" else n_blocks + 1}
        else:
            first = int(match["first"])
            last = int(match["last"]) if match["last"] else first
            if last < first:
                raise SpanSyntaxError(f'range "{item}" in span "{text}" runs backwards')
            if last >= n_blocks:
                raise SpanSyntaxError(
                    f'block {last} in span "{text}" is beyond the model, whose blocks are 0-{n_blocks - 1}'
                )
            new = set(range(first + 1, last + 2))
        if new & units:
            raise SpanSyntaxError(f'"{item}" in span "{text}" names something twice')
        units |= new
    return frozenset(units)


def spans_of_units(units: Iterable[int], n_blocks: int) -> tuple[Span, ...]:
    """The maximal contiguous spans that make up `units`, in order."""
    spans: list[Span] = []
    run: list[int] = []
    for unit in sorted(set(units)):
        if run and unit != run[-1] + 1:
            spans.append(span_of_units(range(run[0], run[-1] + 1), n_blocks))
            run = []
        run.append(unit)
    if run:
        spans.append(span_of_units(range(run[0], run[-1] + 1), n_blocks))
    return tuple(spans)


def parse_spans(text: str, n_blocks: int) -> tuple[Span, ...]:
    """The maximal contiguous spans that a notation names; raises as `parse_units` does."""
    return spans_of_units(parse_units(text, n_blocks), n_blocks)


def format_spans(spans: Iterable[Span]) -> str:
    """The config's notation of `spans`, in the order given: `"embed,0-13,head"`."""
    items: list[str] = []
    for span in spans:
        if span.embed:
            items.append("embed")
        if span.stop - span.start == 1:
            items.append(str(span.start))
        elif span.stop > span.start:
            items.append(f"{span.start}-{span.stop - 1}")
        if span.head:
            items.append("head")
    return ",".join(items)


def format_units(units: Iterable[int], n_blocks: int) -> str:
    """The config's notation of a set of units; empty for no units."""
    return format_spans(spans_of_units(units, n_blocks))
