"""What an answer must be: the whole model in one runner, one step after the other. No frames, no sessions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from dgn_backends.api import LoadRequest, SpanRunner, Step
from dgn_backends.hf_config import read_config
from dgn_backends.reference import ReferenceBackend
from dgn_backends.span import parse_spans
from dgn_backends.tensor import Tensor
from dgnd.models.sampling import pick
from dgnd.wire.messages import Sampling


@cache
def _whole(model: Path) -> SpanRunner:
    config = read_config(model)
    (span,) = parse_spans(f"embed,0-{config.n_blocks - 1},head", config.n_blocks)
    return ReferenceBackend().load(
        LoadRequest(path=model, config=config, span=span), lambda done, total: None
    )


def right_ids(model: Path, prompt: Sequence[int], sampling: Sampling, count: int) -> list[int]:
    """The first `count` ids that follow `prompt`."""
    runner, ids, start = _whole(model), list(prompt), 0
    runner.open(0, runner.span, read_config(model).max_positions)
    try:
        while len(ids) < len(prompt) + count:
            rows = Tensor.from_numpy(np.asarray(ids[start:], dtype="<i4"), "i32")
            (output,) = runner.forward([Step(0, start, rows, (len(ids) - start - 1,))])
            assert output.logits is not None
            start = len(ids)
            ids.append(pick(output.logits.to_f32()[0], sampling, start, ids, len(prompt)))
    finally:
        runner.close(0)
    return ids[len(prompt) :]
