"""The reference backend: against transformers, bit by bit against itself, and against wrong use."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_cases import (
    CASES,
    CHUNKS,
    F32_BOUND,
    POSITIONS,
    VARYING_CASES,
    LlamaCase,
    llama_case,
    run_chunked,
)
from tiny_llama import make_tiny_llama

from dgn_backends.api import LoadRequest, SpanRunner, Step
from dgn_backends.errors import BackendError, BackendUnavailable, LimitError
from dgn_backends.kv import PAGE_POSITIONS
from dgn_backends.reference import ReferenceBackend, ReferenceRunner
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor

N_BLOCKS = 4


def load(case: LlamaCase, span: Span | None = None) -> SpanRunner:
    return ReferenceBackend().load(case.load_request(span), lambda done, total: None)


def ids_step(sequence: int, start: int, ids: np.ndarray, rows: tuple[int, ...] = ()) -> Step:
    return Step(sequence, start, Tensor.from_numpy(ids.astype(np.int32), "i32"), rows)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    case = llama_case(name)
    runner = load(case)
    for chunk in CHUNKS:
        logits = run_chunked(runner, case.ids, chunk)
        worst = np.abs(logits - case.logits).max()
        assert worst < F32_BOUND, f"chunks of {chunk}"
    # The comparison would notice: positions, and the tokens before, change the logits a lot.
    assert np.abs(case.logits[1:] - case.logits[:-1]).max() > 1.0
    assert runner.kv_bytes() == 0


def test_any_chunking_gives_the_same_bits() -> None:
    for name in ("plain", "dynamic", "mlp-bias", "bf16-weights", *VARYING_CASES):
        case = llama_case(name)
        runner = load(case)
        at_once = run_chunked(runner, case.ids, POSITIONS)
        for chunks in (1, 5, 16, 128, [3, 16, 1, 1, 44, 63, 2, 200], [15, 2, 300], [16, 48, 64, 1]):
            assert run_chunked(runner, case.ids, chunks).tobytes() == at_once.tobytes(), f"{name}, {chunks}"


def test_any_batch_gives_the_same_bits() -> None:
    """Sequences of different lengths, in batches whose company changes at every step."""
    case = llama_case("plain")
    runner = load(case)
    rng = np.random.default_rng(5)
    prompts = {s: rng.integers(0, case.config.vocab_size, 40 + 23 * s).astype(np.int32) for s in range(6)}
    alone = {s: run_chunked(runner, ids, len(ids)) for s, ids in prompts.items()}
    parts: dict[int, list[np.ndarray]] = {s: [] for s in prompts}
    for s, ids in prompts.items():
        runner.open(s, runner.span, len(ids))
    while waiting := [s for s in prompts if runner.length(s) < len(prompts[s])]:
        members = rng.permutation(waiting)[: rng.integers(1, len(waiting) + 1)].tolist()
        steps = []
        for s in members:
            start = runner.length(s)
            part = prompts[s][start : start + int(rng.integers(1, 30))]
            steps.append(ids_step(s, start, part, tuple(range(len(part)))))
        for s, output in zip(members, runner.forward(steps), strict=True):
            assert output.logits is not None
            assert output.hidden is None
            parts[s].append(output.logits.to_f32())
    for s in prompts:
        assert np.concatenate(parts[s]).tobytes() == alone[s].tobytes()


@pytest.mark.parametrize(
    "cuts", [(1,), (2,), (1, 2, 3), (0,), (0, N_BLOCKS), (0, 2, N_BLOCKS)], ids=lambda cuts: f"cut at {cuts}"
)
@pytest.mark.parametrize("name", ["plain", "tied", "dynamic", *VARYING_CASES])
def test_any_split_gives_the_same_bits(name: str, cuts: tuple[int, ...]) -> None:
    """Spans loaded apart; a cut at 0 leaves the embedding alone, one at N_BLOCKS the head alone."""
    case = llama_case(name)
    whole = run_chunked(load(case), case.ids, 100)
    borders = [0, *cuts, N_BLOCKS]
    spans = [
        Span(a, b, embed=index == 0, head=index == len(borders) - 2)
        for index, (a, b) in enumerate(itertools.pairwise(borders))
    ]
    runners = [load(case, span) for span in spans]
    for runner in runners:
        runner.open(9, runner.span, POSITIONS)
    parts = []
    for start in range(0, POSITIONS, 77):
        part = case.ids[start : start + 77]
        tensor = Tensor.from_numpy(part, "i32")
        for runner in runners:
            rows = tuple(range(len(part))) if runner.span.head else ()
            (output,) = runner.forward([Step(9, start, tensor, rows)])
            if output.hidden is not None:
                assert output.hidden.shape == (len(part), case.config.block.hidden_size)
                tensor = output.hidden
        assert output.logits is not None
        parts.append(output.logits.to_f32())
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_sequences_through_parts_of_a_loaded_span() -> None:
    """One runner with everything serves several hops of one session, in one batch with a whole-model
    sequence."""
    case = llama_case("plain")
    runner = load(case)
    ids = case.ids[:50]
    whole = run_chunked(runner, ids, 50, sequence=4)
    runner.open(1, Span(0, 2, embed=True), 50)
    runner.open(2, Span(2, N_BLOCKS, head=True), 50)
    runner.open(3, runner.span, 50)
    first, other = runner.forward([ids_step(1, 0, ids), ids_step(3, 0, ids, (49,))])
    assert first.hidden is not None
    assert first.logits is None
    assert other.logits is not None
    (last,) = runner.forward([Step(2, 0, first.hidden, (0, 49, 3))])
    assert last.logits is not None
    assert last.logits.to_f32().tobytes() == whole[[0, 49, 3]].tobytes()
    assert other.logits.to_f32().tobytes() == whole[[49]].tobytes()


def test_pages_before_the_window_are_not_read() -> None:
    """What lies there may be anything: poison would spread to every result."""
    case = llama_case("mistral")
    runner = load(case)
    assert isinstance(runner, ReferenceRunner)
    wanted = run_chunked(runner, case.ids, POSITIONS)
    runner.open(1, runner.span, POSITIONS)
    runner.forward([ids_step(1, 0, case.ids[:300])])
    for page in runner._sequences[1].kv._pages[:3]:
        page[:] = np.nan  # positions 0-191; the window of 300 begins at 201
    (output,) = runner.forward([ids_step(1, 300, case.ids[300:], tuple(range(POSITIONS - 300)))])
    assert output.logits is not None
    assert output.logits.to_f32().tobytes() == wanted[300:].tobytes()


def test_rollback_gives_the_bits_of_a_fresh_sequence() -> None:
    case = llama_case("plain")
    runner = load(case)
    fresh = run_chunked(runner, case.ids[:200], 200)
    runner.open(1, runner.span, POSITIONS)
    runner.forward([ids_step(1, 0, case.ids[:100])])
    for length in (90, 64, 17, 0):
        junk = np.full(120, 7)
        runner.forward([ids_step(1, runner.length(1), junk)])
        runner.truncate(1, length)
        assert runner.length(1) == length
        rest = case.ids[length:200]
        (output,) = runner.forward([ids_step(1, length, rest, tuple(range(len(rest))))])
        assert output.logits is not None
        assert output.logits.to_f32().tobytes() == fresh[length:].tobytes()


def test_kv_grows_by_pages_without_moving_and_is_given_back() -> None:
    case = llama_case("plain")
    runner = load(case)
    page = PAGE_POSITIONS * runner.kv_bytes_per_position
    block = case.config.block
    assert runner.kv_bytes_per_position == N_BLOCKS * 2 * block.n_kv_heads * block.head_dim * 4
    runner.open(1, runner.span, 100_000)
    assert runner.kv_bytes() == 0
    runner.forward([ids_step(1, 0, case.ids[:60])])
    assert runner.kv_bytes() == page
    before = runner._sequences[1].kv.pages(0, 60)[0][0].ctypes.data  # type: ignore[attr-defined]
    runner.forward([ids_step(1, 60, case.ids[60:260])])
    assert runner.kv_bytes() == 5 * page
    after = runner._sequences[1].kv.pages(0, 60)[0][0].ctypes.data  # type: ignore[attr-defined]
    assert before == after
    runner.truncate(1, 64)
    assert runner.kv_bytes() == page
    runner.open(2, Span(1, 2), 100)
    runner.forward([Step(2, 0, Tensor.from_f32(np.zeros((3, 32), np.float32), "bf16"))])
    assert runner.kv_bytes() == page + page // N_BLOCKS
    runner.close(1)
    runner.close(2)
    assert runner.kv_bytes() == 0


def test_hidden_states_of_any_float_dtype() -> None:
    case = llama_case("plain")
    runner = load(case, Span(1, 3))
    values = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for sequence, dtype in enumerate(("f32", "bf16", "f16")):
        runner.open(sequence, runner.span, 10)
        given = Tensor.from_f32(values, dtype)  # type: ignore[arg-type]
        (output,) = runner.forward([Step(sequence, 0, given)])
        runner.open(sequence + 10, runner.span, 10)
        (same,) = runner.forward([Step(sequence + 10, 0, Tensor.from_f32(given.to_f32(), "f32"))])
        assert output.hidden is not None
        assert same.hidden is not None
        assert output.hidden.dtype == "f32"
        assert bytes(output.hidden.data) == bytes(same.hidden.data)


def test_wrong_use_is_refused_and_changes_nothing() -> None:
    case = llama_case("plain")
    runner = load(case, Span(0, 3, embed=True))
    runner.open(1, runner.span, 20)
    runner.open(2, Span(1, 3), 20)
    runner.forward([ids_step(1, 0, case.ids[:10])])
    hidden = Tensor.from_f32(np.zeros((2, 32), np.float32), "f32")
    good = ids_step(1, 10, case.ids[:5])
    wrong: list[tuple[Step, str]] = [
        (ids_step(1, 9, case.ids[:2]), "starts at 9, but the sequence has length 10"),
        (ids_step(1, 11, case.ids[:2]), "starts at 11, but the sequence has length 10"),
        (ids_step(7, 0, case.ids[:2]), "sequence 7 is not open"),
        (ids_step(1, 10, case.ids[:0]), "has no positions"),
        (ids_step(1, 10, np.array([5, 261])), "token id 261; the vocabulary is 0 to 260"),
        (ids_step(1, 10, np.array([-3])), "token id -3"),
        (ids_step(1, 10, case.ids[:2], (0,)), "has no head"),
        (Step(1, 10, hidden), r"needs token ids i32\[n\], not f32\[2, 32\]"),
        (ids_step(2, 0, case.ids[:2]), r"needs hidden states \[n, 32\], not i32\[2\]"),
        (Step(2, 0, Tensor.from_f32(np.zeros((2, 31), np.float32), "f32")), r"not f32\[2, 31\]"),
    ]
    for step, message in wrong:
        with pytest.raises(BackendError, match=message):
            runner.forward([good, step] if step.sequence != 1 else [step])
        assert runner.length(1) == 10
        assert runner.length(2) == 0
    with pytest.raises(BackendError, match="sequence 1 is in the batch twice"):
        runner.forward([good, good])
    with pytest.raises(LimitError, match="would reach 21 positions; it was opened for 20"):
        runner.forward([ids_step(1, 10, case.ids[:11])])
    with pytest.raises(BackendError, match="has length 10 and can't be truncated to 11"):
        runner.truncate(1, 11)
    with pytest.raises(BackendError, match="sequence 1 is open already"):
        runner.open(1, runner.span, 5)
    with pytest.raises(BackendError, match='span "3" is not within the loaded span "embed,0-2"'):
        runner.open(3, Span(3, 4), 5)
    with pytest.raises(BackendError, match="at least 1 position"):
        runner.open(3, runner.span, 0)
    for call in (runner.close, runner.length):
        with pytest.raises(BackendError, match="sequence 3 is not open"):
            call(3)
    (output,) = runner.forward([ids_step(1, 10, case.ids[:10])])
    assert output.hidden is not None
    assert output.hidden.shape == (10, 32)


def test_rows_beyond_the_step_are_refused() -> None:
    case = llama_case("plain")
    runner = load(case)
    runner.open(1, runner.span, 20)
    for rows in ((2,), (-1,)):
        with pytest.raises(BackendError, match="but has 2 rows"):
            runner.forward([ids_step(1, 0, case.ids[:2], rows)])
    (output,) = runner.forward([ids_step(1, 0, case.ids[:2])])
    assert output.logits is not None
    assert output.logits.shape == (0, case.config.vocab_size)


def test_a_failure_half_way_leaves_the_sequence_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    case = llama_case("plain")
    runner = load(case)
    ids = case.ids[:80]
    expected = run_chunked(runner, ids, 80)
    runner.open(1, runner.span, 80)
    runner.forward([ids_step(1, 0, ids[:30])])
    held = runner.kv_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(runner._blocks, 2, None)  # type: ignore[attr-defined]  # blocks 0 and 1 will have written KV
        with pytest.raises(AttributeError):
            runner.forward([ids_step(1, 30, np.full(50, 3))])
    assert runner.length(1) == 30
    assert runner.kv_bytes() == held
    (output,) = runner.forward([ids_step(1, 30, ids[30:], tuple(range(50)))])
    assert output.logits is not None
    assert output.logits.to_f32().tobytes() == expected[30:].tobytes()


def test_devices_and_dtypes_it_has_not() -> None:
    case = llama_case("plain")
    backend = ReferenceBackend()
    assert backend.name == "reference"
    assert backend.devices() == ["cpu"]
    for device, dtype in (("cuda", "f32"), ("cpu", "bf16"), ("cpu", "f16")):
        with pytest.raises(BackendUnavailable, match=f'"{device if device != "cpu" else dtype}"'):
            backend.load(case.load_request(device=device, dtype=dtype), lambda done, total: None)


def test_load_reports_progress_and_what_it_holds() -> None:
    case = llama_case("bf16-weights")
    calls: list[tuple[int, int]] = []
    request = LoadRequest(case.path, case.config, Span(1, 2))
    runner = ReferenceBackend().load(request, lambda done, total: calls.append((done, total)))
    hidden, inner, kv = 32, 48, 16
    parameters = 2 * hidden + 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner
    assert runner.weights_bytes == 4 * parameters
    assert calls[0] == (0, 4 * parameters)
    assert calls[-1] == (4 * parameters, 4 * parameters)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert isinstance(runner, SpanRunner)
    assert runner.dtype == "f32"
    assert runner.row_invariant
    assert "numpy=" + np.__version__ in runner.numerics


_THREADS_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from tiny_llama import make_tiny_llama
from llama_cases import run_chunked
from dgn_backends.api import LoadRequest
from dgn_backends.hf_config import read_config
from dgn_backends.reference import ReferenceBackend, ReferenceRunner
from dgn_backends.weights import whole_model
path = Path(sys.argv[1])
config = read_config(path)
runner = ReferenceBackend().load(LoadRequest(path, config, whole_model(config)), lambda done, total: None)
ids = np.random.default_rng(0).integers(0, 261, 40).astype(np.int32)
assert run_chunked(runner, ids, 30).tobytes() == run_chunked(runner, ids, [7, 1, 20]).tobytes()
print(runner.numerics, hash(run_chunked(runner, ids, 30).tobytes()))
"""


# What OpenBLAS would choose on other machines; "" is this one's own.
@pytest.mark.parametrize("core", ["", "Haswell", "Sandybridge"])
def test_the_number_of_threads_does_not_change_bits(core: str, tmp_path: Path) -> None:
    """Products large enough that BLAS would divide them among threads, and sums that it would cut."""
    if core and not np._core._multiarray_umath.__cpu_features__.get("AVX2"):  # type: ignore[attr-defined]
        pytest.skip("this processor has no AVX2")
    path = make_tiny_llama(tmp_path, hidden_size=512, intermediate_size=1400, n_heads=8, n_blocks=1)
    outputs = set()
    for threads in ("1", "2", "3"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENBLAS_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            **({"OPENBLAS_CORETYPE": core} if core else {}),
        }
        command = [sys.executable, "-c", _THREADS_SCRIPT, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1, outputs
