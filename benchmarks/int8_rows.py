"""Products of rows with weights of 8 bits in ONNX Runtime: exactness and time of the ways there are.

    python benchmarks/int8_rows.py [--out 8192] [--inputs 2048] [--repeats 5]

Each way quantises every row by itself. `MatMulNBits` is what the backend `onnx` uses; in the others a weight
is a code times a scale of its output, the rows are codes of 8 bits around 128, and sums are of integers. A
kernel that adds two products in 16 bits cuts large ones off, so the codes here reach both ends; the error is
that against the same sums in f64. Times are CPU time of one thread, the least of `--repeats`: other work on
the machine changes it less than the time that passes.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from bench_kit import report
from onnx import TensorProto, helper, numpy_helper

F32 = npt.NDArray[np.float32]
FUSED = "com.microsoft"
ROWS = (1, 8, 64, 512)


def session(nodes: list[object], weights: dict[str, npt.NDArray[np.generic]]) -> ort.InferenceSession:
    """x f32 [rows, inputs] to y f32 [rows, out], one thread."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "rows", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(FUSED, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_groups(codes: npt.NDArray[np.int8], group: int) -> ort.InferenceSession:
    """MatMulNBits of `codes` [out, inputs], all scales 1."""
    out, inputs = codes.shape
    packed = (codes.astype(np.int16) + 128).astype(np.uint8).reshape(out, -1, group)
    scales = np.ones(packed.shape[:2], np.float32)
    numbers = {"K": inputs, "N": out, "bits": 8, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=FUSED, **numbers)
    return session([node], {"w": packed, "s": scales})


def by_output(codes: npt.NDArray[np.int8], *, signed: bool) -> ort.InferenceSession:
    """MatMulIntegerToFloat of `codes` [out, inputs], all scales 1, rows quantised in the graph."""
    offset, kind = (0, np.int8) if signed else (128, np.uint8)
    stored = (codes.T.astype(np.int16) + offset).astype(kind)
    weights: dict[str, npt.NDArray[np.generic]] = {
        "w": np.ascontiguousarray(stored),
        "w_scale": np.ones(len(codes), np.float32),
        "w_zero": np.array(offset, kind),
        "one": np.array(1, np.float32),
        "x_zero": np.array(128, np.uint8),
        "step": np.array(1 / 127, np.float32),
        "least": np.array(1e-30, np.float32),  # a row of zeros
        "last": np.array([1], np.int64),
    }
    steps = [
        ("Abs", ["x"], "size"),
        ("ReduceMax", ["size", "last"], "largest"),
        ("Mul", ["largest", "step"], "fitting"),
        ("Max", ["fitting", "least"], "scale"),
        ("Div", ["x", "scale"], "scaled"),
        ("QuantizeLinear", ["scaled", "one", "x_zero"], "codes"),
    ]
    nodes = [helper.make_node(op, inputs, [output]) for op, inputs, output in steps]
    inputs = ["codes", "w", "one", "w_scale", "x_zero", "w_zero"]
    nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, ["sums"], domain=FUSED))
    nodes.append(helper.make_node("Mul", ["sums", "scale"], ["y"]))
    return session(nodes, weights)


def worst_error(run: ort.InferenceSession, x: F32, codes: npt.NDArray[np.int8], group: int) -> float:
    """Of `x` [rows, inputs], the relative error of the worst row against sums in f64 of the rows' own codes
    in groups of `group`."""
    parts = x.reshape(len(x), -1, group)
    scales = np.abs(parts).max(axis=2, keepdims=True) / np.float32(127)
    rounded = (np.rint(parts / scales) * scales).reshape(x.shape).astype(np.float64)
    exact = rounded @ codes.T.astype(np.float64)
    error = np.linalg.norm(run.run(None, {"x": x})[0] - exact, axis=1)
    return float((error / np.linalg.norm(exact, axis=1)).max())


def cpu_ms(run: ort.InferenceSession, x: F32, repeats: int) -> float:
    """Least CPU time of a run, in ms."""
    times = []
    run.run(None, {"x": x})
    for _ in range(repeats):
        began = time.thread_time()
        run.run(None, {"x": x})
        times.append(time.thread_time() - began)
    return 1e3 * min(times)


def main() -> None:
    """Prints one row a way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (options.out, options.inputs)).astype(np.int8)
    ways = {
        "MatMulNBits, groups of 128": (in_groups(codes, 128), 128),
        "MatMulNBits, groups of 64": (in_groups(codes, 64), 64),
        "u8 rows, u8 weights": (by_output(codes, signed=False), options.inputs),
        "u8 rows, s8 weights": (by_output(codes, signed=True), options.inputs),
    }
    rows = []
    for name, (run, group) in ways.items():
        error = worst_error(run, random.standard_normal((8, options.inputs), np.float32), codes, group)
        cells = [name, f"{error:.1e}"]
        for count in ROWS:
            x = random.standard_normal((count, options.inputs), np.float32)
            cells.append(f"{cpu_ms(run, x, options.repeats):.2f}")
        rows.append(cells)
    print(report.table(["way", "worst error", *(f"{count} rows, ms" for count in ROWS)], rows))


if __name__ == "__main__":
    main()
