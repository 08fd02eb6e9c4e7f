"""Calls of the backend plugin: foreign code, whose every failure becomes a typed error, and whose output is
checked before anybody relies on it. Knows nothing of frames of steps, sequences or sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np

from dgn_backends.api import LoadRequest, Progress, Quant, SpanRunner, Step, StepOutput
from dgn_backends.errors import BackendError, DgnError
from dgn_backends.model import ModelConfig
from dgn_backends.registry import load_backend
from dgn_backends.span import parse_spans
from dgn_backends.tensor import DType, Tensor, tensor_bytes
from dgnd.wire.messages import LoadSpans


def load_runners(request: LoadSpans, config: ModelConfig, progress: Progress) -> list[SpanRunner]:
    """The runners of all spans of the request, one plugin; raises ModelError, BackendError or LimitError."""
    backend = load_backend(request.backend)
    spans = [span for text in request.spans for span in parse_spans(text, config.n_blocks)]
    runners = []
    for index, span in enumerate(spans):

        def part(done: int, total: int, index: int = index) -> None:
            progress(index * total + done, len(spans) * total)

        load = LoadRequest(
            path=Path(request.path),
            config=config,
            span=span,
            device=request.device,
            dtype=request.dtype,
            threads=request.threads,
            quant=cast(Quant, request.quant),  # checked where the configuration is read
            cache_dir=Path(request.cache_dir) if request.cache_dir else None,
        )
        runners.append(backend.load(load, part))
    return runners


def forward(runner: SpanRunner, steps: list[Step]) -> list[StepOutput]:
    """One call of the plugin; what it raises, or returns that is no list of outputs, is a BackendError."""
    with plugin_call():
        outputs = runner.forward(steps)
    if not isinstance(outputs, list) or not all(isinstance(output, StepOutput) for output in outputs):
        raise BackendError(f"the backend returned {type(outputs).__name__}, not a list of StepOutput")
    if len(outputs) != len(steps):
        raise BackendError(f"the backend returned {len(outputs)} outputs for {len(steps)} steps")
    return outputs


@contextmanager
def plugin_call() -> Iterator[None]:
    """Around calls of the plugin: it is foreign code, and whatever it raises becomes a BackendError."""
    try:
        yield
    except DgnError:
        raise
    except Exception as error:
        raise BackendError(f"the backend failed: {type(error).__name__}: {error}") from error


def checked(tensor: Tensor | None, what: str, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """An output of the plugin, if it is what was asked for."""
    if not isinstance(tensor, Tensor):
        raise BackendError(f"the backend returned no {what}")
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        found = f"{tensor.dtype}{list(tensor.shape)}"
        raise BackendError(f"the backend returned {what} {found}, not {dtype}{list(shape)}")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no item is NaN or infinite; bf16 is judged by its exponent bits."""
    assert tensor_bytes(tensor.dtype, tensor.shape) == len(tensor.data)
    raw = tensor.to_numpy()
    if tensor.dtype == "bf16":
        return bool(((raw.astype(np.uint16) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(raw).all())
