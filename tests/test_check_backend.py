"""The conformance suite: the built-in backends pass it, and it catches backends that are broken in known
ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest

from dgn_backends.api import LoadRequest, Progress, Quant, SpanRunner, Step, StepOutput
from dgn_backends.kv import PAGE_POSITIONS
from dgn_backends.reference import ReferenceBackend, ReferenceRunner
from dgn_backends.reference_math import BlockWeights
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgn_backends.testing import CHECKS, ConformanceError, check_backend


@pytest.mark.parametrize("quant", get_args(Quant))
@pytest.mark.parametrize("check", CHECKS)
def test_reference_conforms(check: str, quant: Quant) -> None:
    check_backend(ReferenceBackend(), quant=quant, checks=[check])


@pytest.mark.parametrize(
    ("dtype", "quant"),
    [(dtype, "none") for dtype in ("f32", "bf16", "f16")]
    + [(dtype, quant) for dtype in ("f32", "bf16") for quant in get_args(Quant) if quant != "none"]
    + [("f16", "int4")],
)
@pytest.mark.parametrize("check", CHECKS)
def test_torch_conforms(check: str, dtype: str, quant: Quant) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from dgn_backends.torch_backend import TorchBackend

    check_backend(TorchBackend(), dtype=dtype, quant=quant, checks=[check])


class Broken:
    """A runner of the reference backend with one thing wrong; everything else is passed on."""

    def __init__(self, inner: ReferenceRunner) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class BrokenBackend:
    """Loads reference runners, broken by `breakage`."""

    name: ClassVar[str] = "broken"

    def __init__(self, breakage: Callable[[ReferenceRunner], object]) -> None:
        self.breakage = breakage

    def devices(self) -> list[str]:
        return ["cpu"]

    def load(self, request: LoadRequest, progress: Progress) -> SpanRunner:
        runner: Any = self.breakage(ReferenceBackend().load(request, progress))
        return runner  # type: ignore[no-any-return]  # broken runners only look like one


class WrongCount(Broken):
    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        return outputs[:-1] if len(steps) > 1 else outputs


class SharedScale(Broken):
    """Rounds inputs to 8 bits with one scale for the whole batch."""

    row_invariant = False

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        if any(step.inputs.dtype == "i32" for step in steps):
            return self.inner.forward(steps)
        scale = max(np.abs(step.inputs.to_f32()).max() for step in steps) / 127.0
        return self.inner.forward(
            [
                replace(step, inputs=Tensor.from_f32(np.rint(step.inputs.to_f32() / scale) * scale, "f32"))
                for step in steps
            ]
        )


class MixedUpKV(Broken):
    """Swaps the caches of the first two sequences of a batch."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        if len(steps) > 1:
            first, second = (self.inner._sequences[step.sequence].kv for step in steps[:2])
            first._pages, second._pages = second._pages, first._pages
        return outputs


class OneCacheForAll(Broken):
    """Keeps keys and values of all sequences in the cache of the one opened last."""

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        self.inner.open(sequence, span, total_positions)
        newest = self.inner._sequences[sequence].kv
        for other in self.inner._sequences.values():
            other.kv._pages = newest._pages


class LazyTruncate(Broken):
    """Forgets one position too few."""

    def truncate(self, sequence: int, length: int) -> None:
        self.inner.truncate(sequence, length)
        self.inner._sequences[sequence].kv.length = length + 1


class LeakyClose(Broken):
    """Keeps a page of every sequence that was closed."""

    leaked = 0

    def close(self, sequence: int) -> None:
        self.leaked += self.inner._sequences[sequence].kv.n_bytes
        self.inner.close(sequence)

    def kv_bytes(self) -> int:
        return self.inner.kv_bytes() + self.leaked


class NoLimit(Broken):
    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        self.inner.open(sequence, span, total_positions * 2)


class ForgetsOldest(Broken):
    """Drops the first page's values once the sequence is longer than two pages."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        for step in steps:
            pages = self.inner._sequences[step.sequence].kv._pages
            if len(pages) > 2:
                pages[0][:, 1] = 0
        return outputs


class CopiesKV(Broken):
    """Makes its cache anew at every step, as a concatenation would."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        for step in steps:
            kv = self.inner._sequences[step.sequence].kv
            kv._pages = [page.copy() for page in kv._pages]
        return outputs


class RepeatsKV(Broken):
    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        for step in steps:
            kv = self.inner._sequences[step.sequence].kv
            repeated = [np.repeat(page, 8, axis=2) for page in kv._pages]
            assert all(page.any() for page in repeated)
        return self.inner.forward(steps)


class WholeMask(Broken):
    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        for step in steps:
            assert np.tril(np.ones((step.count, step.start + step.count), dtype=bool)).any()
        return self.inner.forward(steps)


