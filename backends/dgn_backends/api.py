"""The seam between the worker and a backend plugin: what a plugin implements, and what it is given.

A plugin is a class with the shape of `Backend`, registered in the entry-point group `dgn.backends`. Only a
worker process imports it. Backends know nothing of peers, sessions of users, sampling or text: a *sequence*
is an integer that the worker gives, with its own KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

from dgn_backends.model import ModelConfig
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor

ENTRY_POINT_GROUP = "dgn.backends"


#: How linear layers, embedding and head are stored once loaded; `dgn_backends.quant` says what each means.
Quant = Literal["none", "int8", "int4", "int8-fast", "int4-fast"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Load `span` of the model in `path` (a Hugging Face directory, already read into `config`)."""

    path: Path
    config: ModelConfig
    span: Span
    device: str = "auto"  #: auto, cpu, cuda, cuda:N
    dtype: str = "auto"  #: auto, f32, bf16, f16
    threads: int | None = None  #: compute threads; None leaves it to the backend
    quant: Quant = "none"
    cache_dir: Path | None = None  #: where quantised weights may be kept for the next start; None: nowhere
    map_weights: bool = True  #: False: what isn't quantised is copied into memory of the process's own


#: Called with (bytes done, bytes in all) while loading; calls count as a sign of life.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward of positions `[start, start + count)` of one sequence.

    `inputs` is i32 [count] (token ids) where the sequence's span has `embed`, else hidden states
    [count, hidden_size] in any float dtype; its memory may be read-only. `start` is always the sequence's
    present length.
    `logits_rows` are the rows (offsets into the step) whose logits are wanted; only where the span has
    `head`.
    """

    sequence: int
    start: int
    inputs: Tensor
    logits_rows: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Positions in this step."""
        return self.inputs.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """`hidden` [count, hidden_size] in the runner's dtype where the span has no head; with a head `logits`,
    f32 [len(logits_rows), vocab_size], and no hidden states."""

    hidden: Tensor | None = None
    logits: Tensor | None = None


@runtime_checkable
class SpanRunner(Protocol):
    """One loaded span. All calls come from one thread.

    `numerics` names everything that shapes rounding: equal strings promise equal bits when `row_invariant` is
    true for both. `row_invariant`: a row's bits depend only on its own input and its own sequence's KV, not
    on the other rows of the batch or on how a prompt was cut into steps.
    """

    span: Span
    dtype: DType
    weights_bytes: int
    kv_bytes_per_position: int  #: for the whole span, at its KV dtype
    numerics: str
    row_invariant: bool

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        """Begins an empty sequence that runs through `span`, a part of the loaded one, and never grows beyond
        `total_positions` (rotary kinds that depend on the length use this one). Memory is taken as it
        grows."""

    def forward(self, steps: Sequence[Step]) -> list[StepOutput]:
        """Runs a batch; at most one step a sequence. Appends to each sequence's KV. One output a step, in
        order."""

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets positions from `length` on."""

    def length(self, sequence: int) -> int:
        """Positions in the sequence's KV."""

    def close(self, sequence: int) -> None:
        """Forgets the sequence and frees its KV."""

    def kv_bytes(self) -> int:
        """Bytes of KV held now by all sequences."""


class Backend(Protocol):
    """What the entry point names: a class without constructor arguments."""

    name: ClassVar[str]

    def devices(self) -> list[str]:
        """Devices usable on this machine, best first, such as ["cuda:0", "cpu"]."""

    def load(self, request: LoadRequest, progress: Progress) -> SpanRunner:
        """Reads the span's tensors (only these) and makes it ready to run.

        Raises ModelError for the files, BackendUnavailable for the device or dtype, LimitError for memory.
        """


@runtime_checkable
class CountsWeights(Protocol):
    """What a backend may also have, so that it is known before loading whether something fits. Without it a
    tensor is taken to need what it has in its file, or what `quant` makes of that."""

    def loaded_bytes(self, request: LoadRequest) -> int:
        """Bytes of this machine's memory that the weights of `request` will take once they are loaded; 0
        where they go elsewhere, to a GPU say. Reads no weights."""
