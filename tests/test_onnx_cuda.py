"""The ONNX Runtime backend on CUDA. What needs a GPU is skipped by name where there is none; all else is
tested on a CPU: the graphs for CUDA against its table of kernels, and everything around them by running the
same graphs on a CPU that is used as if its memory were another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from llama_cases import CASES, VARYING_CASES, LlamaCase, llama_case, run_chunked
from tiny_llama import TinyLlama, make_tiny_llama, random_weights, write_weights

from dgn_backends.api import LoadRequest, Progress, Quant, Step
from dgn_backends.errors import BackendUnavailable, LimitError, ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.span import Span
from dgn_backends.tensor import DType, Tensor
from dgn_backends.testing import CHECKS, TOLERANCE, check_backend
from dgn_backends.weights import whole_model

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import ModelProto, NodeProto, TensorProto

from dgn_backends import onnx_cuda
from dgn_backends.onnx_backend import OnnxBackend, cuda_numbers, load_on
from dgn_backends.onnx_block import add_block, add_end, add_head, declare_inputs
from dgn_backends.onnx_cuda import find_cuda
from dgn_backends.onnx_device import Device
from dgn_backends.onnx_device_kv import FIRST_POSITIONS
from dgn_backends.onnx_graph import ONNX_TYPES, GraphBuilder
from dgn_backends.onnx_load import SpanFiles
from dgn_backends.onnx_runner import OnnxRunner

_FLOATS = frozenset({"f32", "f16", "bf16"})
#: The float types that ONNX Runtime's CUDA kernels take, as its docs/OperatorKernels.md lists them for these
#: operators at opset 21. Those of integers (rows, sizes, codes of weights) are the same everywhere.
CUDA_KERNELS: dict[str, frozenset[str]] = {
    "Add": _FLOATS,
    "Cast": _FLOATS,
    "Gather": _FLOATS,
    "Gemm": _FLOATS,
    "GroupQueryAttention": frozenset({"f16", "bf16"}),
    "Identity": _FLOATS,
    "MatMulNBits": _FLOATS,
    "Mul": _FLOATS,
    "Pad": frozenset({"f32", "f16"}),
    "QuickGelu": _FLOATS,
    "Reshape": _FLOATS,
    "SimplifiedLayerNormalization": _FLOATS,
    "SkipSimplifiedLayerNormalization": _FLOATS,
    "Slice": _FLOATS,
}
#: How far logits may be from transformers' f32, as shares of their standard deviation.
BOUNDS: dict[DType, float] = {"f32": 0.05, "f16": 0.1, "bf16": 0.5}

needs_gpu = pytest.mark.skipif(not find_cuda().capabilities, reason="needs an NVIDIA GPU and onnxruntime-gpu")


def ignore(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def load_apart(request: LoadRequest, dtype: DType, progress: Progress = ignore) -> OnnxRunner:
    """As on CUDA, on the CPU."""
    device = Device(numbers=cuda_numbers(dtype), is_apart=True)
    return load_on(device, dtype, f"apart/{dtype}/{request.quant}", request, progress)


class Apart(OnnxBackend):
    """The backend as it is on CUDA, on the CPU, for the conformance suite."""

    def load(self, request: LoadRequest, progress: Progress) -> OnnxRunner:
        """Whatever the device."""
        return load_apart(request, "f16" if request.dtype == "f16" else "f32", progress)


def model_of(case: LlamaCase, dtype: DType, quant: Quant) -> ModelProto:
    """The graph of a whole model for CUDA, with both ends that a span may have."""
    graph = GraphBuilder(cuda_numbers(dtype))
    config = case.config
    files = SpanFiles(replace(case.load_request(), quant=quant), dtype, ignore, for_cpu=False)
    x = declare_inputs(graph, config.block, has_blocks=True, has_head=True, is_inner=False)
    for number in range(config.n_blocks):
        x = add_block(graph, number, config.blocks[number], files.block(number), x)
    add_end(graph, config.block, x)
    add_head(graph, config.block, files.final_norm(), files.head(), config.vocab_size, x)
    return graph.model()


def floats_of(model: ModelProto) -> Iterator[tuple[NodeProto, list[str]]]:
    """Each node with the float types of its inputs. Fails where an output is not of the type declared."""
    names: dict[int, str] = {number: name for name, number in ONNX_TYPES.items()}
    names[TensorProto.UINT8] = "u8"
    declared = [*model.graph.input, *model.graph.output]
    types = {value.name: names[value.type.tensor_type.elem_type] for value in declared}
    given = {value.name for value in model.graph.input}
    types |= {weight.name: names[weight.data_type] for weight in model.graph.initializer}
    for node in model.graph.node:
        inputs = [types[name] for name in node.input if name]
        yield node, [name for name in inputs if name in _FLOATS]
        casts = [names[attribute.i] for attribute in node.attribute if attribute.name == "to"]
        for name in filter(None, node.output):
            assert name not in given
            assert types.setdefault(name, (casts or inputs)[0]) == (casts or inputs)[0], name


@pytest.mark.parametrize("quant", ["none", "int4", "int8-fast"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["plain", "narrow-head-dim", "mlp-bias", "qwen3", "smollm3"])
def test_cuda_has_a_kernel_for_every_node(name: str, dtype: DType, quant: Quant) -> None:
    seen: set[str] = set()
    for node, types in floats_of(model_of(llama_case(name), dtype, quant)):
        assert len(set(types)) == 1, f"{node.op_type} takes {types}"
        assert types[0] in CUDA_KERNELS[node.op_type], f"{node.op_type} takes {types}"
        seen.add(node.op_type)
    assert {"GroupQueryAttention", "Gemm" if quant == "none" else "MatMulNBits"} <= seen


def test_the_table_of_kernels_rules_out_what_the_cpu_computes_in() -> None:
    """The graph for the CPU has attention in f32, which CUDA has not: the check above would say so."""
    assert "f32" not in CUDA_KERNELS["GroupQueryAttention"]
    assert cuda_numbers("f32").attention == "f16"
    assert cuda_numbers("bf16").attention == "bf16"


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_the_graphs_for_cuda_compute_what_transformers_does(name: str, dtype: DType) -> None:
    case = llama_case(name)
    runner = load_apart(case.load_request(), dtype)
    for chunk in (5, 129):
        logits = run_chunked(runner, case.ids, chunk)
        assert np.abs(logits - case.logits).max() / case.logits.std() < BOUNDS[dtype]
    assert runner.kv_bytes() == 0


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("check", CHECKS)
def test_conformance_with_memory_apart(check: str, dtype: str, quant: Quant) -> None:
    """Named cuda, so that checks of this process's memory are passed over: KV is not where they look."""
    tolerance = TOLERANCE["f16"] if quant == "none" else None
    check_backend(Apart(), dtype=dtype, device="cuda", tolerance=tolerance, quant=quant, checks=[check])


