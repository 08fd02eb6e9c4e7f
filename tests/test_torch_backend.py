"""The torch backend: against transformers in every dtype, bit by bit against itself in f32, and against
wrong use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from llama_cases import (
    CASES,
    CHUNKS,
    F32_BOUND,
    VARYING_CASES,
    llama_case,
    run_chunked,
    transformers_logits,
)
from tiny_llama import TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.api import LoadRequest, SpanRunner, Step
from dgn_backends.errors import BackendUnavailable, ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgn_backends.testing import check_backend
from dgn_backends.weights import whole_model

torch = pytest.importorskip("torch", reason="torch is not installed")

from dgn_backends.torch_backend import TorchBackend  # noqa: E402 - after the skip
from dgn_backends.torch_rows import RowTiles, agreeing_tiles  # noqa: E402
from dgn_backends.torch_runner import TorchRunner  # noqa: E402

#: Largest difference of any logit from transformers' f32, as a share of the logits' standard deviation.
LOW_PRECISION_BOUNDS = {"bf16": 0.35, "f16": 0.05}


def load(path: Path, dtype: str = "f32", device: str = "cpu", span: Span | None = None) -> SpanRunner:
    config = read_config(path)
    request = LoadRequest(path, config, span or whole_model(config), device, dtype)
    return TorchBackend().load(request, lambda done, total: None)


@pytest.mark.parametrize("name", CASES)
def test_f32_logits_are_those_of_transformers(name: str) -> None:
    case = llama_case(name)
    runner = load(case.path)
    first: npt.NDArray[np.float32] | None = None
    for chunk in CHUNKS:
        logits = run_chunked(runner, case.ids, chunk)
        assert np.abs(logits - case.logits).max() < F32_BOUND, f"chunks of {chunk}"
        first = logits if first is None else first
        if runner.row_invariant:
            assert np.array_equal(logits, first), f"chunks of {chunk} change bits"
    assert runner.kv_bytes() == 0


@pytest.mark.parametrize("dtype", LOW_PRECISION_BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_low_precision_logits_are_near(name: str, dtype: str) -> None:
    case = llama_case(name)
    runner = load(case.path, dtype)
    for chunk in (5, 300):
        logits = run_chunked(runner, case.ids, chunk)
        assert np.isfinite(logits).all()
        worst = np.abs(logits - case.logits).max() / case.logits.std()
        assert worst < LOW_PRECISION_BOUNDS[dtype], f"chunks of {chunk}"


def test_a_chunk_beside_others_keeps_its_bits_with_more_threads() -> None:
    """Row invariance at the widths where kernels change: a hidden size with tails, several threads."""
    case = llama_case("narrow-head-dim")
    before = torch.get_num_threads()
    try:
        request = case.load_request()
        runner = TorchBackend().load(replace(request, threads=2), lambda done, total: None)
        assert torch.get_num_threads() == 2
        assert "threads2" in runner.numerics
        wanted = run_chunked(runner, case.ids, 330)
        for chunks in ([260, 1], [7], [33, 65, 2], [64]):
            assert np.array_equal(run_chunked(runner, case.ids, chunks), wanted)
    finally:
        torch.set_num_threads(before)


def test_pages_before_the_window_are_not_read() -> None:
    """What lies there may be anything: poison would spread to every result."""
    case = llama_case("mistral")
    runner = load(case.path)
    assert isinstance(runner, TorchRunner)
    ids = np.resize(case.ids, 700)
    wanted = run_chunked(runner, ids, 700)
    runner.open(1, runner.span, 700)
    runner.forward([Step(1, 0, Tensor.from_numpy(ids[:600], "i32"))])
    kv = runner._sequences[1].kv
    with torch.inference_mode():
        for block in range(runner.span.stop):
            kv.held(block, 0, 256).fill_(torch.nan)  # the window of 600 begins at 501
    for start, stop in ((600, 601), (601, 700)):
        rows = tuple(range(stop - start))
        (output,) = runner.forward([Step(1, start, Tensor.from_numpy(ids[start:stop], "i32"), rows)])
        assert output.logits is not None
        assert np.array_equal(output.logits.to_f32(), wanted[start:stop])


def test_f32_on_a_cpu_keeps_bits_and_says_how() -> None:
    runner = load(llama_case("plain").path)
    assert runner.row_invariant
    assert runner.dtype == "f32"
    assert f"torch-{torch.__version__}/f32/kv-f32/none/cpu-" in runner.numerics
    for dtype in ("bf16", "f16"):
        low = load(llama_case("plain").path, dtype)
        assert not low.row_invariant
        assert low.numerics.endswith("+sdpa") == (dtype == "bf16")
        assert low.numerics != runner.numerics


def test_auto_takes_the_models_dtype() -> None:
    assert load(llama_case("plain").path, "auto").dtype == "f32"
    saved = load(llama_case("bf16-weights").path, "auto").dtype
    assert saved == ("bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "f32")


def mapped_bytes(path: Path) -> int:
    """Bytes of a mapped file that this process holds in memory."""
    held, is_it = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            is_it = line.endswith(str(path))
        elif is_it and key == "Rss:":
            held += int(rest.split()[0]) << 10
    return held


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not count memory")
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_what_was_packed_is_not_held_in_the_mapped_file_too(tmp_path: Path, dtype: str) -> None:
    tiny = TinyLlama(
        tokenizer=False, hidden_size=1024, intermediate_size=4096, n_heads=16, n_kv_heads=4, dtype="bf16"
    )
    path = make_tiny_llama(tmp_path / "model", tiny)
    runner = load(path, dtype)
    file = path / "model.safetensors"
    assert file.stat().st_size > 25e6
    assert mapped_bytes(file) < file.stat().st_size / 10
    ids = np.arange(40, dtype=np.int32)
    assert np.isfinite(run_chunked(runner, ids, 40)).all()


def overflowing_model(directory: Path) -> Path:
    """A model whose MLPs reach 1e5 inside, beyond f16, and come back to ordinary sizes."""
    tiny = TinyLlama(tokenizer=False, mlp_bias=True)
    path = make_tiny_llama(directory, tiny)
    weights = random_weights(path, tiny)
    for name in weights:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = weights[name] * np.float32(150.0)
        if name.endswith("down_proj.weight"):
            weights[name] = weights[name] * np.float32(3e-4)
    write_weights(path, weights)
    return path


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_an_mlp_beyond_f16_inside_stays_finite_and_right(tmp_path: Path, dtype: str) -> None:
    path = overflowing_model(tmp_path / "model")
    ids = np.random.default_rng(1).integers(0, 200, 60).astype(np.int32)
    wanted = transformers_logits(path, ids)
    got = run_chunked(load(path, dtype), ids, 25)
    bound = {"f32": F32_BOUND, **LOW_PRECISION_BOUNDS}[dtype] * (1.0 if dtype == "f32" else wanted.std())
    assert np.abs(got - wanted).max() < bound


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    tiny = TinyLlama(tokenizer=False)
    path = make_tiny_llama(tmp_path / "model", tiny)
    weights = random_weights(path, tiny)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    write_weights(path, weights)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values beyond f16"):
        load(path, "f16")
    load(path, "f16", span=Span(2, 4))


def test_what_torch_can_not_do_is_said() -> None:
    path = llama_case("plain").path
    with pytest.raises(BackendUnavailable, match='device "cuda:99" is not usable by torch here'):
        load(path, device="cuda:99")
    with pytest.raises(BackendUnavailable, match='dtype "q4" is unknown to torch'):
        load(path, dtype="q4")


@pytest.mark.parametrize(
    ("rows", "tiles"),
    [(1, [2]), (2, [2]), (3, [4]), (64, [64]), (65, [64, 2]), (100, [64, 64]), (130, [64, 64, 2])],
)
def test_row_tiles_cover_the_rows(rows: int, tiles: list[int]) -> None:
    allowed = RowTiles((2, 4, 8, 16, 32, 64))
    assert allowed.split(rows) == tiles
    assert allowed.split(allowed.padded(rows)) == tiles
    assert RowTiles().split(rows) == [rows]


def test_tiles_that_disagree_are_left_out() -> None:
    def product(rows: torch.Tensor) -> torch.Tensor:
        """Rounds otherwise where there are fewer than 8 rows."""
        return rows * (3.0 if len(rows) >= 8 else 3.0000002)

    rows = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    assert agreeing_tiles([(product, rows)]).sizes == (8, 16, 32, 64)

    def by_place(rows: torch.Tensor) -> torch.Tensor:
        """Rounds the last row of a call otherwise."""
        return torch.cat([rows[:-1] * 3.0, rows[-1:] * 3.0000002])

    assert 32 not in agreeing_tiles([(by_place, rows)]).sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_cuda_conforms_and_is_near_transformers(dtype: str) -> None:
    check_backend(TorchBackend(), dtype=dtype, device="cuda")
    bounds = {"f32": F32_BOUND, **LOW_PRECISION_BOUNDS}
    for name in ("plain", "mlp-bias", "dynamic", "yarn", *VARYING_CASES):
        case = llama_case(name)
        runner = load(case.path, dtype, device="auto")
        assert "cuda" in runner.numerics
        for chunk in (1, 129):
            worst = np.abs(run_chunked(runner, case.ids, chunk) - case.logits).max()
            assert worst < bounds[dtype] * (1.0 if dtype == "f32" else case.logits.std())
        assert runner.kv_bytes() == 0
