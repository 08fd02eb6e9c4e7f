"""The worker's compute: frames in, frames out, over the spans that one backend plugin loaded.

Knows nothing of sockets, threads or peers. Every failure of the plugin becomes a typed `Failure` of the hop
concerned; a plugin's output is checked before anything is passed on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dgn_backends.api import Progress, Step, StepOutput
from dgn_backends.errors import BackendError, DgnError, NonFiniteOutput
from dgn_backends.hf_config import read_config
from dgn_backends.model import ModelConfig
from dgn_backends.span import parse_spans
from dgn_backends.tensor import Tensor
from dgnd.errors import StaleState
from dgnd.memory.system_memory import available_bytes
from dgnd.models.sampling import logprobs, pick
from dgnd.wire.allowed import unpack
from dgnd.wire.codec import failure_of
from dgnd.wire.messages import (
    Cancel,
    CloseHop,
    Credit,
    EndTurn,
    Failure,
    Frame,
    History,
    HopKey,
    HopLength,
    HopOpened,
    LoadedSpan,
    LoadSpans,
    OpenSequence,
    StepFrame,
    TokenFrame,
)
from dgnd.worker.first_step import test_step
from dgnd.worker.joined import by_hop, cut, joined_inputs, positions, step_of
from dgnd.worker.kv_budget import AUTOMATIC_SHARE, KVBudget
from dgnd.worker.plugin import Plugin, checked, is_finite
from dgnd.worker.sequence import WorkerSequence
from dgnd.worker.speed import StepWork

#: Chunks of one hop that may be under way in it at once.
CREDITS = 4


@dataclass(frozen=True, slots=True)
class _Work:
    """What one hop has in a batch: frames that follow each other, as one step."""

    frames: tuple[Frame, ...]
    sequence: WorkerSequence
    step: Step


class SpanWorker:
    """The loaded spans and their sequences. All calls come from one thread."""

    def __init__(self, request: LoadSpans, progress: Progress) -> None:
        self.config: ModelConfig = read_config(Path(request.path))
        self.plugin = Plugin(request.backend)
        self.runners = self.plugin.load(request, self.config, progress)
        self.budget: KVBudget[HopKey] = KVBudget(request.kv_bytes or int(available_bytes() * AUTOMATIC_SHARE))
        self._sequences: dict[HopKey, WorkerSequence] = {}
        self._gave_way: set[HopKey] = set()  # hops without KV until they are closed
        self._numbers = itertools.count()

    def loaded(self) -> tuple[LoadedSpan, ...]:
        """What `Loaded` says."""
        return tuple(
            LoadedSpan(
                span=str(runner.span),
                numerics=runner.numerics,
                dtype=runner.dtype,
                row_invariant=runner.row_invariant,
                weights_bytes=runner.weights_bytes,
                kv_bytes_per_position=runner.kv_bytes_per_position,
            )
            for runner in self.runners
        )

    @property
    def private_weights(self) -> int:
        """Bytes of weights that are in memory of this process alone."""
        return self.plugin.private_weights

    @property
    def apart(self) -> bool:
        """Whether weights and KV are in another memory than the machine's."""
        return self.plugin.apart

    def limit_kv(self, n_bytes: int) -> None:
        """What KV may take from now on: idle sequences give way at once where they hold more."""
        for idle in self.budget.limit(n_bytes):
            self._gave_way.add(idle)
            self._free(idle)

    def self_test(self) -> None:
        """One step through each span, as a session would have it: whoever says that it is loaded has
        computed. Raises what the step failed with."""
        for runner in self.runners:
            test_step(runner.span, runner.dtype, self.config, self.run)

    def kv_bytes(self) -> int:
        """KV bytes held now."""
        return self.plugin.kv_bytes(self.runners)

    def sequence_count(self) -> int:
        """Open sequences."""
        return len(self._sequences)

    def works(self, batch: Sequence[Frame]) -> list[StepWork]:
        """How big the steps of a batch are that was run."""
        found = []
        for frames in by_hop(batch):
            sequence = self._sequences.get(step_of(frames[0]).key)
            if sequence is not None:
                span, runner = sequence.span, sequence.runner
                size = positions(frames)
                found.append(StepWork(id(runner), size, sequence.weight, span.stop - span.start))
        return found

    def run(self, batch: Sequence[Frame]) -> list[Frame]:
        """Does one batch of the scheduler; returns the answers."""
        message = batch[0].message
        if isinstance(message, StepFrame):
            return self._steps(batch)
        try:
            return self._control(batch[0])
        except DgnError as error:
            return [Frame(_failure(message, error))]

    def _control(self, frame: Frame) -> list[Frame]:
        message = frame.message
        match message:
            case OpenSequence():
                return [self._open(message)]
            case History():
                return self._history(message, frame.payload)
            case Cancel():
                length = self._length(message.key)
                self.budget.idle(message.key)
                return [Frame(HopLength(key=message.key, branch=message.branch, length=length))]
            case EndTurn():
                self.budget.idle(message.key)
                return []
            case CloseHop():
                self._close(message.key)
                return []
            case _:
                raise BackendError(f"a worker can't do {type(message).__name__}")

    # --- sequences

    def _open(self, message: OpenSequence) -> Frame:
        try:
            (span,) = parse_spans(message.span, self.config.n_blocks)
        except ValueError as error:
            raise BackendError(f"{message.span!r:.99} is not one span: {error}") from None
        runner = next((r for r in self.runners if r.span.contains(span)), None)
        if runner is None:
            loaded = ", ".join(str(r.span) for r in self.runners)
            raise BackendError(f"blocks {message.span} are not loaded here; loaded: {loaded}")
        self._close(message.key)
        number = next(self._numbers)
        with self.plugin.call():
            runner.open(number, span, message.max_positions)
        weight = sum(self.config.unit_weights[unit] for unit in span.units())
        sequence = WorkerSequence(runner, number, span, message.max_positions, weight)
        self._sequences[message.key] = sequence
        fitting = self.budget.most_positions(sequence.kv_bytes_per_position, message.max_positions)
        opened = HopOpened(key=message.key, credits=CREDITS)
        if fitting < message.max_positions:
            opened = HopOpened(
                key=message.key, credits=CREDITS, kv_positions=fitting, kv_budget=self.budget.total
            )
        return Frame(opened)

    def _history(self, message: History, payload: Tensor | None) -> list[Frame]:
        sequence = self._sequences.get(message.key)
        if sequence is not None and payload is not None:
            del sequence.history[message.start :]
            sequence.history.extend(int(i) for i in payload.to_numpy())
            sequence.answer_start = message.answer_start
        return []

    def _length(self, key: HopKey) -> int:
        sequence = self._sequences.get(key)
        if sequence is None:
            return 0
        with self.plugin.call():
            return int(sequence.runner.length(sequence.number))

    def _close(self, key: HopKey) -> None:
        self._gave_way.discard(key)
        self._free(key)

    def _free(self, key: HopKey) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self.budget.release(key)
            with self.plugin.call():
                sequence.runner.close(sequence.number)

    # --- steps

    def _steps(self, batch: Sequence[Frame]) -> list[Frame]:
        """Runs steps, those of one runner together; the failure of a batch is narrowed down to its hop."""
        answers: list[Frame] = []
        groups: dict[int, list[_Work]] = {}
        for frame in batch:
            self.budget.busy(step_of(frame).key)
        for frames in by_hop(batch):
            try:
                work = self._prepare(frames)
            except DgnError as error:
                answers += _failures(frames, error)
            else:
                groups.setdefault(id(work.sequence.runner), []).append(work)
        for group in groups.values():
            answers += self._group(group)
        return answers

    def _prepare(self, frames: tuple[Frame, ...]) -> _Work:
        first, last = step_of(frames[0]), step_of(frames[-1])
        sequence = self._sequences.get(first.key)
        if first.key in self._gave_way:
            raise StaleState("the KV cache of this idle session gave way to others")
        if sequence is None:
            raise BackendError(f"step {first.start} of hop {first.key.hop} has no open sequence")
        with self.plugin.call():
            if first.truncate_to is not None:
                sequence.runner.truncate(sequence.number, first.truncate_to)
            length = sequence.runner.length(sequence.number)
        if length != first.start:
            raise BackendError(f"a step from position {first.start}, but the KV holds {length} positions")
        inputs = joined_inputs(frames)
        self._reserve(first.key, sequence, first.start + inputs.shape[0])
        rows = (inputs.shape[0] - 1,) if last.sample is not None and sequence.span.head else ()
        return _Work(frames, sequence, Step(sequence.number, first.start, inputs, rows))

    def _reserve(self, key: HopKey, sequence: WorkerSequence, positions: int) -> None:
        """Memory for `positions` of the sequence, within the budget: idle ones give way, and come back by
        replay. Raises LimitError."""
        per_position = sequence.kv_bytes_per_position
        for idle in self.budget.reserve(key, positions, per_position, sequence.max_positions):
            self._gave_way.add(idle)
            self._free(idle)

    def _group(self, group: list[_Work]) -> list[Frame]:
        try:
            outputs = self.plugin.forward(group[0].sequence.runner, [work.step for work in group])
        except DgnError as error:
            if len(group) > 1:
                return [answer for work in group for answer in self._alone(work)]
            return _failures(group[0].frames, error)
        answers: list[Frame] = []
        for work, output in zip(group, outputs, strict=True):
            try:
                with self.plugin.call():
                    answers += self._answers(work, output)
            except DgnError as error:
                answers += _failures(work.frames, error)
        return answers

    def _alone(self, work: _Work) -> list[Frame]:
        """One hop's step of a batch that failed, again and by itself, from where it was."""
        try:
            with self.plugin.call():
                work.sequence.runner.truncate(work.sequence.number, work.step.start)
        except DgnError as error:
            return _failures(work.frames, error)
        return self._group([work])

    def _answers(self, work: _Work, output: StepOutput) -> list[Frame]:
        """One answer to each frame."""
        sequence, step = work.sequence, work.step
        if sequence.span.head:
            return [self._head_answer(step_of(frame), sequence, output) for frame in work.frames]
        shape = (step.count, self.config.block.hidden_size)
        hidden = checked(output.hidden, "hidden states", sequence.runner.dtype, shape)
        if not is_finite(hidden):
            where = f"{step.start}-{step.start + step.count - 1}"
            raise NonFiniteOutput(f"blocks {sequence.span} gave NaN or infinity at positions {where}")
        parts = cut(hidden, work.frames)
        return [Frame(frame.message, part) for frame, part in zip(work.frames, parts, strict=True)]

    def _head_answer(self, message: StepFrame, sequence: WorkerSequence, output: StepOutput) -> Frame:
        """A token where one was asked for, else the credit for the next step."""
        if message.sample is None:
            return Frame(
                Credit(key=message.key, branch=message.branch, route=message.route, stop=message.stop)
            )
        logits = checked(output.logits, "logits", "f32", (1, self.config.vocab_size))
        row = logits.to_f32()[0]
        wanted = message.sample.logprobs
        token = pick(
            row,
            message.sample,
            message.stop,
            sequence.history[: message.stop],
            sequence.answer_start,
            None if message.allowed is None else unpack(message.allowed, self.config.vocab_size),
        )
        if message.sample.needs_history:
            del sequence.history[message.stop :]
            sequence.history.append(token)
        return Frame(
            TokenFrame(
                key=message.key,
                branch=message.branch,
                route=message.route,
                position=message.stop,
                token_id=token,
                logprobs=None if wanted is None else logprobs(row, token, wanted),
            )
        )


def _failures(frames: Sequence[Frame], error: DgnError) -> list[Frame]:
    return [Frame(_failure(frame.message, error)) for frame in frames]


def _failure(message: object, error: DgnError) -> Failure:
    key = getattr(message, "key", None)
    branch = getattr(message, "branch", 0)
    tag = "open" if isinstance(message, OpenSequence) else "step"
    return failure_of(error, key, branch, tag)
