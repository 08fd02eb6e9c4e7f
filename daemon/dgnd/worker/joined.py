"""Frames of one hop that follow each other, as the one step that a backend is given, and its output cut up
again. Knows nothing of backends or of scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from dgn_backends.errors import BackendError
from dgn_backends.tensor import Tensor
from dgnd.wire.messages import Frame, HopKey, StepFrame


def step_of(frame: Frame) -> StepFrame:
    """The message of a frame that is known to be a step."""
    assert isinstance(frame.message, StepFrame)
    return frame.message


def positions(batch: Sequence[Frame]) -> int:
    """The positions of all steps in a batch."""
    return sum(frame.message.count for frame in batch if isinstance(frame.message, StepFrame))


def hops_of(batch: Sequence[Frame]) -> list[HopKey]:
    """The hops that have steps in a batch, each once."""
    return list(dict.fromkeys(frame.message.key for frame in batch if isinstance(frame.message, StepFrame)))


def overtakes(batch: Sequence[Frame], answers: Sequence[Frame]) -> bool:
    """Whether the answers to `batch` may go before `answers`: it is of steps, and of other hops."""
    keys = {getattr(frame.message, "key", None) for frame in answers}
    return bool(batch) and all(
        isinstance(frame.message, StepFrame) and frame.message.key not in keys for frame in batch
    )


def by_hop(batch: Sequence[Frame]) -> list[tuple[Frame, ...]]:
    """The frames of a batch of steps, those of one hop together, in order."""
    return [tuple(frames) for _, frames in groupby(batch, lambda frame: step_of(frame).key)]


def joined_inputs(frames: Sequence[Frame]) -> Tensor:
    """The payloads of frames of one hop, one after the other. Raises BackendError for a step without one, or
    for payloads of several kinds."""
    payloads = [frame.payload for frame in frames if frame.payload is not None]
    if len(payloads) < len(frames) or len({(part.dtype, part.shape[1:]) for part in payloads}) != 1:
        raise BackendError(f"step {step_of(frames[0]).start} has no payload, or one of another kind")
    if len(payloads) == 1:
        return payloads[0]
    return Tensor.from_numpy(np.concatenate([part.to_numpy() for part in payloads]), payloads[0].dtype)


def cut(hidden: Tensor, frames: Sequence[Frame]) -> Iterator[Tensor]:
    """Each frame's rows of `hidden`, [positions of all frames, hidden_size]."""
    done = 0
    for frame in frames:
        count = step_of(frame).count
        yield hidden if count == hidden.shape[0] else hidden.rows(done, done + count)
        done += count
