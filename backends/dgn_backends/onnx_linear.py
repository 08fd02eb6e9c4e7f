"""Linear layers as nodes of a graph. Knows nothing of blocks or of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dgn_backends.onnx_graph import FUSED, Array, GraphBuilder
from dgn_backends.quant import Quantised
from dgn_backends.tensor import Tensor

#: The accuracy level of MatMulNBits at which rows are quantised to 8 bit.
_INT8_ROWS = 4


class LinearWeights(Protocol):
    """y = x W^T + b for rows x [rows, in]; all floats are in the dtype of the graph's rows."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights as they are computed with."""

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """Appends the layer; the name of its output [rows, out], which is `output` where given."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainLinear:
    """A layer of floats: `weight` [out, in], `bias` [out]."""

    weight: Array
    bias: Array | None

    @property
    def n_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """See `LinearWeights`."""
        name = graph.new_name("linear")
        rows = graph.numbers.rows
        inputs = [x, graph.floats(f"{name}.weight", self.weight, rows, is_packed=True)]
        if self.bias is not None:
            inputs.append(graph.floats(f"{name}.bias", self.bias, rows))
        output = output or f"{name}.out"
        graph.nodes_to([output], "Gemm", inputs, transB=1)
        return output


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLinear:
    """A layer whose weight is quantised in groups along its inputs; `bias` [out]. On a CPU, rows of the
    input are quantised to 8 bit on the way, each by itself and in the same groups; the CUDA provider computes
    with them as they are, whatever the accuracy level."""

    in_features: int
    weight: Quantised
    bias: Array | None

    @property
    def n_bytes(self) -> int:
        """Bytes of all of it."""
        return self.weight.n_bytes + (0 if self.bias is None else self.bias.nbytes)

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """See `LinearWeights`."""
        name = graph.new_name("linear")
        packed = graph.weight(f"{name}.packed", self.weight.packed, is_packed=True)
        # Scales may be read where they lie; giving them back is safe where they come back from a file.
        rows = graph.numbers.rows
        factors: Array = self.weight.scales
        if rows != "f32":
            factors = Tensor.from_f32(self.weight.scales, rows).to_numpy()  # f16 has every scale exactly
        is_mapped = rows == "f32" and not factors.flags.writeable
        scales = graph.floats(f"{name}.scales", factors, rows, is_packed=is_mapped)
        inputs = [x, packed, scales, graph.weight(f"{name}.zeros", self.weight.zeros)]
        scheme = self.weight.scheme
        if self.bias is not None:
            inputs += ["", graph.floats(f"{name}.bias", self.bias, rows)]
        output = output or f"{name}.out"
        graph.nodes_to(
            [output],
            "MatMulNBits",
            inputs,
            domain=FUSED,
            K=self.in_features,
            N=len(self.weight.packed),
            bits=scheme.bits,
            block_size=scheme.size(self.in_features),
            accuracy_level=_INT8_ROWS,
        )
        return output


#: The code of 0 in rows of the input, and the largest code's distance from it.
_MIDDLE, _REACH = np.uint8(128), np.float32(127)
_LEAST = np.float32(2.0**-100)  # the scale of a row of zeros; its inverse is a number


@dataclass(frozen=True, slots=True, eq=False)
class PerChannelLinear:
    """A layer whose weight has 8 bits and a scale for each output; `bias` [out]. For the CPU: rows of the
    input, which must be finite, are quantised to 8 bits, each by itself and with one scale, and their
    products with the codes are summed as integers. So a row is the same bit by bit in any company.

    The codes are unsigned on both sides. Where a CPU has no instruction for u8 by s8 (VNNI), ONNX Runtime's
    kernel for those adds two products in 16 bits and cuts off what is larger; that for u8 by u8 is exact
    everywhere, and where there is VNNI it is the same kernel."""

    weight: Quantised
    bias: Array | None

    @property
    def n_bytes(self) -> int:
        """Bytes of all of it."""
        return self.weight.n_bytes + (0 if self.bias is None else self.bias.nbytes)

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """See `LinearWeights`."""
        assert graph.numbers.rows == "f32"
        name = graph.new_name("linear")
        codes, scale = graph.once("row codes", x, lambda: _row_codes(graph, x))
        inputs = [
            codes,
            graph.scalar(np.float32(1)),
            graph.scalar(_MIDDLE),
            graph.weight(f"{name}.packed", self.weight.packed[:, 0], is_packed=True),
            graph.floats(f"{name}.scales", self.weight.scales[:, 0], "f32"),
            graph.weight(f"{name}.zeros", self.weight.zeros[:, 0]),
        ]
        # QGemm's own order: a, its scale and zero point, b and its, no integers to add, no codes as output
        sums = graph.node("QGemm", inputs, domain=FUSED, transB=1)
        output = output or f"{name}.out"
        if self.bias is None:
            graph.nodes_to([output], "Mul", [sums, scale])
        else:
            scaled = graph.node("Mul", [sums, scale])
            graph.nodes_to([output], "Add", [scaled, graph.floats(f"{name}.bias", self.bias, "f32")])
        return output


def _row_codes(graph: GraphBuilder, x: str) -> tuple[str, str]:
    """Codes u8 of the rows `x` f32 [rows, in] around `_MIDDLE`, and the rows' scales f32 [rows, 1]."""
    largest = graph.node("ReduceMax", [graph.node("Abs", [x]), graph.constant([1])])
    fitting = graph.node("Div", [largest, graph.scalar(_REACH)])
    scale = graph.node("Max", [fitting, graph.scalar(_LEAST)])
    scaled = graph.node("Div", [x, scale])
    codes = graph.node("QuantizeLinear", [scaled, graph.scalar(np.float32(1)), graph.scalar(_MIDDLE)])
    return codes, scale
