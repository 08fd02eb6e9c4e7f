"""The step that a worker computes before it says that it can: the frames of a session of one position.

Knows nothing of how they are carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dgn_backends.model import ModelConfig
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor
from dgnd.errors import error_from
from dgnd.wire.messages import CloseHop, Failure, Frame, HopKey, OpenSequence, Sampling, StepFrame

#: No peer id looks so.
_KEY = HopKey("self-test", "self-test", 0)


def test_step(
    span: Span, dtype: DType, config: ModelConfig, run: Callable[[Sequence[Frame]], list[Frame]]
) -> None:
    """Has `run` compute one through `span`, whose hidden states are in `dtype`. Raises what came of it, if
    that is a failure."""
    for frame in _frames(span, dtype, config):
        for answer in run([frame]):
            if isinstance(failure := answer.message, Failure):
                raise error_from(failure.kind, f"self-test of {span}: {failure.message}", {})


def _frames(span: Span, dtype: DType, config: ModelConfig) -> list[Frame]:
    if span.embed:
        payload = Tensor.from_numpy(np.zeros(1, np.int32), "i32")
    else:  # small numbers of both signs, like those of an embedding
        row = 0.01 * (np.arange(config.block.hidden_size, dtype=np.float32) % 7 - 3)
        payload = Tensor.from_f32(row[None, :], dtype)
    payload = Tensor(payload.dtype, payload.shape, bytes(payload.data))  # read-only, as most that is sent
    step = StepFrame(
        key=_KEY, branch=0, route=0, start=0, count=1, digest_start=0, digest_end=0,
        sample=Sampling() if span.head else None,
    )  # fmt: skip
    return [
        Frame(OpenSequence(key=_KEY, span=str(span), max_positions=1)),
        Frame(step, payload),
        Frame(CloseHop(key=_KEY, reason="")),
    ]