class NotInvariant(Broken):
    """Results depend in the last bits on how many rows there are."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        rows = sum(step.count for step in steps)
        return [self._nudged(output, np.float32(1 + rows * 2.0**-22)) for output in outputs]

    def _nudged(self, output: StepOutput, factor: np.float32) -> StepOutput:
        def nudge(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else Tensor.from_f32(tensor.to_f32() * factor, "f32")

        return StepOutput(nudge(output.hidden), nudge(output.logits))


class OtherBlocks(Broken):
    """Computes with blocks that are not those of the model."""

    def __init__(self, inner: ReferenceRunner) -> None:
        super().__init__(inner)
        inner._blocks = {number: self.other(block) for number, block in inner._blocks.items()}

    def other(self, block: BlockWeights) -> BlockWeights:
        raise NotImplementedError


class NoWindow(OtherBlocks):
    def other(self, block: BlockWeights) -> BlockWeights:
        return replace(block, spec=replace(block.spec, window=None))


class WindowEverywhere(OtherBlocks):
    """Takes the window of some blocks for that of the model."""

    def other(self, block: BlockWeights) -> BlockWeights:
        windows = {spec.window for spec in self.inner._config.blocks} - {None}
        return replace(block, spec=replace(block.spec, window=min(windows, default=None)))


class RotatesEveryBlock(OtherBlocks):
    def other(self, block: BlockWeights) -> BlockWeights:
        return replace(block, spec=replace(block.spec, rotary=True))


class NoHeadNorms(OtherBlocks):
    def other(self, block: BlockWeights) -> BlockWeights:
        return replace(block, q_norm=None, k_norm=None)


class DropsBehindWindow(Broken):
    """Gives up keys and values once every window has passed them."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        for step in steps:
            sequence = self.inner._sequences[step.sequence]
            for number, block in enumerate(self.inner._config.blocks):
                behind = sequence.kv.length - (block.window or sequence.kv.length)
                if sequence.span.start <= number < sequence.span.stop:
                    for page in sequence.kv._pages[: behind // PAGE_POSITIONS]:
                        page[number - sequence.span.start] = 0.0
        return outputs


class NaNWhenLarge(Broken):
    """Squares in f16, as a norm that is not widened would."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        outputs = self.inner.forward(steps)
        with np.errstate(over="ignore"):
            large = [
                step.inputs.dtype != "i32"
                and not np.isfinite(np.square(step.inputs.to_f32().astype(np.float16))).all()
                for step in steps
            ]
        return [
            StepOutput(logits=Tensor.from_f32(np.full(output.logits.shape, np.nan, np.float32), "f32"))
            if bad and output.logits is not None
            else output
            for bad, output in zip(large, outputs, strict=True)
        ]


@pytest.mark.parametrize(
    ("breakage", "check"),
    [
        (WrongCount, "batch"),
        (SharedScale, "batch"),
        (MixedUpKV, "batch"),
        (OneCacheForAll, "interleaved"),
        (LazyTruncate, "rollback"),
        (LeakyClose, "kv-accounting"),
        (NoLimit, "limits"),
        (ForgetsOldest, "chunks"),
        (CopiesKV, "kv-in-place"),
        (RepeatsKV, "no-repeat"),
        (WholeMask, "small-masks"),
        (NotInvariant, "row-invariance"),
        (NaNWhenLarge, "large-values"),
        (NoWindow, "reference"),
        (WindowEverywhere, "reference"),
        (RotatesEveryBlock, "reference"),
        (NoHeadNorms, "reference"),
        (DropsBehindWindow, "rollback"),
    ],
)
def test_a_broken_runner_is_caught(breakage: type[Broken], check: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_backend(BrokenBackend(breakage), checks=[check])
    assert caught.value.check == check
    assert str(caught.value).startswith(f"{check}: ")
    assert "raised" not in str(caught.value)  # found by its effect, not by an accident of this test


def test_a_small_error_is_caught() -> None:
    class Scaled(Broken):
        row_invariant = False

        def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
            return [
                StepOutput(
                    output.hidden,
                    output.logits and Tensor.from_f32(output.logits.to_f32() * np.float32(1.001), "f32"),
                )
                for output in self.inner.forward(steps)
            ]

    with pytest.raises(ConformanceError, match="apart"):
        check_backend(BrokenBackend(Scaled), checks=["reference"])


def test_a_runner_that_raises_is_caught() -> None:
    class Raises(Broken):
        def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
            raise ZeroDivisionError("by design")

    with pytest.raises(ConformanceError, match="reference: raised ZeroDivisionError: by design"):
        check_backend(BrokenBackend(Raises), checks=["reference"])


def test_every_check_is_documented_and_no_other() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs/backend-plugins.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", text, flags=re.M) == list(CHECKS)
