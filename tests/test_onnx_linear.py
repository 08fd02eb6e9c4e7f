"""Linear layers of one scale an output in ONNX Runtime: exact sums, and rows that don't know each other."""

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnxruntime as ort

from dgn_backends.onnx_graph import GraphBuilder, Numbers
from dgn_backends.onnx_linear import PerChannelLinear
from dgn_backends.onnx_session import session_options
from dgn_backends.quant import Quantised, Scheme

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
OUT, IN = 96, 320


def layer(codes: U8, scales: F32, zeros: U8, bias: F32 | None = None) -> ort.InferenceSession:
    """x [rows, IN] to y [rows, OUT]; the weight is `codes` [OUT, IN]."""
    weight = Quantised(codes[:, None], scales[:, None], zeros[:, None], Scheme(8, None))
    graph = GraphBuilder(Numbers())
    graph.input("x", "f32", ["rows", IN])
    PerChannelLinear(weight, bias).add_to(graph, "x", "y")
    graph.output("y", "f32", ["rows", OUT])
    options = session_options(2)
    held = graph.external_weights()
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in held.values()]
    options.add_external_initializers(list(held), values)
    return ort.InferenceSession(
        graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(session: ort.InferenceSession, x: F32) -> F32:
    y: F32 = session.run(None, {"x": x})[0]
    return y


def expected(x: F32, codes: U8, scales: F32, zeros: U8) -> npt.NDArray[np.float64]:
    """In f64, of rows rounded to 127 steps on either side."""
    steps = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    rows = np.rint(x / steps).astype(np.float64) * steps
    weights = (codes.astype(np.float64) - zeros[:, None]) * scales[:, None]
    return rows @ weights.T


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 130])
def test_sums_are_exact_where_all_codes_are_extreme(rows: int) -> None:
    """Two products of such codes don't fit into 16 bits: a kernel that adds them there is off by a third."""
    random = np.random.default_rng(rows)
    codes = random.choice(np.array([0, 255], np.uint8), (OUT, IN))
    scales = random.uniform(0.5, 2, OUT).astype(np.float32)
    zeros = random.choice(np.array([0, 1, 128, 255], np.uint8), OUT)
    x = random.choice(np.array([-1, 1], np.float32), (rows, IN)) * random.uniform(0.1, 9, (rows, 1))
    x = x.astype(np.float32)
    x[:, 1::2] = x[:, ::2]  # neighbours of one sign
    codes[:, 1::2] = codes[:, ::2]
    wanted = expected(x, codes, scales, zeros)
    apart = np.abs(run(layer(codes, scales, zeros), x) - wanted)
    assert (apart.max(axis=1) <= 3e-7 * np.abs(wanted).max(axis=1)).all()


def test_a_row_has_the_same_bits_in_any_company() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (OUT, IN)).astype(np.uint8)
    scales = random.uniform(0.001, 0.02, OUT).astype(np.float32)
    bias = random.standard_normal(OUT).astype(np.float32)
    session = layer(codes, scales, np.full(OUT, 131, np.uint8), bias)
    x = random.standard_normal((40, IN)).astype(np.float32) * random.uniform(0.01, 100, (40, 1))
    x = x.astype(np.float32)
    together = run(session, x)
    for few in (1, 2, 3, 17):
        assert np.array_equal(run(session, x[:few]), together[:few])


def test_a_row_of_zeros_gives_the_bias() -> None:
    random = np.random.default_rng(1)
    codes = random.integers(0, 256, (OUT, IN)).astype(np.uint8)
    bias = random.standard_normal(OUT).astype(np.float32)
    session = layer(codes, np.ones(OUT, np.float32), np.full(OUT, 128, np.uint8), bias)
    x = np.zeros((2, IN), np.float32)
    x[1] = random.standard_normal(IN)
    y = run(session, x)
    assert np.array_equal(y[0], bias)
    assert np.isfinite(y[1]).all()
