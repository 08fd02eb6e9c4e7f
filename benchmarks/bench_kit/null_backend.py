"""A backend that computes nothing: what is left of a token's time is the way. Its answers are zeros of the
right shape, so that everything around it does all that it does for a real one. Knows nothing of who measures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from plugin_site import Site

from dgn_backends.api import LoadRequest, Progress, Step, StepOutput
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor


class NullRunner:
    """A span without weights; see `dgn_backends.api.SpanRunner`."""

    dtype: DType = "f32"
    weights_bytes = 0
    kv_bytes_per_position = 0
    numerics = "null"
    row_invariant = True

    def __init__(self, request: LoadRequest) -> None:
        self.span = request.span
        self._width = request.config.block.hidden_size
        self._vocab = request.config.vocab_size
        self._zeros = functools.lru_cache(_zeros)
        self._lengths: dict[int, int] = {}
        self._spans: dict[int, Span] = {}

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        """Begins an empty sequence."""
        self._lengths[sequence], self._spans[sequence] = 0, span

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """Zeros."""
        return [self._output(step) for step in steps]

    def _output(self, step: Step) -> StepOutput:
        self._lengths[step.sequence] += step.count
        if self._spans[step.sequence].head:
            return StepOutput(logits=self._zeros(len(step.logits_rows), self._vocab))
        return StepOutput(hidden=self._zeros(step.count, self._width))

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets positions from `length` on."""
        self._lengths[sequence] = length

    def length(self, sequence: int) -> int:
        """Positions so far."""
        return self._lengths[sequence]

    def close(self, sequence: int) -> None:
        """Forgets the sequence."""
        del self._lengths[sequence], self._spans[sequence]

    def kv_bytes(self) -> int:
        """None are held."""
        return 0


def _zeros(rows: int, width: int) -> Tensor:
    return Tensor.from_numpy(np.zeros((rows, width), np.float32), "f32")


class NullBackend:
    """See the module."""

    name: ClassVar[str] = "null"

    def devices(self) -> list[str]:
        """The CPU."""
        return ["cpu"]

    def load(self, request: LoadRequest, progress: Progress) -> NullRunner:
        """Reads nothing."""
        return NullRunner(request)


def null_site(folder: Path) -> dict[str, str]:
    """Installs the backend `null` in `folder`; the environment for processes that are to find it."""
    site = Site(folder)
    entry = {"null": "bench_kit.null_backend:NullBackend"}
    site.add("null-backend", entry, {})
    here = Path(__file__).resolve()
    paths = [site.environment["PYTHONPATH"], str(here.parents[1]), str(here.parents[2] / "tests")]
    return {"PYTHONPATH": ":".join(paths)}
