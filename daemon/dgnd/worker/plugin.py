"""Calls of the backend plugin: foreign code, whose every failure becomes a typed error that names it, and
whose output is checked before anybody relies on it. Knows nothing of frames of steps, sequences or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from dgn_backends.api import (
    Backend,
    CountsWeights,
    LoadRequest,
    Progress,
    Quant,
    SpanRunner,
    Step,
    StepOutput,
)
from dgn_backends.errors import BackendError, BackendUnavailable, DgnError, LimitError, NonFiniteOutput
from dgn_backends.foreign import raised
from dgn_backends.model import ModelConfig
from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.registry import label_of, load_backend
from dgn_backends.span import Span, parse_spans
from dgn_backends.tensor import DType, Tensor, tensor_bytes
from dgnd.memory.fitting import least_kv, refusal
from dgnd.memory.system_memory import private_bytes
from dgnd.wire.messages import LoadSpans

_RUNNER_DTYPES = set(get_args(DType)) - {"i32"}
_MOST = 2**63 - 1


class _Blame:
    """A context: whatever goes wrong in it is the plugin's fault, and names it; only what is wrong with a
    model or does not fit is not. Several times for every token, so it is no generator."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        match error:
            case None:
                pass
            case BackendError() if not error.message.startswith(self._label):
                kinds = (BackendUnavailable, NonFiniteOutput)
                kind = next((kind for kind in kinds if isinstance(error, kind)), BackendError)
                raise kind(f"{self._label}: {error.message}", **error.data) from error
            case DgnError():
                pass  # goes on as it is
            case _:
                raise BackendError(f"{self._label} raised {raised(error)}") from error


class Plugin:
    """The one plugin of this worker, by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.label = label_of(name)
        self.apart = False  #: it computes in another memory than the machine's
        self.private_weights = 0  #: bytes of weights in memory of this process alone
        self._blame = _Blame(self.label)

    def call(self) -> _Blame:
        """Around calls of the plugin and looks at what it returned."""
        return self._blame

    def load(self, request: LoadSpans, config: ModelConfig, progress: Progress) -> list[SpanRunner]:
        """The runners of all spans of the request; raises ModelError, BackendError or LimitError, the last
        one before anything is read where it is known that it does not fit."""
        with self.call():
            backend = load_backend(request.backend)
        spans = [span for text in request.spans for span in parse_spans(text, config.n_blocks)]
        with self.call():
            self.apart = _device(backend, request.device) != "cpu"
        if request.memory_bytes and not self.apart:
            self._refuse_what_does_not_fit(backend, request, config, spans)
        before = private_bytes()
        runners = []
        for index, span in enumerate(spans):

            def part(done: int, total: int, index: int = index) -> None:
                progress(index * total + done, len(spans) * total)

            with self.call():
                load = _load_request(request, config, span)
                runners.append(_checked_runner(backend.load(load, part), span))
        weights = sum(runner.weights_bytes for runner in runners)
        self.private_weights = 0 if self.apart else min(max(private_bytes() - before, 0), weights)
        return runners

    def _refuse_what_does_not_fit(
        self, backend: Backend, request: LoadSpans, config: ModelConfig, spans: Sequence[Span]
    ) -> None:
        """With room for one session at least. Raises LimitError with the numbers."""

        def needs(span: Span, quant: str) -> int:
            load = replace(_load_request(request, config, span), quant=cast(Quant, quant))
            if not isinstance(backend, CountsWeights):
                weights = loaded_bytes(quant, config, [span])
            else:
                weights = _count("loaded_bytes()", backend.loaded_bytes(load))
            return weights + least_kv(config, span)

        free = request.memory_bytes - private_bytes()
        with self.call():
            why = refusal(spans, request.quant, config.n_blocks, free, needs)
        if why:
            raise LimitError(why)

    def forward(self, runner: SpanRunner, steps: list[Step]) -> list[StepOutput]:
        """One call; what it raises, or returns that is no list of outputs, is a BackendError."""
        with self.call():
            outputs = runner.forward(steps)
            if not isinstance(outputs, list) or not all(isinstance(each, StepOutput) for each in outputs):
                raise BackendError(f"it returned {type(outputs).__name__}, not a list of StepOutput")
            if len(outputs) != len(steps):
                raise BackendError(f"it returned {len(outputs)} outputs for {len(steps)} steps")
        return outputs

    def kv_bytes(self, runners: list[SpanRunner]) -> int:
        """Bytes of KV that the runners say they hold."""
        with self.call():
            return sum(_count("kv_bytes()", runner.kv_bytes()) for runner in runners)


def _device(backend: Backend, wanted: str) -> str:
    """The kind of device that is computed on."""
    name = wanted if wanted != "auto" else next(iter(backend.devices()), "cpu")
    return name.partition(":")[0]


def _load_request(request: LoadSpans, config: ModelConfig, span: Span) -> LoadRequest:
    return LoadRequest(
        path=Path(request.path),
        config=config,
        span=span,
        device=request.device,
        dtype=request.dtype,
        threads=request.threads,
        quant=cast(Quant, request.quant),  # checked where the configuration is read
        cache_dir=Path(request.cache_dir) if request.cache_dir else None,
        map_weights=request.map_weights,
    )


def _checked_runner(runner: object, span: Span) -> SpanRunner:
    """What `load` returned, if it says what it is in the API's types: others rely on it."""
    if not isinstance(runner, SpanRunner):
        raise BackendError(f"its load() returned {type(runner).__name__}, which has not all of a SpanRunner")
    if runner.span != span:
        raise BackendError(f'its load() returned a runner of "{runner.span}", not of "{span}"')
    if not isinstance(runner.dtype, str) or runner.dtype not in _RUNNER_DTYPES:
        raise BackendError(f"its runner's dtype is {runner.dtype!r:.99}, not one of {sorted(_RUNNER_DTYPES)}")
    if (
        not isinstance(runner.numerics, str)
        or not runner.numerics.isprintable()
        or len(runner.numerics) > 1024
    ):
        raise BackendError("its runner's numerics is not one line of at most 1024 characters")
    if not isinstance(runner.row_invariant, bool):
        raise BackendError(f"its runner's row_invariant is {runner.row_invariant!r:.99}, not a bool")
    for name in ("weights_bytes", "kv_bytes_per_position"):
        _count(name, getattr(runner, name))
    return runner


def _count(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise BackendError(f"its runner's {name} is {value!r:.99}, not a number of bytes")
    return value


def checked(tensor: Tensor | None, what: str, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """An output of the plugin, if it is what was asked for; its shape is our own, whose items are ints."""
    if not isinstance(tensor, Tensor):
        raise BackendError(f"it returned no {what}")
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        found = f"{tensor.dtype}{list(tensor.shape)}"
        raise BackendError(f"it returned {what} {found:.99}, not {dtype}{list(shape)}")
    return Tensor(dtype, shape, tensor.data)


def is_finite(tensor: Tensor) -> bool:
    """Whether no item is NaN or infinite; bf16 is judged by its exponent bits."""
    assert tensor_bytes(tensor.dtype, tensor.shape) == len(tensor.data)
    raw = tensor.to_numpy()
    is_bf16 = tensor.dtype == "bf16"
    finite = (raw.astype(np.uint16) & 0x7F80) != 0x7F80 if is_bf16 else np.isfinite(raw)
    return bool(np.count_nonzero(finite) == raw.size)  # to count takes half as long as to reduce