def test_sequences_move_to_longer_slots_and_lose_nothing() -> None:
    """Across several sizes of slots, while others stay behind, and memory is counted as it is held."""
    case = llama_case("plain")
    runner = load_apart(case.load_request(), "f32")
    ids = np.resize(case.ids, 2 * FIRST_POSITIONS + 100).astype(np.int32)
    wanted = run_chunked(OnnxBackend().load(case.load_request(), ignore), ids, 200)
    for number in range(3):
        runner.open(number, runner.span, len(ids))
    lengths = dict.fromkeys(range(3), 0)
    held: list[int] = []
    while lengths[0] < len(ids):
        steps: list[Step] = []
        for number, size in enumerate((300, 7, 1)):
            start = lengths[number]
            part = ids[start : start + size]
            steps.append(Step(number, start, Tensor.from_numpy(part, "i32"), (len(part) - 1,)))
        for step, output in zip(steps, runner.forward(steps), strict=True):
            lengths[step.sequence] = step.start + step.count
            assert output.logits is not None
            apart = output.logits.to_f32()[0] - wanted[lengths[step.sequence] - 1]
            assert np.abs(apart).max() / wanted.std() < BOUNDS["f32"]
        held.append(runner.kv_bytes())
    assert held == sorted(held)
    assert held[-1] > held[0]
    for number in range(3):
        runner.close(number)
    assert runner.kv_bytes() == 0


