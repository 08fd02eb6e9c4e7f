"""What every backend checks of a step before it computes. Knows nothing of how steps are computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgn_backends.api import Step
from dgn_backends.errors import BackendError, LimitError
from dgn_backends.model import ModelConfig
from dgn_backends.span import Span


def check_distinct(steps: Sequence[Step]) -> None:
    """Raises BackendError where a batch has two steps of one sequence."""
    if len({step.sequence for step in steps}) != len(steps):
        raise BackendError("a batch has more than one step of a sequence")


def check_step(step: Step, config: ModelConfig, span: Span, length: int, total_positions: int) -> None:
    """Checks `step` for a sequence that runs through `span`, holds `length` positions and never more than
    `total_positions`.

    Raises BackendError for what the caller got wrong, LimitError with both numbers for too many positions.
    """
    who = f"the step of sequence {step.sequence}"
    if span.embed:
        _check_token_ids(who, step, config.vocab_size)
    else:
        _check_hidden(who, step, config.block.hidden_size)
    if step.count < 1:
        raise BackendError(f"{who} has no positions")
    if step.start != length:
        raise BackendError(f"{who} starts at {step.start}, but the sequence has length {length}")
    if step.start + step.count > total_positions:
        raise LimitError(
            f"{who} would reach {step.start + step.count} positions; it was opened for {total_positions}"
        )
    if step.logits_rows and not span.head:
        raise BackendError(f'{who} asks for logits, but span "{span}" has no head')
    if not all(0 <= row < step.count for row in step.logits_rows):
        raise BackendError(
            f"{who} asks for logits of rows {list(step.logits_rows)}, but has {step.count} rows"
        )


def _check_token_ids(who: str, step: Step, vocab_size: int) -> None:
    inputs = step.inputs
    if inputs.dtype != "i32" or len(inputs.shape) != 1:
        raise BackendError(f"{who} needs token ids i32[n], not {inputs.dtype}{list(inputs.shape)}")
    ids = inputs.to_numpy().astype(np.int64)
    unknown = ids[(ids < 0) | (ids >= vocab_size)]
    if unknown.size:
        raise BackendError(f"{who} has token id {unknown[0]}; the vocabulary is 0 to {vocab_size - 1}")


def _check_hidden(who: str, step: Step, hidden_size: int) -> None:
    inputs = step.inputs
    if inputs.dtype == "i32" or len(inputs.shape) != 2 or inputs.shape[1] != hidden_size:
        raise BackendError(
            f"{who} needs hidden states [n, {hidden_size}], not {inputs.dtype}{list(inputs.shape)}"
        )
