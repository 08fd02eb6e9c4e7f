"""A loaded span: its sequences, and batches of steps through it. See `dgn_backends.api.SpanRunner`.

This one works through a batch step by step. A faster backend puts the rows of all steps through its linear
layers at once, which is where batching pays; what it must never do is let one row's result depend on
another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dgn_backend_example.block import F32, F64, Block, attend, norm
from dgn_backends.api import Step, StepOutput
from dgn_backends.errors import BackendError
from dgn_backends.kv import PagedKV
from dgn_backends.model import ModelConfig
from dgn_backends.rope import angles, cos_sin
from dgn_backends.span import Span
from dgn_backends.step_check import check_step
from dgn_backends.tensor import DType, Tensor
from dgn_backends.weights import EMBEDDING, FINAL_NORM, block_prefix, head_tensor


@dataclass(slots=True, eq=False)
class _Sequence:
    span: Span
    total_positions: int
    inv_freq: F32
    rope_scaling: float
    kv: PagedKV


class ExampleRunner:
    """Float64 inside, f32 for what is handed on and for KV."""

    dtype: DType = "f32"
    #: NumPy's products may round a row differently with other rows beside it; only who has tested it says
    #: true.
    row_invariant = False

    def __init__(self, config: ModelConfig, span: Span, weights: Mapping[str, F64]) -> None:
        self.span = span
        self.weights_bytes = sum(array.nbytes for array in weights.values())
        spec = config.block
        self.kv_bytes_per_position = (span.stop - span.start) * 2 * spec.n_kv_heads * spec.head_dim * 4
        self.numerics = f"example f64 kv=f32 numpy={np.__version__}"
        self._config = config
        self._weights = weights
        self._blocks = [self._block(number) for number in range(span.start, span.stop)]
        self._sequences: dict[int, _Sequence] = {}

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        """Begins an empty sequence; memory is taken when it grows."""
        if sequence in self._sequences:
            raise BackendError(f"sequence {sequence} is open already")
        if not self.span.contains(span):
            raise BackendError(f'span "{span}" is not within the loaded span "{self.span}"')
        if total_positions < 1:
            raise BackendError(f"a sequence needs room for at least 1 position, not {total_positions}")
        spec = self._config.block
        inv_freq, scaling = angles(spec.rope, spec.head_dim, total_positions)
        kv = PagedKV(span.stop - span.start, spec.n_kv_heads, spec.head_dim)
        self._sequences[sequence] = _Sequence(span, total_positions, inv_freq, scaling, kv)

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """All steps are checked before the first is computed: a batch is refused whole, and changes
        nothing."""
        if len({step.sequence for step in steps}) != len(steps):
            raise BackendError("a sequence is in the batch twice")
        for step in steps:
            sequence = self._get(step.sequence)
            check_step(step, self._config, sequence.span, sequence.kv.length, sequence.total_positions)
        return [self._run(step, self._get(step.sequence)) for step in steps]

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets positions from `length` on."""
        kv = self._get(sequence).kv
        if not 0 <= length <= kv.length:
            raise BackendError(
                f"sequence {sequence} has length {kv.length} and can't be truncated to {length}"
            )
        kv.truncate(length)

    def length(self, sequence: int) -> int:
        """Positions in the sequence's KV."""
        return self._get(sequence).kv.length

    def close(self, sequence: int) -> None:
        """Forgets the sequence and frees its KV."""
        self._get(sequence)
        del self._sequences[sequence]

    def kv_bytes(self) -> int:
        """Bytes of KV held now by all sequences."""
        return sum(sequence.kv.n_bytes for sequence in self._sequences.values())

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise BackendError(f"sequence {sequence} is not open") from None

    def _block(self, number: int) -> Block:
        prefix = block_prefix(number)
        named = {
            name.removeprefix(prefix): array
            for name, array in self._weights.items()
            if name.startswith(prefix)
        }
        return Block(self._config.blocks[number], named)  # blocks may differ in window and rotation

    def _run(self, step: Step, sequence: _Sequence) -> StepOutput:
        span, kv, stop = sequence.span, sequence.kv, step.start + step.count
        x = (
            self._weights[EMBEDDING][step.inputs.to_numpy()]
            if span.embed
            else step.inputs.to_f32().astype("f8")
        )
        positions = np.arange(step.start, stop)[:, None]
        cos, sin = (
            table.astype("f8") for table in cos_sin(sequence.inv_freq, sequence.rope_scaling, positions)
        )
        kv.reserve(stop)
        for index in range(span.stop - span.start):
            block = self._blocks[span.start - self.span.start + index]
            q, k, v = block.queries_keys_values(x, cos, sin)
            kv.write(index, step.start, k.astype("f4"), v.astype("f4"))
            x = block.finish(x, attend(q, step.start, kv.pages(index, stop), block.spec.window))
        kv.commit(stop)
        if not span.head:
            return StepOutput(hidden=Tensor.from_f32(x.astype("f4"), self.dtype))
        rows = norm(x[list(step.logits_rows)], self._weights[FINAL_NORM], self._config.block.norm_eps)
        logits = rows @ self._weights[head_tensor(self._config)].T
        return StepOutput(logits=Tensor.from_f32(logits.astype("f4"), "f32"))
