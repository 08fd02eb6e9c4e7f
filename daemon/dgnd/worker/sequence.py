"""One hop's state in a worker. Knows nothing of frames or of the budget that it shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from dgn_backends.api import SpanRunner
from dgn_backends.span import Span


@dataclass(slots=True)
class WorkerSequence:
    """`number` is what the runner calls it; `history` are the token ids so far, where penalties need them."""

    runner: SpanRunner
    number: int
    span: Span
    max_positions: int
    weight: float = 1.0  #: what a decode step through `span` takes, where one through a block takes 1
    history: list[int] = field(default_factory=list)
    answer_start: int = 0

    @property
    def kv_bytes_per_position(self) -> int:
        """Of its span, which may be a part of the runner's."""
        blocks = max(self.runner.span.stop - self.runner.span.start, 1)
        return self.runner.kv_bytes_per_position * (self.span.stop - self.span.start) // blocks
