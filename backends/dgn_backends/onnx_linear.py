"""Linear layers as nodes of a graph. Knows nothing of blocks or of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
            bits=self.weight.scheme.bits,
            block_size=self.weight.scheme.group,
            accuracy_level=_INT8_ROWS,
        )
        return output
