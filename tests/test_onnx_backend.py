"""The ONNX Runtime backend: against transformers, against the conformance suite, and against wrong use."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_cases import CASES, CHUNKS, F32_BOUND, llama_case, run_chunked
from tiny_llama import TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.api import LoadRequest, Quant, Step
from dgn_backends.errors import BackendUnavailable, ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgn_backends.testing import CHECKS, check_backend
from dgn_backends.weights import whole_model

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from dgn_backends.onnx_backend import OnnxBackend
from dgn_backends.onnx_batch import MAX_ROWS, Piece, cut, grid, groups
from dgn_backends.onnx_runner import OnnxRunner

#: Only the edges of a span are rounded, computation is in f32: as shares of the logits' standard deviation.
EDGE_BOUNDS = {"bf16": 1e-4, "f16": 1e-4}


MEASURE_MEMORY = """
import gc, sys
from pathlib import Path
from dgn_backends.api import LoadRequest
from dgn_backends.hf_config import read_config
from dgn_backends.onnx_backend import OnnxBackend
from dgn_backends.weights import whole_model

def held():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

config = read_config(Path(sys.argv[1]))
request = LoadRequest(Path(sys.argv[1]), config, whole_model(config), threads=2, quant=sys.argv[2])
before = held()
runner = OnnxBackend().load(request, lambda done, total: None)
gc.collect()
print(held() - before, runner.weights_bytes)
"""
#: How far quantised logits may be from f32's, root mean square, as a share of the logits' own. Tiny random
#: models are far more sensitive than trained ones.
QUANT_BOUNDS: dict[Quant, float] = {"int8": 0.05, "int8-fast": 0.05, "int4": 0.45, "int4-fast": 0.45}


def load(
    path: Path, dtype: str = "f32", span: Span | None = None, quant: Quant = "none", threads: int = 2
) -> OnnxRunner:
    config = read_config(path)
    request = LoadRequest(
        path, config, span or whole_model(config), "cpu", dtype, threads=threads, quant=quant
    )
    return OnnxBackend().load(request, lambda done, total: None)


@pytest.mark.parametrize("name", CASES)
def test_f32_logits_are_those_of_transformers(name: str) -> None:
    case = llama_case(name)
    runner = load(case.path)
    for chunk in CHUNKS:
        logits = run_chunked(runner, case.ids, chunk)
        assert np.abs(logits - case.logits).max() < F32_BOUND, f"chunks of {chunk}"
    assert runner.kv_bytes() == 0


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: str, dtype: str) -> None:
    check_backend(OnnxBackend(), dtype=dtype, checks=[check])


@pytest.mark.parametrize("quant", QUANT_BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_quantised_logits_are_near(name: str, quant: Quant) -> None:
    case = llama_case(name)
    runner = load(case.path, quant=quant)
    assert quant in runner.numerics
    logits = run_chunked(runner, case.ids, 129)
    apart = np.sqrt(np.mean((logits - case.logits) ** 2) / np.mean(case.logits**2))
    assert apart < QUANT_BOUNDS[quant]


@pytest.mark.parametrize("quant", QUANT_BOUNDS)
@pytest.mark.parametrize("check", CHECKS)
def test_quantised_conformance(check: str, quant: Quant) -> None:
    check_backend(OnnxBackend(), quant=quant, checks=[check])


def test_weights_that_can_not_be_quantised_are_refused(tmp_path: Path) -> None:
    tiny = TinyLlama(tokenizer=False)
    path = make_tiny_llama(tmp_path / "model", tiny)
    weights = random_weights(path, tiny)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
    write_weights(path, weights)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not"):
        load(path, quant="int8")


@pytest.mark.parametrize("tensor", ["self_attn.k_proj.bias", "post_attention_layernorm.weight"])
@pytest.mark.parametrize("quant", ["none", "int4", "int8-fast"])
def test_norms_and_biases_that_are_not_finite_are_refused(tmp_path: Path, quant: Quant, tensor: str) -> None:
    tiny = TinyLlama(tokenizer=False, attention_bias=True)
    path = make_tiny_llama(tmp_path / "model", tiny)
    weights = random_weights(path, tiny)
    weights[f"model.layers.1.{tensor}"][3] = np.nan
    write_weights(path, weights)
    with pytest.raises(ModelError, match=rf"layers\.1\.{re.escape(tensor)} has values that are not finite"):
        load(path, quant=quant)


def test_a_second_start_computes_the_same_from_the_cache(tmp_path: Path) -> None:
    case = llama_case("attention-bias")
    request = replace(case.load_request(), quant="int4", threads=2)
    alone = run_chunked(OnnxBackend().load(request, lambda done, total: None), case.ids, 100)
    for _ in range(2):
        runner = OnnxBackend().load(replace(request, cache_dir=tmp_path), lambda done, total: None)
        assert np.array_equal(run_chunked(runner, case.ids, 100), alone)
    assert list(tmp_path.rglob("*.q"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count memory")
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_weights_are_in_memory_once(tmp_path: Path, quant: Quant) -> None:
    """In a process of its own: what it holds after loading, beside what it held before."""
    tiny = TinyLlama(
        tokenizer=False, hidden_size=1024, intermediate_size=4096, n_heads=16, n_kv_heads=4, dtype="bf16"
    )
    path = make_tiny_llama(tmp_path / "model", tiny)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(path), quant], capture_output=True, text=True, check=True
    )
    taken, weights = map(int, done.stdout.split())
    assert weights > 25e6
    assert taken < 1.5 * weights + 20e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not count memory")
def test_weights_are_never_in_memory_twice_while_they_are_loaded(tmp_path: Path) -> None:
    """bf16 weights are made f32 and packed by ONNX Runtime; the most that a process of its own held."""
    tiny = TinyLlama(
        tokenizer=False, hidden_size=1024, intermediate_size=4096, n_heads=16, n_kv_heads=4, n_blocks=6
    )
    path = make_tiny_llama(tmp_path / "model", replace(tiny, dtype="bf16"))
    command = [sys.executable, "-c", MEASURE_MEMORY, str(path), "none"]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.002)
        assert process.stdout is not None
        taken, weights = map(int, process.stdout.read().split())
    assert weights > 350e6
    assert taken < 1.1 * weights + 40e6
    assert peak < 1.1 * weights + 61e6 + 80e6, "a block is 61 MB"


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", ["plain", "tied", "qwen3", "mistral", "attention-bias"])
def test_where_a_span_is_cut_makes_no_difference(name: str, quant: Quant) -> None:
    """Bit by bit: nodes of the same numerics may be cut in different places."""
    case = llama_case(name)
    whole, apart = (load(case.path, quant=quant) for _ in range(2))
    for block in range(apart.span.stop):
        apart.open(100 + block, Span(block, block + 1), 8)  # makes it a session of its own
    assert np.array_equal(run_chunked(whole, case.ids, 33), run_chunked(apart, case.ids, 33))


def test_an_idle_runner_takes_no_cpu() -> None:
    case = llama_case("plain")
    runner = load(case.path, threads=4)
    run_chunked(runner, case.ids, [64, 1])
    before = time.process_time()
    time.sleep(0.3)  # what is looked at is what happens while nothing does
    assert time.process_time() - before < 0.1


@pytest.mark.parametrize("dtype", EDGE_BOUNDS)
def test_the_dtype_is_that_of_the_edges(dtype: str) -> None:
    case = llama_case("plain")
    runner = load(case.path, dtype)
    assert runner.dtype == dtype
    assert runner.numerics != load(case.path).numerics
    logits = run_chunked(runner, case.ids, 129)
    assert np.abs(logits - case.logits).max() / case.logits.std() < EDGE_BOUNDS[dtype]
    front = load(case.path, dtype, Span(0, 2, embed=True))
    front.open(1, front.span, 4)
    (output,) = front.forward([Step(1, 0, Tensor.from_numpy(case.ids[:4], "i32"))])
    assert output.hidden is not None
    assert (output.hidden.dtype, output.hidden.shape) == (dtype, (4, case.config.block.hidden_size))


def test_logits_come_in_the_order_asked_for_also_of_a_step_of_several_runs() -> None:
    case = llama_case("plain")
    runner = load(case.path)
    ids = np.resize(case.ids, 2 * MAX_ROWS + 9).astype(np.int32)
    wanted = run_chunked(runner, ids, 200)
    rows = (len(ids) - 1, 3, MAX_ROWS, 3, 0, MAX_ROWS - 1, 2 * MAX_ROWS)
    runner.open(1, runner.span, len(ids))
    (output,) = runner.forward([Step(1, 0, Tensor.from_numpy(ids, "i32"), rows)])
    assert output.logits is not None
    assert np.abs(output.logits.to_f32() - wanted[list(rows)]).max() < F32_BOUND
    runner.close(1)


def test_sequences_of_any_length_and_number_share_a_runner() -> None:
    """More sequences than slots were made at first, holes between them, some longer than the context."""
    case = llama_case("llama3")
    runner = load(case.path)
    alone = run_chunked(runner, case.ids, 330)
    totals = {number: 330 if number % 3 else 5000 for number in range(11)}
    for number, total in totals.items():
        runner.open(number, runner.span, total)
    for number in (2, 5, 6):
        runner.close(number)
        del totals[number]
    lengths = dict.fromkeys(totals, 0)
    for turn in range(12):
        steps = []
        for number in totals:
            count = 1 if (turn + number) % 2 else 3 * number + 1
            part = case.ids[lengths[number] : lengths[number] + count]
            rows = tuple(range(len(part)))
            steps.append(Step(number, lengths[number], Tensor.from_numpy(part, "i32"), rows))
        for step, output in zip(steps, runner.forward(steps), strict=True):
            start = lengths[step.sequence]
            assert output.logits is not None
            apart = output.logits.to_f32() - alone[start : start + step.count]
            assert np.abs(apart).max() < F32_BOUND
            lengths[step.sequence] = start + step.count
    for number in totals:
        runner.close(number)
    assert runner.kv_bytes() == 0


def test_a_part_of_the_span_is_cut_out_while_a_sequence_goes_on() -> None:
    case = llama_case("attention-bias")
    runner = load(case.path)
    runner.open(1, runner.span, 330)
    parts = []
    for start in (0, 100, 200):
        if start:
            runner.open(1 + start, Span(1, 1 + start // 100), 5)
        ids = case.ids[start : start + 100]
        (output,) = runner.forward([Step(1, start, Tensor.from_numpy(ids, "i32"), tuple(range(100)))])
        assert output.logits is not None
        parts.append(output.logits.to_f32())
    assert np.abs(np.concatenate(parts) - case.logits[:300]).max() < F32_BOUND


def test_what_onnx_can_not_do_is_said() -> None:
    path = llama_case("plain").path
    config = read_config(path)
    request = LoadRequest(path, config, whole_model(config), "cuda:99")
    with pytest.raises(BackendUnavailable, match='device "cuda:99" is not usable by onnx here'):
        OnnxBackend().load(request, lambda done, total: None)
    with pytest.raises(BackendUnavailable, match='dtype "q4" is unknown to onnx'):
        load(path, dtype="q4")


def test_steps_alike_share_a_run_and_a_long_one_is_cut() -> None:
    decode = [Piece(number, slot, 9, 0, 1) for number, slot in enumerate((7, 0, 3))]
    chunk = Piece(3, 1, 0, 0, 400)
    assert groups([chunk, *decode]) == [[decode[1], decode[2], decode[0]], [chunk]]
    assert [piece.count for piece in cut(0, 0, 5, 2 * MAX_ROWS + 1)] == [MAX_ROWS, MAX_ROWS, 1]
    neighbours = [Piece(0, 4, 0, 0, 100), Piece(1, 5, 0, 0, 120)]
    assert groups(neighbours) == [neighbours]
    apart = [Piece(0, 4, 0, 0, 100), Piece(1, 9, 0, 0, 100)]
    assert groups(apart) == [[apart[0]], [apart[1]]]


def test_a_grid_says_where_rows_lie() -> None:
    found = grid([Piece(0, 6, 10, 0, 1), Piece(1, 4, 3, 0, 2)])
    assert found.first_slot == 4
    assert found.longest_total == 11
    assert found.from_grid.tolist() == [4, 0, 1]
    assert found.to_grid[0].tolist() == [1, 2]
    assert found.to_grid[2, 0] == 0
    assert found.totals_less_1.tolist() == [4, 0, 10]
    assert found.counts.tolist() == [2, 0, 1]
