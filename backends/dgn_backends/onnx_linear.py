"""Linear layers as nodes of a graph. Knows nothing of blocks or of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dgn_backends.onnx_graph import GraphBuilder

F32 = npt.NDArray[np.float32]


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
        inputs = [x, graph.weight(f"{name}.weight", self.weight)]
        if self.bias is not None:
            inputs.append(graph.weight(f"{name}.bias", self.bias))
        output = output or f"{name}.out"
        graph.nodes_to([output], "Gemm", inputs, transB=1)
        return output