def test_edges_are_of_the_dtype_asked_for() -> None:
    case = llama_case("plain")
    front = load_apart(case.load_request(Span(0, 2, embed=True)), "f16")
    front.open(1, front.span, 4)
    (output,) = front.forward([Step(1, 0, Tensor.from_numpy(case.ids[:4], "i32"))])
    assert output.hidden is not None
    assert (output.hidden.dtype, output.hidden.shape) == ("f16", (4, case.config.block.hidden_size))
    assert front.kv_bytes_per_position == 2 * 2 * case.config.block.n_kv_heads * 16 * 2


def test_no_room_for_kv_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = llama_case("plain")
    runner = load_apart(case.load_request(), "f16")

    def full(self: Device, shape: tuple[int, ...]) -> None:
        raise MemoryError

    monkeypatch.setattr(Device, "zeros", full)
    with pytest.raises(LimitError, match="no memory on cpu for KV"):
        runner.open(1, runner.span, 10)
    monkeypatch.undo()
    runner.open(1, runner.span, 10)
    runner.forward([Step(1, 0, Tensor.from_numpy(case.ids[:4], "i32"), (3,))])


def test_weights_that_f16_can_not_hold_are_refused(tmp_path: Path) -> None:
    tiny = TinyLlama(tokenizer=False)
    path = make_tiny_llama(tmp_path / "model", tiny)
    weights = random_weights(path, tiny)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    write_weights(path, weights)
    config = read_config(path)
    request = LoadRequest(path, config, whole_model(config))
    load_apart(request, "f32")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has values too large for f16"):
        load_apart(request, "f16")


@pytest.mark.skipif("cuda:0" in OnnxBackend().devices(), reason="CUDA can be used here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_cuda_one_line_says_why(device: str) -> None:
    assert OnnxBackend().devices() == ["cpu"]
    request = llama_case("plain").load_request(device=device)
    with pytest.raises(BackendUnavailable) as refused:
        OnnxBackend().load(request, ignore)
    assert f'device "{device}" is not usable by onnx here (' in str(refused.value)
    assert find_cuda().reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_build_with_the_provider_is_asked_for_version_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installed build says is replaced; the driver is asked for real, and may find GPUs."""
    build = SimpleNamespace(
        __version__="1.31.9", get_available_providers=lambda: [onnx_cuda.PROVIDER, "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnx_cuda, "ort", build)
    assert find_cuda().reason == "onnxruntime-gpu 1.31.9 is too old; 1.32 or newer is needed"
    build.__version__ = "1.33.0"
    found = find_cuda()
    assert bool(found.capabilities) == (found.reason == "")
    build.get_available_providers = lambda: ["CPUExecutionProvider"]
    assert find_cuda().reason.startswith("onnxruntime 1.33.0 was built without CUDA")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_cuda_conforms(dtype: DType, quant: Quant) -> None:
    # Attention is in f16 where the rest is in f32.
    tolerance = TOLERANCE["f16"] if (dtype, quant) == ("f32", "none") else None
    check_backend(OnnxBackend(), dtype=dtype, device="cuda", tolerance=tolerance, quant=quant)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_cuda_is_near_transformers(dtype: DType) -> None:
    for name in ("plain", "narrow-head-dim", "mlp-bias", "dynamic", "yarn", *VARYING_CASES):
        case = llama_case(name)
        runner = OnnxBackend().load(case.load_request(dtype=dtype, device="auto"), ignore)
        assert "cuda" in runner.numerics
        for chunk in (1, 129):
            logits = run_chunked(runner, case.ids, chunk)
            assert np.abs(logits - case.logits).max() / case.logits.std() < BOUNDS[dtype]
        assert runner.kv_bytes() == 0
