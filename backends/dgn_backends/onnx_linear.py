"""Linear layers as nodes of a graph. Knows nothing of blocks or of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dgn_backends.onnx_graph import FUSED, GraphBuilder
from dgn_backends.quant import Quantised

F32 = npt.NDArray[np.float32]

#: The accuracy level of MatMulNBits at which rows are quantised to 8 bit.
_INT8_ROWS = 4


class LinearWeights(Protocol):
    """y = x W^T + b for rows x f32 [rows, in]."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights as they are computed with."""

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """Appends the layer; the name of its output f32 [rows, out], which is `output` where given."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainLinear:
    """A layer in f32: `weight` [out, in], `bias` [out]."""

    weight: F32
    bias: F32 | None

    @property
    def n_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """See `LinearWeights`."""
        name = graph.new_name("linear")
        inputs = [x, graph.weight(f"{name}.weight", self.weight, is_packed=True)]
        if self.bias is not None:
            inputs.append(graph.weight(f"{name}.bias", self.bias))
        output = output or f"{name}.out"
        graph.nodes_to([output], "Gemm", inputs, transB=1)
        return output


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLinear:
    """A layer whose weight is quantised in groups along its inputs; `bias` f32 [out]. Rows of the input are
    quantised to 8 bit on the way, each by itself and in the same groups."""

    in_features: int
    weight: Quantised
    bias: F32 | None

    @property
    def n_bytes(self) -> int:
        """Bytes of all of it."""
        return self.weight.n_bytes + (0 if self.bias is None else self.bias.nbytes)

    def add_to(self, graph: GraphBuilder, x: str, output: str = "") -> str:
        """See `LinearWeights`."""
        name = graph.new_name("linear")
        packed = graph.weight(f"{name}.packed", self.weight.packed, is_packed=True)
        # Scales may be read where they lie; giving them back is safe where they come back from a file.
        is_mapped = not self.weight.scales.flags.writeable
        scales = graph.weight(f"{name}.scales", self.weight.scales, is_packed=is_mapped)
        inputs = [x, packed, scales, graph.weight(f"{name}.zeros", self.weight.zeros)]
        if self.bias is not None:
            inputs += ["", graph.weight(f"{name}.bias", self.bias)]
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
