"""What one node told of its offers, each span of it read once, however often it is asked for.

Knows nothing of who told it, or of whether it is to be believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dgn_backends.span import Span, SpanSyntaxError, format_units, parse_units, spans_of_units
from dgnd.routing.exactness import Way
from dgnd.wire.messages import ModelOffer, SpanOffer


@dataclass(frozen=True, slots=True)
class Offered:
    """An offer of one model."""

    spans: tuple[tuple[Span, SpanOffer], ...] = ()
    planned: frozenset[int] = frozenset()  #: units that the node has or is about to have
    problem: str = ""  #: why none of its spans can be used

    def way(self, span: Span) -> Way | None:
        """How `span` is computed; None where it is not offered."""
        for offered, item in self.spans:
            if offered.contains(span):
                return Way(item.quant, item.dtype, item.numerics, item.row_invariant)
        return None


class Told:
    """The offers of one message."""

    def __init__(self, offers: Iterable[ModelOffer]) -> None:
        self.models = {offer.model: offer for offer in offers}
        self._read: dict[tuple[str, int], Offered] = {}

    def read(self, model: str, n_blocks: int) -> Offered:
        """What is offered of a model that has so many blocks here."""
        found = self._read.get((model, n_blocks))
        if found is None:
            offer = self.models.get(model)
            found = Offered() if offer is None else _read(offer, n_blocks)
            self._read[model, n_blocks] = found
        return found


def _read(offer: ModelOffer, n_blocks: int) -> Offered:
    try:
        spans, problem = read_spans(offer.spans, n_blocks), ""
    except SpanSyntaxError as error:
        spans, problem = (), str(error)
    if offer.planned is None:
        units = frozenset(unit for span, item in spans if not item.leaving for unit in span.units())
    else:
        try:
            units = parse_units(offer.planned, n_blocks) if offer.planned else frozenset()
        except SpanSyntaxError:
            units = frozenset()
    return Offered(spans, units, problem)


def read_spans(items: Iterable[SpanOffer], n_blocks: int) -> tuple[tuple[Span, SpanOffer], ...]:
    """The contiguous spans of each item. Raises SpanSyntaxError for what can't be read, and for spans that
    overlap: a node has one worker for what it offers of a model, and each block in it once."""
    found: list[tuple[Span, SpanOffer]] = []
    taken: set[int] = set()
    for item in items:
        units = parse_units(item.span, n_blocks)
        if taken & units:
            raise SpanSyntaxError(f"it offers {format_units(taken & units, n_blocks)} twice")
        taken |= units
        found += [(span, item) for span in spans_of_units(units, n_blocks)]
    return tuple(found)
