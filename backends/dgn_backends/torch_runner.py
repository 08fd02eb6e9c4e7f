"""A loaded span in torch: sequences and batches of steps. Knows nothing of files or of choosing a
device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dgn_backends.api import Step, StepOutput
from dgn_backends.errors import BackendError
from dgn_backends.model import ModelConfig
from dgn_backends.rope import angles, cos_sin
from dgn_backends.span import Span
from dgn_backends.step_check import check_distinct, check_step
from dgn_backends.tensor import DType, Tensor
from dgn_backends.torch_attention import PageReader
from dgn_backends.torch_block import Rows, Segment, Tiles, rms_norm
from dgn_backends.torch_kv import TorchKV, new_kv
from dgn_backends.torch_load import TORCH_DTYPES, SpanWeights
from dgn_backends.torch_rows import pad_rows


@dataclass(slots=True, eq=False)
class _Sequence:
    span: Span
    total_positions: int
    kv: TorchKV
    inv_freq: npt.NDArray[np.float32]
    scaling: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a span runs."""

    device: torch.device
    dtype: DType
    tiles: Tiles
    row_invariant: bool
    numerics: str


class TorchRunner:
    """See `dgn_backends.api.SpanRunner`."""

    def __init__(self, config: ModelConfig, span: Span, weights: SpanWeights, placement: Placement) -> None:
        self.span = span
        self.dtype: DType = placement.dtype
        self.numerics = placement.numerics
        self.row_invariant = placement.row_invariant
        self.weights_bytes = weights.n_bytes
        self._config = config
        self._weights = weights
        self._device = placement.device
        self._torch_dtype = TORCH_DTYPES[placement.dtype]
        self._tiles = placement.tiles
        self._reader = PageReader()
        self._sequences: dict[int, _Sequence] = {}
        block = config.block
        per_block = 2 * block.n_kv_heads * block.head_dim * self._torch_dtype.itemsize
        self.kv_bytes_per_position = per_block * (span.stop - span.start)

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        """See the protocol. Raises BackendError for a sequence that is open or a span that is not
        loaded."""
        if sequence in self._sequences:
            raise BackendError(f"sequence {sequence} is already open")
        if not self.span.contains(span):
            raise BackendError(f'span "{span}" is not within the loaded "{self.span}"')
        if total_positions < 1:
            raise BackendError(f"a sequence needs room for at least 1 position, not {total_positions}")
        block = self._config.block
        inv_freq, scaling = angles(block.rope, block.head_dim, total_positions)
        shape = (span.stop - span.start, block.n_kv_heads, block.head_dim)
        kv = new_kv(shape, self._torch_dtype, self._device, total_positions)
        self._sequences[sequence] = _Sequence(span, total_positions, kv, inv_freq, scaling)

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """See the protocol. All steps are checked before any is computed: BackendError for a step that does
        not fit its sequence, LimitError for one beyond its positions or beyond memory."""
        self._check(steps)
        outputs: dict[int, StepOutput] = {}
        spans = {self._sequences[step.sequence].span for step in steps}
        with torch.inference_mode():
            for span in sorted(spans):  # steps through the same blocks share their linear layers
                alike = [step for step in steps if self._sequences[step.sequence].span == span]
                outputs.update(self._forward_span(span, alike))
        for step in steps:
            self._sequences[step.sequence].kv.length = step.start + step.count
        return [outputs[step.sequence] for step in steps]

    def truncate(self, sequence: int, length: int) -> None:
        """See the protocol. Raises BackendError for a length that the sequence does not have."""
        kv = self._get(sequence).kv
        if not 0 <= length <= kv.length:
            raise BackendError(
                f"sequence {sequence} has length {kv.length} and can't be truncated to {length}"
            )
        with torch.inference_mode():
            kv.truncate(length)

    def length(self, sequence: int) -> int:
        """See the protocol."""
        return self._get(sequence).kv.length

    def close(self, sequence: int) -> None:
        """See the protocol."""
        self._get(sequence)
        del self._sequences[sequence]

    def kv_bytes(self) -> int:
        """See the protocol."""
        return sum(sequence.kv.n_bytes() for sequence in self._sequences.values())

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise BackendError(f"sequence {sequence} is not open") from None

    def _check(self, steps: Sequence[Step]) -> None:
        check_distinct(steps)
        for step in steps:
            sequence = self._get(step.sequence)
            check_step(step, self._config, sequence.span, sequence.kv.length, sequence.total_positions)

    def _forward_span(self, span: Span, steps: Sequence[Step]) -> dict[int, StepOutput]:
        """Outputs by sequence of steps that all go through `span`."""
        x = torch.cat([self._enter(step, span) for step in steps])
        rows = self._rows(span, steps)
        x = pad_rows(x, self._tiles.linear.padded(x.shape[0]))
        for block in self._weights.blocks[span.start - self.span.start : span.stop - self.span.start]:
            x = block.forward(x, rows)
        if span.head:
            return self._logits(x, steps, rows)
        parts = [x[segment.first : segment.first + segment.count] for segment in rows.segments]
        return {
            step.sequence: StepOutput(hidden=_to_wire(part, self.dtype))
            for step, part in zip(steps, parts, strict=True)
        }

    def _enter(self, step: Step, span: Span) -> torch.Tensor:
        if not span.embed:
            return _from_wire(step.inputs).to(device=self._device, dtype=self._torch_dtype)
        assert self._weights.embedding is not None
        return self._weights.embedding.rows(step.inputs.to_numpy().astype(np.int64)).to(self._torch_dtype)

    def _rows(self, span: Span, steps: Sequence[Step]) -> Rows:
        segments: list[Segment] = []
        tables: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []
        first = 0
        for step in steps:
            sequence = self._sequences[step.sequence]
            sequence.kv.reserve(step.start + step.count)
            segments.append(Segment(sequence.kv, span.start, first, step.count, step.start))
            positions = np.arange(step.start, step.start + step.count)
            tables.append(cos_sin(sequence.inv_freq, sequence.scaling, positions))
            first += step.count
        padded = self._tiles.linear.padded(first)
        cos, sin = (
            pad_rows(torch.from_numpy(np.concatenate(table)), padded).to(self._device)[:, None]
            for table in zip(*tables, strict=True)
        )
        return Rows(segments, cos, sin, self._tiles, self._reader)

    def _logits(self, x: torch.Tensor, steps: Sequence[Step], rows: Rows) -> dict[int, StepOutput]:
        assert self._weights.head is not None
        assert self._weights.final_norm is not None
        wanted = [
            segment.first + row
            for step, segment in zip(steps, rows.segments, strict=True)
            for row in step.logits_rows
        ]
        logits = torch.empty((0, self._config.vocab_size))
        if wanted:
            tiles = self._tiles.linear
            picked = pad_rows(x[torch.tensor(wanted, device=self._device)], tiles.padded(len(wanted)))
            normed = rms_norm(picked, self._weights.final_norm, self._config.block.norm_eps)
            logits = self._weights.head(normed, tiles)[: len(wanted)].float().cpu()
        outputs: dict[int, StepOutput] = {}
        for step in steps:
            mine, logits = logits.tensor_split([len(step.logits_rows)])
            outputs[step.sequence] = StepOutput(logits=_to_wire(mine, "f32"))
        return outputs


def _from_wire(tensor: Tensor) -> torch.Tensor:
    """A copy of raw float data as a torch tensor."""
    return torch.frombuffer(bytearray(tensor.data), dtype=TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def _to_wire(x: torch.Tensor, dtype: DType) -> Tensor:
    raw = x.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return Tensor(dtype, tuple(x.shape), raw.data)
