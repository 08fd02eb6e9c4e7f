"""What the conformance checks are written with: tiny models on disk, runs of a backend and of the
reference, and how far two results are apart. Knows nothing of what is checked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from dgn_backends.api import Backend, LoadRequest, Quant, SpanRunner, Step, StepOutput
from dgn_backends.hf_config import read_config
from dgn_backends.model import ModelConfig
from dgn_backends.reference import ReferenceBackend
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor
from dgn_backends.testing_cases import MODELS
from dgn_backends.testing_models import make_tiny_llama
from dgn_backends.weights import whole_model

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class ConformanceError(AssertionError):
    """The backend broke the promise that `check` is named after."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class Bench:
    """A backend under test at one dtype, device and quantisation. `tolerance` is the largest distance allowed
    (see `distance`)."""

    def __init__(
        self, backend: Backend, dtype: str, device: str, tolerance: float, quant: Quant = "none"
    ) -> None:
        self.backend = backend
        self.dtype = dtype
        self.device = device
        self.quant = quant
        self.tolerance = tolerance
        self.check = ""
        self._directory = tempfile.TemporaryDirectory(prefix="dgn-check-backend-")
        self._reference: dict[str, F32] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()

    def require(self, condition: object, message: str) -> None:
        """Raises ConformanceError unless `condition` holds."""
        if not condition:
            raise ConformanceError(self.check, message)

    def model(self, name: str) -> tuple[Path, ModelConfig]:
        """The model `name` of `testing_cases.MODELS`, written when first asked for."""
        path = Path(self._directory.name) / name
        if not path.exists():
            make_tiny_llama(path, MODELS[name])
        return path, read_config(path)

    def request(self, name: str, span: Span | None = None) -> LoadRequest:
        """To load `span` of a model, or all of it, as the bench says."""
        path, config = self.model(name)
        return LoadRequest(
            path, config, span or whole_model(config), self.device, self.dtype, quant=self.quant
        )

    @property
    def cache_dir(self) -> Path:
        """A place where quantised weights may be kept."""
        return Path(self._directory.name) / "quantised"

    def load(self, name: str, span: Span | None = None) -> SpanRunner:
        """A runner of the backend under test."""
        return self.backend.load(self.request(name, span), lambda done, total: None)

    def load_reference(self, name: str, span: Span | None = None) -> SpanRunner:
        """A runner of the reference backend, in f32 on the CPU, with the weights as they are quantised."""
        path, config = self.model(name)
        request = LoadRequest(path, config, span or whole_model(config), "cpu", "f32", quant=self.quant)
        return ReferenceBackend().load(request, lambda done, total: None)

    def ids(self, name: str, count: int, seed: int = 0) -> Ids:
        """Random token ids of a model's vocabulary."""
        _, config = self.model(name)
        return np.random.default_rng(seed).integers(0, config.vocab_size, count).astype(np.int32)

    def hidden(self, name: str, count: int, seed: int = 0, size: float = 1.0) -> F32:
        """Random hidden states [count, hidden_size] with `size` as their standard deviation."""
        _, config = self.model(name)
        random = np.random.default_rng(seed).standard_normal((count, config.block.hidden_size))
        return (random * size).astype(np.float32)

    def reference_logits(self, name: str, ids: Ids) -> F32:
        """What the reference backend computes for the whole of `ids` at once."""
        key = f"{name}/{ids.tobytes().hex()}"
        if key not in self._reference:
            self._reference[key] = self.run(self.load_reference(name), ids, [len(ids)])
        return self._reference[key]

    def forward(self, runner: SpanRunner, steps: Sequence[Step]) -> list[F32]:
        """The results of a batch as f32, after a check of their number, kind, shape, dtype, and
        finiteness."""
        outputs = runner.forward(steps)
        self.require(len(outputs) == len(steps), f"{len(steps)} steps gave {len(outputs)} outputs")
        return [self._result(runner, step, output) for step, output in zip(steps, outputs, strict=True)]

    def run(
        self,
        runner: SpanRunner,
        inputs: Ids | F32,
        chunks: Sequence[int],
        sequence: int = 1,
        total: int | None = None,
    ) -> F32:
        """A new sequence through all of `runner`, in steps of the sizes `chunks` (the last repeats): the
        results of all positions. The sequence is closed again."""
        runner.open(sequence, runner.span, total or len(inputs))
        parts: list[F32] = []
        start, sizes = 0, list(chunks)
        while start < len(inputs):
            part = inputs[start : start + sizes[0]]
            parts += self.forward(runner, [step_of(runner.span, sequence, start, part)])
            start += len(part)
            sizes = sizes[1:] or sizes
        runner.close(sequence)
        return np.concatenate(parts)

    def same(self, runner: SpanRunner, got: F32, wanted: F32, what: str) -> None:
        """Requires `got` to be `wanted`: bit by bit where the runner says that rows keep their bits, else
        near."""
        if runner.row_invariant:
            self.require(np.array_equal(got, wanted), f"{what}: bits differ, but row_invariant is declared")
        self.near(got, wanted, what)

    def near(self, got: F32, wanted: F32, what: str) -> None:
        """Requires `got` to be within the tolerance of `wanted`."""
        self.require(got.shape == wanted.shape, f"{what}: shape {got.shape} instead of {wanted.shape}")
        apart = distance(got, wanted)
        self.require(
            apart <= self.tolerance, f"{what}: {apart:.2g} apart, of which {self.tolerance:.2g} is allowed"
        )

    def _result(self, runner: SpanRunner, step: Step, output: StepOutput) -> F32:
        if runner.span.head and output.logits is not None:
            tensor, rows, dtype = output.logits, len(step.logits_rows), "f32"
            self.require(output.hidden is None, "a span with the head gave hidden states as well")
        else:
            self.require(output.hidden is not None, "a step gave nothing that was asked for")
            assert output.hidden is not None
            tensor, rows, dtype = output.hidden, step.count, runner.dtype
        self.require(
            len(tensor.shape) == 2 and tensor.shape[0] == rows,
            f"a step of {rows} rows gave shape {list(tensor.shape)}",
        )
        self.require(tensor.dtype == dtype, f"a result has dtype {tensor.dtype} instead of {dtype}")
        result = tensor.to_f32()
        self.require(np.isfinite(result).all(), "a result is not finite")
        return np.array(result)


def step_of(span: Span, sequence: int, start: int, inputs: Ids | F32) -> Step:
    """A step of token ids or f32 hidden states that asks for all logits where `span` has the head."""
    dtype: DType = "i32" if inputs.dtype == np.int32 else "f32"
    tensor = Tensor(dtype, inputs.shape, inputs.tobytes())  # read-only, as most that comes over the wire
    return Step(sequence, start, tensor, tuple(range(len(inputs))) if span.head else ())


def distance(got: F32, wanted: F32) -> float:
    """How far apart two results [rows, width] are: the largest root-mean-square difference of a row, as a
    share of the root-mean-square of that row of `wanted`."""
    apart = np.sqrt(np.mean((got.astype(np.float64) - wanted) ** 2, axis=1))
    size = np.sqrt(np.mean(wanted.astype(np.float64) ** 2, axis=1))
    return float((apart / np.maximum(size, 1e-12)).max())
