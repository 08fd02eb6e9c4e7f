"""The backend "reference": NumPy, f32, on the CPU, written to be read, and to say what the others must
compute.

Row-invariant: see `reference_math`. Weights saved as f32 are used in place, mapped from the file; bf16 and
f16 are widened when they are loaded, and quantised ones dequantised. The number of BLAS threads is taken from
the environment and does not change bits. Knows nothing of peers, sessions of users, sampling or text.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from dgn_backends.api import LoadRequest, Progress, Quant, Step, StepOutput
from dgn_backends.errors import BackendError, BackendUnavailable
from dgn_backends.kv import PAGE_POSITIONS, PagedKV
from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.reference_load import block_weights, read_weights
from dgn_backends.reference_math import (
    SUM_LENGTH,
    TILE_COLUMNS,
    TILE_ROWS,
    BlockWeights,
    Linear,
    Norm,
    attention,
    tile_count,
)
from dgn_backends.rope import angles, cos_sin
from dgn_backends.span import Span
from dgn_backends.step_check import check_step
from dgn_backends.tensor import DType, Tensor
from dgn_backends.weights import EMBEDDING, FINAL_NORM, head_tensor

F32 = npt.NDArray[np.float32]


class ReferenceBackend:
    """See the module. Computes in f32 only: other dtypes are refused."""

    name: ClassVar[str] = "reference"

    def devices(self) -> list[str]:
        """Always the CPU alone."""
        return ["cpu"]

    def loaded_bytes(self, request: LoadRequest) -> int:
        """See `CountsWeights`."""
        return loaded_bytes("none", request.config, [request.span], "f32")

    def load(self, request: LoadRequest, progress: Progress) -> ReferenceRunner:
        """Reads the span's tensors and makes it ready to run."""
        if request.device not in ("auto", "cpu"):
            raise BackendUnavailable(
                f'the reference backend runs on the CPU only, not on "{request.device}"; set device = "auto"'
            )
        if request.dtype not in ("auto", "f32"):
            raise BackendUnavailable(
                f'the reference backend computes in f32 only, not in "{request.dtype}"; set dtype = "auto"'
            )
        return ReferenceRunner(request, read_weights(request, progress))


@dataclass(slots=True, eq=False)
class _Sequence:
    span: Span
    total_positions: int
    inv_freq: F32
    rope_scaling: float
    kv: PagedKV


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """A step's place in the batch: its tiles are `[tile, tile + tiles)`, its rows `[row, row + count)` of
    these."""

    step: Step
    sequence: _Sequence
    tile: int
    tiles: int

    @property
    def first_tile(self) -> int:
        return self.step.start // TILE_ROWS

    @property
    def row(self) -> int:
        return self.step.start % TILE_ROWS

    def of(self, batch: F32) -> F32:
        """The step's tiles in `batch` [tiles, TILE_ROWS, ...]."""
        return batch[self.tile : self.tile + self.tiles]

    def rows_of(self, batch: F32) -> F32:
        """The step's rows in `batch`, [count, ...], as a view."""
        tiles = self.of(batch)
        flat = tiles.reshape(-1, *tiles.shape[2:])
        return flat[self.row : self.row + self.step.count]


