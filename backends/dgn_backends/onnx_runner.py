"""A loaded span in ONNX Runtime: sequences and batches of steps. Knows nothing of files or of choosing a
device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dgn_backends.api import Step, StepOutput
from dgn_backends.errors import BackendError
from dgn_backends.onnx_batch import MAX_ROWS, Piece, cut, grid, groups
from dgn_backends.onnx_block import padded_head_dim
from dgn_backends.onnx_pools import Pools, Seat
from dgn_backends.onnx_rope import RopeTable, RopeTables
from dgn_backends.onnx_segments import Segments
from dgn_backends.onnx_session import Place
from dgn_backends.span import Span
from dgn_backends.step_check import check_distinct, check_step
from dgn_backends.tensor import STORAGE, DType, Tensor

F32 = npt.NDArray[np.float32]


@dataclass(slots=True, eq=False)
class _Sequence:
    span: Span
    total_positions: int
    length: int
    seat: Seat
    table: RopeTable


class OnnxRunner:
    """See `dgn_backends.api.SpanRunner`."""

    row_invariant = False

    def __init__(self, segments: Segments, pools: Pools, dtype: DType, numerics: str) -> None:
        self.span = segments.span
        self.dtype: DType = dtype
        self.numerics = numerics
        self.weights_bytes = segments.weights_bytes
        self._config = segments.config
        self._segments = segments
        block = self._config.block
        item = STORAGE[segments.device.numbers.attention].itemsize
        width = padded_head_dim(block.head_dim)
        self.kv_bytes_per_position = self._n_blocks(self.span) * 2 * block.n_kv_heads * width * item
        self._tables = RopeTables(block.rope, block.head_dim)
        self._pools = pools
        self._sequences: dict[int, _Sequence] = {}

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        """See the protocol. Raises BackendError for a sequence that is open or a span that is not loaded,
        LimitError where the address space ends. A part of the loaded span that was never asked for before
        takes about as long as loading."""
        if sequence in self._sequences:
            raise BackendError(f"sequence {sequence} is already open")
        if not self.span.contains(span):
            raise BackendError(f'span "{span}" is not within the loaded "{self.span}"')
        if total_positions < 1:
            raise BackendError(f"a sequence needs room for at least 1 position, not {total_positions}")
        self._segments.separate(span)
        table = self._tables.table(total_positions)
        seat = self._pools.seat(total_positions)
        self._sequences[sequence] = _Sequence(span, total_positions, 0, seat, table)

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """See the protocol. All steps are checked before any is computed: BackendError for a step that does
        not fit its sequence, LimitError for one beyond its positions."""
        self._check(steps)
        for step in steps:
            entry = self._get(step.sequence)
            entry.seat = self._pools.reserve(entry.seat, step.start + step.count)
        results = [_Result(step, self._get(step.sequence).span, self) for step in steps]
        pieces = [
            cut(number, self._get(step.sequence).seat.slot, step.start, step.count)
            for number, step in enumerate(steps)
        ]
        while any(pieces):
            together = [waiting.pop(0) for waiting in pieces if waiting]
            for alike in self._alike(steps, together):
                for group in groups(alike):
                    self._run(steps, results, group)
        for step in steps:
            self._get(step.sequence).length = step.start + step.count
        return [result.output() for result in results]

    def truncate(self, sequence: int, length: int) -> None:
        """See the protocol. Raises BackendError for a length that the sequence does not have."""
        entry = self._get(sequence)
        if not 0 <= length <= entry.length:
            raise BackendError(
                f"sequence {sequence} has length {entry.length} and can't be truncated to {length}"
            )
        entry.seat.pool.forget(entry.seat.slot, self._blocks(entry.span), length, entry.length)
        entry.length = length

    def length(self, sequence: int) -> int:
        """See the protocol."""
        return self._get(sequence).length

    def close(self, sequence: int) -> None:
        """See the protocol."""
        entry = self._get(sequence)
        del self._sequences[sequence]
        entry.seat.leave()

    def kv_bytes(self) -> int:
        """See the protocol; whole pages of the system's memory."""
        return sum(
            entry.seat.pool.n_bytes(self._n_blocks(entry.span), entry.length)
            for entry in self._sequences.values()
        )

    def embed(self, ids: npt.NDArray[np.integer]) -> F32:
        """Hidden states [n, hidden_size] of token ids [n]."""
        return self._segments.embed(ids)

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise BackendError(f"sequence {sequence} is not open") from None

    def _check(self, steps: Sequence[Step]) -> None:
        check_distinct(steps)
        for step in steps:
            entry = self._get(step.sequence)
            check_step(step, self._config, entry.span, entry.length, entry.total_positions)

    def _n_blocks(self, span: Span) -> int:
        return span.stop - span.start

    def _blocks(self, span: Span) -> range:
        """The places of a span's blocks in the pools."""
        return range(span.start - self.span.start, span.stop - self.span.start)

    def _alike(self, steps: Sequence[Step], pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces that may share a run: of the same span, slots and angles."""
        found: dict[tuple[Span, int, int], list[Piece]] = {}
        for piece in pieces:
            entry = self._get(steps[piece.step].sequence)
            found.setdefault((entry.span, id(entry.seat.pool), id(entry.table)), []).append(piece)
        return list(found.values())

    def _run(self, steps: Sequence[Step], results: Sequence[_Result], group: Sequence[Piece]) -> None:
        entry = self._get(steps[group[0].step].sequence)
        hidden = np.concatenate([results[piece.step].rows(piece) for piece in group])
        wanted: list[int] = []
        counts: list[int] = []  # rows of the result for each piece
        row = 0
        for piece in group:
            mine = results[piece.step].wanted(piece)
            wanted += [row + each for each in mine]
            counts.append(len(mine) if entry.span.head else piece.count)
            row += piece.count
        layout = grid(group)
        entry.table.reserve(layout.longest_total)
        place = Place(entry.seat.pool, entry.table)
        for session in self._segments.sessions(entry.span):
            hidden = session.run(hidden, layout, place, wanted)
        done = 0
        for piece, count in zip(group, counts, strict=True):
            results[piece.step].parts.append(hidden[done : done + count])
            done += count


class _Result:
    """The rows of one step, in and out, piece by piece."""

    def __init__(self, step: Step, span: Span, runner: OnnxRunner) -> None:
        self.parts: list[F32] = []
        self._step = step
        self._span = span
        self._runner = runner

    def rows(self, piece: Piece) -> F32:
        """The hidden states [count, hidden_size] that the piece begins with."""
        rows = self._step.inputs.rows(piece.first, piece.first + piece.count)
        return self._runner.embed(rows.to_numpy().astype(np.int64)) if self._span.embed else rows.to_f32()

    def wanted(self, piece: Piece) -> list[int]:
        """The rows of the piece whose logits are wanted, in the order asked for within the piece."""
        rows = [row - piece.first for row in self._step.logits_rows]
        return [row for row in rows if 0 <= row < piece.count]

    def output(self) -> StepOutput:
        """What goes back."""
        joined = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        if not self._span.head:
            return StepOutput(hidden=Tensor.from_f32(joined, self._runner.dtype))
        # Pieces come in the order of their rows; the caller may have asked in another.
        by_piece = np.argsort(np.array(self._step.logits_rows, np.int64) // MAX_ROWS, kind="stable")
        asked = joined if len(self.parts) == 1 else joined[np.argsort(by_piece)]
        return StepOutput(logits=Tensor.from_numpy(asked, "f32"))
