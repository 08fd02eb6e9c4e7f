"""A graph of ONNX operators that grows node by node, with its weights beside it.

Weights stay NumPy arrays, often views of mapped files: the graph only names them, and the session is given
their addresses. Knows nothing of blocks or of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from dgn_backends.tensor import STORAGE, DType

Array = npt.NDArray[np.generic]
Attribute = int | float | str

#: The domain of the fused operators.
FUSED = "com.microsoft"
_OPSETS = (("", 21), (FUSED, 1))
_IR_VERSION = 10
#: What values of a graph may be of.
GraphType = DType | Literal["i64"]
#: ONNX's number of each.
ONNX_TYPES: dict[GraphType, int] = {
    "f32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "f16": TensorProto.FLOAT16,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """The dtypes that a graph computes in: `rows` everywhere but in attention, `attention` there and in the
    KV. Inputs and outputs of a graph are f32 all the same, but for the KV."""

    rows: DType = "f32"
    attention: DType = "f32"


class GraphBuilder:
    """Nodes in the order of computation, the graph's inputs and outputs, and `weights` by name.

    Weights of bf16 are held as their raw words, see `dgn_backends.tensor`."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.weights: dict[str, Array] = {}
        self.dtypes: dict[str, DType] = {}  # of the weights that are floats
        self.packed: list[Array] = []
        self._nodes: list[NodeProto] = []
        self._once: dict[tuple[str, str], tuple[str, ...]] = {}
        self._inputs: dict[str, tuple[GraphType, Sequence[int | str]]] = {}
        self._outputs: dict[str, tuple[GraphType, Sequence[int | str]]] = {}
        self._count = 0

    def input(self, name: str, dtype: GraphType, shape: Sequence[int | str]) -> str:
        """Declares an input (names in `shape` are free dimensions); the name again."""
        self._inputs[name] = (dtype, shape)
        return name

    def output(self, name: str, dtype: GraphType, shape: Sequence[int | str]) -> None:
        """Declares that the value `name` is an output."""
        self._outputs[name] = (dtype, shape)

    def weight(self, name: str, array: Array, *, is_packed: bool = False) -> str:
        """Adds a weight; the name again. `is_packed`: ONNX Runtime is expected to make a copy of its own, in
        an order of its own, and to leave this one."""
        self.weights[name] = array
        if is_packed:
            self.packed.append(array)
        return name

    def floats(self, name: str, array: Array, dtype: DType, *, is_packed: bool = False) -> str:
        """Adds a weight whose items are the raw bits of `dtype`; the name again."""
        assert array.dtype == STORAGE[dtype]
        self.dtypes[name] = dtype
        return self.weight(name, array, is_packed=is_packed)

    def cast(self, x: str, source: DType, target: DType, output: str = "") -> str:
        """`x` of dtype `source` in `target`; as the value `output` where given."""
        if source == target and not output:
            return x
        name = output or self.new_name("cast")
        if source == target:
            self.nodes_to([name], "Identity", [x])
        else:
            self.nodes_to([name], "Cast", [x], to=ONNX_TYPES[target])
        return name

    def constant(self, values: Sequence[int]) -> str:
        """The name of an i64 [n] constant that holds `values`, such as a shape."""
        name = "const." + ".".join(map(str, values))
        if name not in self.weights:
            self.weights[name] = np.array(values, np.int64)
        return name

    def scalar(self, value: np.generic) -> str:
        """The name of a constant without dimensions."""
        name = f"const.{value.dtype}.{value}"
        self.weights[name] = np.asarray(value)
        return name

    def once(self, what: str, x: str, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """The names of the values that `make` adds, the first time alone: what layers with the same input `x`
        share."""
        key = (what, x)
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def node(self, op: str, inputs: Sequence[str], *, domain: str = "", **attributes: Attribute) -> str:
        """Adds a node with one output; the output's name. An empty input is one that is left out."""
        name = self.new_name(op)
        self.nodes_to([name], op, inputs, domain=domain, **attributes)
        return name

    def nodes_to(
        self,
        outputs: Sequence[str],
        op: str,
        inputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> None:
        """Adds a node that writes the values `outputs`; an empty one is left out."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        node = helper.make_node(op, given, outputs, name=self.new_name(op), domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)

    def new_name(self, stem: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{stem}.{self._count}"

    def model(self) -> ModelProto:
        """The finished model. Small constants are in it; the weights are named as data that lies
        elsewhere."""
        graph = GraphProto(name="span")
        graph.node.extend(self._nodes)
        graph.input.extend(_values(self._inputs))
        graph.output.extend(_values(self._outputs))
        graph.initializer.extend(
            _initializer(name, array, self.dtypes.get(name)) for name, array in self.weights.items()
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)

    def external_weights(self) -> dict[str, Array]:
        """The weights that `model` names without holding them."""
        return {name: array for name, array in self.weights.items() if not _is_small(array)}


def _is_small(array: Array) -> bool:
    return array.dtype == np.int64 or not array.ndim


def _initializer(name: str, array: Array, dtype: DType | None) -> TensorProto:
    data_type = ONNX_TYPES[dtype] if dtype else helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, dims=array.shape, data_type=data_type)
    if _is_small(array):
        tensor.raw_data = array.tobytes()
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="memory")
    return tensor


def _values(declared: dict[str, tuple[GraphType, Sequence[int | str]]]) -> list[ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(shape))
        for name, (dtype, shape) in declared.items()
    ]
