"""The worker's compute on a tiny model: sequences, batches, and every way in which a plugin can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from msgspec import structs
from tiny_llama import VOCAB_SIZE, make_tiny_llama

from dgn_backends.api import LoadRequest, Progress, Step, StepOutput
from dgn_backends.reference import ReferenceBackend
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor
from dgnd.models.sampling import pick
from dgnd.wire.codec import encode_bytes
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
    LoadSpans,
    OpenSequence,
    Sampling,
    StepFrame,
    TokenFrame,
)
from dgnd.worker import plugin as plugin_module
from dgnd.worker.runner import CREDITS, SpanWorker

BLOCKS = 3
HIDDEN = 32
PROMPT = [1, 70, 71, 72, 73, 74, 75]
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=BLOCKS, max_positions=64)


def worker(model: Path, *spans: str, backend: str = "reference", kv_bytes: int = 0) -> SpanWorker:
    request = LoadSpans(
        model="m",
        path=str(model),
        spans=spans or ("embed,0-2,head",),
        backend=backend,
        device="cpu",
        dtype="f32",
        kv_bytes=kv_bytes,
    )
    return SpanWorker(request, lambda done, total: None)


@pytest.fixture(scope="module")
def whole(model: Path) -> SpanWorker:
    """One for all tests that leave nothing behind: each opens hops of its own."""
    return worker(model)


@pytest.fixture
def keys() -> Iterator[HopKey]:
    return iter([HopKey("o", "s", hop) for hop in range(9)])


def one(worker: SpanWorker, frame: Frame) -> Any:
    """The message of the only answer."""
    (answer,) = worker.run([frame])
    return answer.message


def open_hop(worker: SpanWorker, key: HopKey, span: str = "embed,0-2,head", most: int = 64) -> HopKey:
    opened = one(worker, Frame(OpenSequence(key=key, span=span, max_positions=most)))
    assert opened == HopOpened(key=key, credits=CREDITS)
    return key


def step(
    key: HopKey,
    inputs: Sequence[int] | Tensor,
    start: int = 0,
    sample: Sampling | None = GREEDY,
    branch: int = 0,
    truncate_to: int | None = None,
) -> Frame:
    if not isinstance(inputs, Tensor):
        inputs = Tensor.from_numpy(np.asarray(inputs, "<i4"), "i32")
    message = StepFrame(
        key=key,
        branch=branch,
        route=1,
        start=start,
        count=inputs.shape[0],
        digest_start=0,
        digest_end=0,
        truncate_to=truncate_to,
        sample=sample,
    )
    return Frame(message, inputs)


def generated(worker: SpanWorker, key: HopKey, prompt: Sequence[int] = PROMPT, count: int = 6) -> list[int]:
    """Greedy ids, one step a token."""
    ids: list[int] = []
    start, inputs = 0, list(prompt)
    for _ in range(count):
        token = one(worker, step(key, inputs, start))
        assert isinstance(token, TokenFrame), token
        assert token.position == start + len(inputs)
        ids.append(token.token_id)
        start, inputs = start + len(inputs), [token.token_id]
    return ids


def close(worker: SpanWorker, *keys: HopKey) -> None:
    for key in keys:
        assert worker.run([Frame(CloseHop(key=key))]) == []


def failure(message: Any, kind: str, key: HopKey, *words: str) -> None:
    assert isinstance(message, Failure), message
    assert (message.kind, message.key) == (kind, key)
    for word in words:
        assert word in message.message
    assert "\n" not in message.message
    encode_bytes(Frame(message))  # it can be sent


# --- sequences ------------------------------------------------------------------------------------


def test_what_is_loaded_is_told(model: Path) -> None:
    first, second = worker(model, "embed,0", "2,head").loaded()
    assert (first.span, second.span) == ("embed,0", "2,head")
    assert first.dtype == "f32"
    assert first.weights_bytes > 0
    assert first.kv_bytes_per_position == second.kv_bytes_per_position > 0


def test_a_hop_opens_steps_and_closes(whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    key = open_hop(whole, next(keys))
    assert whole.sequence_count() == 1
    assert len(generated(whole, key)) == 6
    assert whole.kv_bytes() > 0
    close(whole, key)
    assert (whole.kv_bytes(), whole.sequence_count()) == (0, 0)
    close(whole, key)  # twice is no fault


def test_opening_again_begins_empty(whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    key = open_hop(whole, next(keys))
    first = generated(whole, key)
    open_hop(whole, key)
    assert whole.sequence_count() == 1
    assert generated(whole, key) == first
    close(whole, key)


@pytest.mark.parametrize("span", ["embed,0-5,head", "x", "0,2", "", "head,embed"])
def test_a_span_that_is_not_loaded_is_refused(model: Path, span: str) -> None:
    part = worker(model, "embed,0-1")
    key = HopKey("o", "s", 1)
    failure(one(part, Frame(OpenSequence(key=key, span=span, max_positions=9))), "backend", key)
    assert part.sequence_count() == 0


def test_two_spans_of_one_worker_are_two_hops(model: Path, whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    alone = open_hop(whole, next(keys))
    expected = generated(whole, alone, count=1)
    close(whole, alone)
    parts = worker(model, "embed,0-1", "2,head")
    low, high = (
        open_hop(parts, HopKey("o", "s", 1), "embed,0-1"),
        open_hop(parts, HopKey("o", "s", 2), "2,head"),
    )
    (hidden,) = parts.run([step(low, PROMPT)])
    assert isinstance(hidden.message, StepFrame)
    assert hidden.payload is not None
    assert (hidden.payload.dtype, hidden.payload.shape) == ("f32", (len(PROMPT), HIDDEN))
    assert hidden.message.sample == GREEDY  # the head still has to be asked
    assert one(parts, step(high, hidden.payload)).token_id == expected[0]


def test_chunks_without_sample_return_credits(whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    key = open_hop(whole, next(keys))
    credit = one(whole, step(key, PROMPT[:3], sample=None, branch=2))
    assert credit == Credit(key=key, branch=2, route=1, stop=3)
    token = one(whole, step(key, PROMPT[3:], 3))
    other = open_hop(whole, next(keys))
    assert token.token_id == generated(whole, other, count=1)[0]
    close(whole, key, other)


@pytest.mark.parametrize("span", ["embed,0-2,head", "embed,0-1"])
def test_chunks_of_one_hop_in_a_batch_give_what_they_give_one_by_one(
    model: Path, span: str, keys: Iterator[HopKey]
) -> None:
    part = worker(model, span)
    apart, together, other = (open_hop(part, next(keys), span) for _ in range(3))
    starts = [(0, 3, None), (3, 5, None), (5, 7, GREEDY)]
    single = [part.run([step(apart, PROMPT[a:b], a, sample)]) for a, b, sample in starts]
    frames = [step(together, PROMPT[a:b], a, sample) for a, b, sample in starts]
    joined = part.run([step(other, PROMPT), *frames])[1:]
    assert len(joined) == len(frames)
    for (alone,), answer in zip(single, joined, strict=True):
        assert structs.replace(answer.message, key=apart) == alone.message  # type: ignore[type-var]
        if alone.payload is not None:
            assert answer.payload is not None
            assert np.array_equal(answer.payload.to_numpy(), alone.payload.to_numpy())
    failed = part.run([step(together, PROMPT, 9, None), step(together, PROMPT, 16)])
    assert [answer.message.kind for answer in failed] == ["backend"] * 2  # type: ignore[union-attr]


def test_what_does_not_fit_the_budget_is_refused_and_leaves_the_others_alone(
    model: Path, whole: SpanWorker, keys: Iterator[HopKey]
) -> None:
    (loaded,) = whole.loaded()
    expected = generated(whole, open_hop(whole, HopKey("o", "s", 0)))
    close(whole, HopKey("o", "s", 0))
    room = 64 * loaded.kv_bytes_per_position  # each sequence is opened for as many positions
    part = worker(model, kv_bytes=room * 3 // 2)
    first, second = open_hop(part, next(keys)), open_hop(part, next(keys))
    ids = generated(part, first, count=3)
    held = part.kv_bytes()
    refused = one(part, step(second, PROMPT))
    failure(
        refused,
        "no_room_now",
        second,
        f"need {room:,} bytes",
        f"of the {room * 3 // 2:,} bytes",
        f"hold {room:,}",
    )
    assert part.kv_bytes() == held  # before anything was computed
    for start in range(len(PROMPT) + 2, len(PROMPT) + 5):
        ids.append(one(part, step(first, ids[-1:], start)).token_id)
    assert ids == expected
    close(part, first)
    assert generated(part, second) == expected


@pytest.mark.parametrize("ended", [EndTurn, Cancel])
def test_idle_hops_give_way_and_say_so_when_they_are_used_again(
    model: Path, whole: SpanWorker, keys: Iterator[HopKey], ended: type[EndTurn] | type[Cancel]
) -> None:
    (loaded,) = whole.loaded()
    expected = generated(whole, open_hop(whole, HopKey("o", "s", 0)))
    close(whole, HopKey("o", "s", 0))
    part = worker(model, kv_bytes=2 * 64 * loaded.kv_bytes_per_position)
    idle, busy, new = (open_hop(part, next(keys)) for _ in range(3))
    position = len(PROMPT) + 2
    kept = {key: generated(part, key, count=3) for key in (idle, busy)}
    part.run([Frame(ended(key=idle, branch=0))])
    assert generated(part, new) == expected
    assert part.sequence_count() == 2
    failure(one(part, step(idle, kept[idle][-1:], position)), "stale_state", idle, "gave way")
    assert one(part, step(busy, kept[busy][-1:], position)).token_id == expected[3]
    part.run([Frame(ended(key=new, branch=0))])
    assert generated(part, open_hop(part, idle)) == expected  # as by replay
    # What is in the batch is busy, also where its answer had ended before.
    part.run([Frame(ended(key=busy, branch=0))])
    late = open_hop(part, next(keys))
    answers = part.run([step(late, PROMPT), step(busy, [expected[3]], position + 1)])
    assert isinstance(answers[-1].message, TokenFrame)
    (refused,) = (answer.message for answer in answers if isinstance(answer.message, Failure))
    failure(refused, "no_room_now", late, "sessions that are answering hold")


def test_a_batch_gives_what_each_gives_alone(whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    hops = [open_hop(whole, key) for _, key in zip(range(3), keys, strict=False)]
    prompts = [PROMPT, PROMPT[:2], [9, 8, 7]]
    alone = [generated(whole, key, prompt, 1)[0] for key, prompt in zip(hops, prompts, strict=True)]
    for key in hops:
        open_hop(whole, key)
    answers = whole.run([step(key, prompt) for key, prompt in zip(hops, prompts, strict=True)])
    tokens = {a.message.key: a.message.token_id for a in answers if isinstance(a.message, TokenFrame)}
    assert tokens == dict(zip(hops, alone, strict=True))
    close(whole, *hops)


BAD_STEPS: dict[str, Callable[[HopKey], Frame]] = {
    "an id beyond the vocabulary": lambda key: step(key, [VOCAB_SIZE]),
    "the highest id": lambda key: step(key, [2**31 - 1]),
    "hidden states for the embedding": lambda key: step(
        key, Tensor.from_f32(np.ones((1, HIDDEN), "f4"), "f32")
    ),
    "a gap": lambda key: step(key, [5], 7),
    "beyond what it was opened for": lambda key: step(key, [5] * 20),
    "a truncation beyond its length": lambda key: step(key, [5], 3, truncate_to=3),
    "no payload": lambda key: Frame(step(key, [5]).message),
    "a hop that is not open": lambda key: step(HopKey("o", "other", key.hop), [5]),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_bad_step_in_a_batch_fails_alone(whole: SpanWorker, keys: Iterator[HopKey], what: str) -> None:
    good, bad, also = (
        open_hop(whole, next(keys)),
        open_hop(whole, next(keys), most=16),
        open_hop(whole, next(keys)),
    )
    expected = generated(whole, good)
    open_hop(whole, good)
    frame = BAD_STEPS[what](bad)
    answers = [a.message for a in whole.run([step(good, PROMPT), frame, step(also, PROMPT)])]
    tokens = {m.key: m.token_id for m in answers if isinstance(m, TokenFrame)}
    assert tokens == {good: expected[0], also: expected[0]}
    (failed,) = (m for m in answers if isinstance(m, Failure))
    assert failed.key == frame.message.key  # type: ignore[union-attr]
    assert failed.kind in ("backend", "limit")
    assert one(whole, step(good, [expected[0]], len(PROMPT))).token_id == expected[1]
    close(whole, good, bad, also)


def test_a_cancel_says_the_length_and_the_next_branch_truncates(
    whole: SpanWorker, keys: Iterator[HopKey]
) -> None:
    key = open_hop(whole, next(keys))
    first = generated(whole, key)
    length = one(whole, Frame(Cancel(key=key, branch=0)))
    assert length == HopLength(key=key, branch=0, length=len(PROMPT) + 5)
    token = one(whole, step(key, PROMPT[4:], 4, branch=1, truncate_to=4))
    assert token.token_id == first[0]
    assert one(whole, Frame(Cancel(key=HopKey("o", "gone", 3), branch=0))).length == 0
    close(whole, key)


def test_what_a_worker_does_not_do_is_a_failure(whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    key = next(keys)
    failure(one(whole, Frame(HopOpened(key=key, credits=1))), "backend", key, "HopOpened")


# --- sampling -------------------------------------------------------------------------------------


def history(key: HopKey, ids: Sequence[int], start: int = 0, answer_start: int = 0) -> Frame:
    message = History(key=key, branch=0, start=start, answer_start=answer_start)
    return Frame(message, Tensor.from_numpy(np.asarray(ids, "<i4"), "i32"))


PENALTIES = Sampling(
    repetition_penalty=1.7, presence_penalty=0.9, frequency_penalty=0.4, temperature=0.8, seed=3
)


def test_penalties_follow_the_history_and_the_tokens_picked_since(model: Path) -> None:
    recording = worker(model)
    logits: list[np.ndarray[Any, Any]] = []
    forward = recording.runners[0].forward

    def record(steps: Sequence[Step]) -> list[StepOutput]:
        outputs = forward(steps)
        logits.extend(output.logits.to_f32()[0] for output in outputs if output.logits is not None)
        return outputs

    recording.runners[0].forward = record  # type: ignore[method-assign]
    key = open_hop(recording, HopKey("o", "s", 1))
    assert recording.run([history(key, PROMPT, answer_start=len(PROMPT))]) == []
    said = list(PROMPT)
    start = 0
    for _ in range(8):
        token = one(recording, step(key, said[start:], start, PENALTIES)).token_id
        start = len(said)
        assert token == pick(logits[-1], PENALTIES, start, said, len(PROMPT))
        said.append(token)
    # A new turn tells the ids anew, from any position on.
    said = [*said[:9], 20, 21, 22]
    assert recording.run([history(key, said[9:], 9, answer_start=12)]) == []
    token = one(recording, step(key, said[9:], 9, PENALTIES, branch=1, truncate_to=9)).token_id
    assert token == pick(logits[-1], PENALTIES, 12, said, 12)


def test_a_history_with_foreign_ids_fails_its_hop_alone(whole: SpanWorker, keys: Iterator[HopKey]) -> None:
    bad, good = open_hop(whole, next(keys)), open_hop(whole, next(keys))
    whole.run([history(bad, [VOCAB_SIZE + 5])])
    answers = [a.message for a in whole.run([step(bad, PROMPT, sample=PENALTIES), step(good, PROMPT)])]
    failure(next(m for m in answers if m.key == bad), "bad_request", bad, "vocabulary")  # type: ignore[union-attr]
    assert isinstance(next(m for m in answers if m.key == good), TokenFrame)  # type: ignore[union-attr]
    whole.run([history(HopKey("o", "unknown", 1), [1, 2])])
    close(whole, bad, good)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-300),
        Sampling(temperature=100.0, top_k=2**31 - 1, top_p=1e-300, min_p=1.0, seed=2**64 - 1),
        Sampling(repetition_penalty=1e-300, presence_penalty=-100.0, frequency_penalty=100.0),
        Sampling(top_k=2**63 - 1, temperature=1.0),
    ],
)
def test_settings_at_the_edge_give_a_token(
    whole: SpanWorker, keys: Iterator[HopKey], sampling: Sampling
) -> None:
    key = open_hop(whole, next(keys))
    whole.run([history(key, PROMPT)])
    token = one(whole, step(key, PROMPT, sample=sampling))
    assert isinstance(token, TokenFrame), token
    assert 0 <= token.token_id < VOCAB_SIZE
    close(whole, key)


# --- plugins that are wrong -----------------------------------------------------------------------


class Faulty:
    """The reference backend around one fault. It strikes in steps whose first token id is TRIGGER."""

    TRIGGER: ClassVar[int] = 200
    name: ClassVar[str] = "faulty"
    fault: ClassVar[str] = ""

    def devices(self) -> list[str]:
        return ["cpu"]

    def load(self, request: LoadRequest, progress: Progress) -> FaultyRunner:
        return FaultyRunner(ReferenceBackend().load(request, progress), self.fault)


class Crash(Exception):
    """Something only the plugin knows."""


class FaultyRunner:
    def __init__(self, inner: Any, fault: str) -> None:
        self.inner, self.fault = inner, fault
        self.span: Span = inner.span
        self.dtype: DType = inner.dtype
        self.weights_bytes: int = inner.weights_bytes
        self.kv_bytes_per_position: int = inner.kv_bytes_per_position
        self.numerics: str = inner.numerics
        self.row_invariant: bool = inner.row_invariant
        self.struck = False

    def _strike(self, where: str) -> None:
        if self.fault == where:
            raise Crash("x" * 20_000)

    def open(self, sequence: int, span: Span, total_positions: int) -> None:
        self._strike("open")
        self.inner.open(sequence, span, total_positions)

    def truncate(self, sequence: int, length: int) -> None:
        if self.struck:
            self._strike("truncate")
        self.inner.truncate(sequence, length)

    def length(self, sequence: int) -> int:
        if self.struck:
            self._strike("length")
        result: int = self.inner.length(sequence)
        return result

    def close(self, sequence: int) -> None:
        self.inner.close(sequence)
        if self.struck:
            self._strike("close")

    def kv_bytes(self) -> int:
        result: int = self.inner.kv_bytes()
        return result

    def forward(self, steps: Sequence[Step]) -> Any:
        bad = next((i for i, item in enumerate(steps) if _first(item) == Faulty.TRIGGER), None)
        if bad is None:
            return self.inner.forward(steps)
        self.struck = True
        self._strike("raise before")
        outputs = self.inner.forward(steps)
        self._strike("raise after")
        match self.fault:
            case "memory":
                raise MemoryError
            case "too few":
                return outputs[:-1]
            case "too many":
                return [*outputs, outputs[0]]
            case "none":
                return None
            case "tuple":
                return tuple(outputs)
            case "no output":
                outputs[bad] = None
            case "empty output":
                outputs[bad] = StepOutput()
            case fault:
                outputs[bad] = _spoilt(outputs[bad], fault)
        return outputs


def _first(step: Step) -> float:
    values = step.inputs.to_f32()
    return float(values.reshape(-1)[0])


def _spoilt(output: StepOutput, fault: str) -> StepOutput:
    tensor = output.hidden or output.logits
    assert tensor is not None
    array = tensor.to_f32().copy()
    match fault:
        case "nan":
            array[-1, 3] = np.nan
        case "infinity":
            array[-1, 0] = -np.inf
        case "more rows":
            array = np.concatenate([array, array])
        case "fewer columns":
            array = array[:, :-1]
        case "one dimension":
            array = array.reshape(-1)
    kept = Tensor.from_f32(array, "f16" if fault == "dtype" else "f32")
    if fault == "ints":
        kept = Tensor.from_numpy(array.astype("<i4"), "i32")
    if fault == "numpy":
        kept = array  # type: ignore[assignment]
    if fault == "swapped":
        return StepOutput(hidden=output.logits, logits=output.hidden)
    return StepOutput(hidden=kept) if output.hidden is not None else StepOutput(logits=kept)


CALLS = ["raise before", "raise after", "memory", "too few", "too many", "none", "tuple", "no output"]
OUTPUTS = [
    "empty output", "nan", "infinity", "more rows", "fewer columns", "one dimension", "dtype", "ints",
    "numpy", "swapped",
]  # fmt: skip


@pytest.fixture
def faulty(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], SpanWorker]:
    def make(fault: str, span: str = "embed,0-2,head") -> SpanWorker:
        monkeypatch.setattr(Faulty, "fault", fault)
        monkeypatch.setattr(plugin_module, "load_backend", lambda name: Faulty())
        return worker(model, span, backend="faulty")

    return make


@pytest.mark.parametrize("span", ["embed,0-2,head", "embed,0-1"])
@pytest.mark.parametrize("fault", CALLS + OUTPUTS)
def test_a_fault_of_the_plugin_fails_its_hop_alone(faulty: Any, fault: str, span: str) -> None:
    broken = faulty(fault, span)
    hops = [open_hop(broken, HopKey("o", f"s{i}", i), span) for i in range(3)]
    fresh = open_hop(broken, HopKey("o", "fresh", 9), span)
    (right,) = broken.run([step(fresh, PROMPT)])
    inputs = [PROMPT, [Faulty.TRIGGER, 5], PROMPT]
    answers = broken.run([step(key, ids) for key, ids in zip(hops, inputs, strict=True)])
    by_key = {answer.message.key: answer for answer in answers}  # type: ignore[union-attr]
    assert len(answers) == len(by_key) == 3
    kind = "non_finite" if fault in ("nan", "infinity") else "backend"
    failure(by_key[hops[1]].message, kind, hops[1])
    for key in (hops[0], hops[2]):
        assert _result(by_key[key]) == _result(right)
    (again,) = broken.run([step(hops[0], [7], len(PROMPT))])
    (expected,) = broken.run([step(fresh, [7], len(PROMPT))])
    assert _result(again) == _result(expected)
    close(broken, *hops, fresh)
    assert broken.kv_bytes() == 0


def _result(frame: Frame) -> object:
    if isinstance(frame.message, TokenFrame):
        return frame.message.token_id
    assert isinstance(frame.message, StepFrame), frame.message
    assert frame.payload is not None
    return bytes(frame.payload.data)


def test_a_plugin_that_can_not_open_fails_the_opening(faulty: Any) -> None:
    broken = faulty("open")
    key = HopKey("o", "s", 1)
    message = one(broken, Frame(OpenSequence(key=key, span="embed,0-2,head", max_positions=9)))
    failure(message, "backend", key, "Crash")
    assert message.tag == "open"
    assert broken.sequence_count() == 0


@pytest.mark.parametrize("where", ["truncate", "length", "close"])
def test_a_plugin_that_fails_between_steps_fails_the_hop(faulty: Any, where: str) -> None:
    broken = faulty(where)
    key = open_hop(broken, HopKey("o", "s", 1))
    broken.run([step(key, [Faulty.TRIGGER, 5])])
    if where == "close":
        failure(one(broken, Frame(CloseHop(key=key))), "backend", key, "Crash")
        assert broken.sequence_count() == 0
        return
    if where == "length":
        failure(one(broken, Frame(Cancel(key=key, branch=0))), "backend", key, "Crash")
    failure(one(broken, step(key, [5], 2, truncate_to=2, branch=1)), "backend", key, "Crash")


def test_a_plugin_that_forgets_its_kv_is_found_out(faulty: Any) -> None:
    broken = faulty("")
    key = open_hop(broken, HopKey("o", "s", 1))
    one(broken, step(key, PROMPT))
    broken.runners[0].inner.truncate(0, 3)
    failure(one(broken, step(key, [5], len(PROMPT))), "backend", key, "3 positions")