class ReferenceRunner:
    """A loaded span; see `dgn_backends.api.SpanRunner`. Wrong input raises BackendError before anything
    changes."""

    dtype: DType = "f32"
    row_invariant = True

    def __init__(self, request: LoadRequest, weights: dict[str, F32]) -> None:
        config, span = request.config, request.span
        self.span = span
        self.weights_bytes = sum(array.nbytes for array in weights.values())
        self.numerics = numerics(request.quant)
        block = config.block
        self.kv_bytes_per_position = (span.stop - span.start) * 2 * block.n_kv_heads * block.head_dim * 4
        self._config = config
        self._embedding = weights[EMBEDDING] if span.embed else None
        self._blocks = {i: block_weights(config, i, weights) for i in range(span.start, span.stop)}
        if span.head:
            self._final_norm = Norm(weights[FINAL_NORM], block.norm_eps)
            self._head = Linear(weights[head_tensor(config)])
        self._sequences: dict[int, _Sequence] = {}

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        """Begins an empty sequence."""
        if sequence in self._sequences:
            raise BackendError(f"sequence {sequence} is open already")
        if not self.span.contains(span):
            raise BackendError(f'span "{span}" is not within the loaded span "{self.span}"')
        if total_positions < 1:
            raise BackendError(f"a sequence needs room for at least 1 position, not {total_positions}")
        block = self._config.block
        inv_freq, scaling = angles(block.rope, block.head_dim, total_positions)
        kv = PagedKV(span.stop - span.start, block.n_kv_heads, block.head_dim)
        self._sequences[sequence] = _Sequence(span, total_positions, inv_freq, scaling, kv)

    def length(self, sequence: int) -> int:
        """Positions in the sequence's KV."""
        return self._sequence(sequence).kv.length

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets positions from `length` on."""
        kv = self._sequence(sequence).kv
        if not 0 <= length <= kv.length:
            raise BackendError(
                f"sequence {sequence} has length {kv.length} and can't be truncated to {length}"
            )
        kv.truncate(length)

    def close(self, sequence: int) -> None:
        """Forgets the sequence and frees its KV."""
        self._sequence(sequence)
        del self._sequences[sequence]

    def kv_bytes(self) -> int:
        """Bytes of KV pages held now."""
        return sum(sequence.kv.n_bytes for sequence in self._sequences.values())

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """Runs a batch; see the API."""
        by_span: defaultdict[Span, list[int]] = defaultdict(list)
        seen: set[int] = set()
        for index, step in enumerate(steps):
            if step.sequence in seen:
                raise BackendError(f"sequence {step.sequence} is in the batch twice")
            seen.add(step.sequence)
            sequence = self._sequence(step.sequence)
            check_step(step, self._config, sequence.span, sequence.kv.length, sequence.total_positions)
            by_span[sequence.span].append(index)
        outputs: dict[int, StepOutput] = {}
        for span, indices in by_span.items():
            outputs.update(zip(indices, self._run(span, [steps[i] for i in indices]), strict=True))
        return [outputs[index] for index in range(len(steps))]

    def _sequence(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise BackendError(f"sequence {sequence} is not open") from None

    def _run(self, span: Span, steps: Sequence[Step]) -> list[StepOutput]:
        """`steps` of sequences that all run through `span`."""
        batch: list[_Placed] = []
        tile = 0
        for step in steps:
            tiles = tile_count(step.start, step.count)
            batch.append(_Placed(step, self._sequences[step.sequence], tile, tiles))
            tile += tiles
        x = np.zeros((tile, TILE_ROWS, self._config.block.hidden_size), dtype=np.float32)
        for placed in batch:
            placed.rows_of(x)[...] = self._inputs(span, placed.step.inputs)
        try:
            if span.stop > span.start:
                self._run_blocks(span, batch, x)
        except BaseException:  # a MemoryError, say: nothing half written may be taken for KV
            for placed in batch:
                placed.sequence.kv.truncate(placed.sequence.kv.length)
            raise
        for placed in batch:
            placed.sequence.kv.commit(placed.step.start + placed.step.count)
        if span.head:
            return [StepOutput(logits=self._logits(placed, x)) for placed in batch]
        return [StepOutput(hidden=Tensor.from_numpy(placed.rows_of(x).copy(), "f32")) for placed in batch]

    def _inputs(self, span: Span, inputs: Tensor) -> F32:
        if span.embed:
            assert self._embedding is not None  # the loaded span contains the sequence's
            rows: F32 = self._embedding[inputs.to_numpy()]
            return rows
        return inputs.to_f32()

    def _run_blocks(self, span: Span, batch: Sequence[_Placed], x: F32) -> None:
        """Changes `x` [tiles, TILE_ROWS, hidden_size] in place."""
        tables = [self._rotary(placed) for placed in batch]
        cos = np.concatenate([cos for cos, _ in tables])
        sin = np.concatenate([sin for _, sin in tables])
        for placed in batch:
            placed.sequence.kv.reserve(placed.step.start + placed.step.count)
        for block in range(span.start, span.stop):
            weights = self._blocks[block]
            x += self._attention(weights, block - span.start, batch, weights.input_norm(x), cos, sin)
            x += weights.mlp(weights.post_norm(x))

    def _rotary(self, placed: _Placed) -> tuple[F32, F32]:
        """cos and sin [tiles, TILE_ROWS, 1, head_dim / 2] of a step's tiles."""
        first = placed.first_tile * TILE_ROWS
        positions = np.arange(first, first + placed.tiles * TILE_ROWS).reshape(placed.tiles, TILE_ROWS, 1)
        return cos_sin(placed.sequence.inv_freq, placed.sequence.rope_scaling, positions)

    def _attention(
        self, weights: BlockWeights, kv_block: int, batch: Sequence[_Placed], x: F32, cos: F32, sin: F32
    ) -> F32:
        """Attention of one block over the normed `x`, storing its keys and values."""
        q, k, v = weights.heads(x, cos, sin)
        spec = weights.spec
        mixed = np.empty((x.shape[0], TILE_ROWS, spec.n_heads * spec.head_dim), dtype=np.float32)
        for placed in batch:
            kv, step = placed.sequence.kv, placed.step
            kv.write(kv_block, step.start, placed.rows_of(k), placed.rows_of(v))
            pages = kv.pages(kv_block, step.start + step.count)
            placed.of(mixed)[...] = attention(placed.of(q), placed.first_tile, pages, spec.window)
        return weights.o(mixed)

    def _logits(self, placed: _Placed, x: F32) -> Tensor:
        """f32 [len(logits_rows), vocab_size], computing only the tiles that hold a row asked for."""
        rows = [placed.row + row for row in placed.step.logits_rows]
        logits = np.empty((len(rows), self._config.vocab_size), dtype=np.float32)
        tiles = placed.of(x)
        for tile in sorted({row // TILE_ROWS for row in rows}):
            computed = self._head(self._final_norm(tiles[tile : tile + 1]))[0]
            for index, row in enumerate(rows):
                if row // TILE_ROWS == tile:
                    logits[index] = computed[row % TILE_ROWS]
        return Tensor.from_numpy(logits, "f32")


def numerics(quant: Quant) -> str:
    """Everything that shapes the rounding of this backend on this machine."""
    config = np.show_config(mode="dicts")
    blas = config["Build Dependencies"]["blas"]
    vector_units = (
        config["SIMD Extensions"].get("found") or config["SIMD Extensions"].get("baseline") or ["none"]
    )
    return (
        f"reference f32 kv=f32 quant={quant} tiles={TILE_ROWS},{TILE_COLUMNS},{SUM_LENGTH},{PAGE_POSITIONS} "
        f"numpy={np.__version__} "
        f"blas={blas['name']}-{blas['version']} cpu={platform.machine()}-{vector_units[-1]}"
    )
