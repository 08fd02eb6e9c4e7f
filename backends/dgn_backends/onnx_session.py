"""One ONNX Runtime session for a run of blocks, and for the head: made from a graph, run on memory bound by
address, so that on a CPU nothing is copied, and elsewhere only what goes in and out.

Knows nothing of files or of sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dgn_backends.onnx_batch import Grid
from dgn_backends.onnx_device import Device
from dgn_backends.onnx_graph import ONNX_TYPES, Array, GraphBuilder
from dgn_backends.onnx_pools import KvPool
from dgn_backends.onnx_rope import RopeTable
from dgn_backends.tensor import DType

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

#: Bindings kept, for runs of few rows: decode comes again and again in the same shape.
_BINDINGS_KEPT = 16
_ROWS_KEPT = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks `[start, stop)` of the model, then perhaps the head. `kv_blocks` are the blocks' places in the
    slot pools."""

    start: int
    stop: int
    has_head: bool
    kv_blocks: range


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the KV of a run's slots lie, and the angles of its positions."""

    pool: KvPool
    table: RopeTable


#: How long a thread that has nothing to do spins before it sleeps: longer than most of the time between two
#: parallel parts of a run, shorter than another process's turn on the same core.
_SPIN_US = 30


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options of every session: `threads` of its own, which spin a little while a run lasts and sleep between
    runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    # Weights go to memory of their own, not into an arena that grows by doubling.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # Weights are packed from where they lie, by all threads; by default they are copied first, and by one.
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    return options


class SpanSession:
    """The session of `segment`, from the graph of it. What the graph holds stays held."""

    def __init__(
        self, segment: Segment, graph: GraphBuilder, options: ort.SessionOptions, device: Device
    ) -> None:
        """Raises MemoryError, and BackendUnavailable where the device can't do what the graph needs."""
        self.segment = segment
        self._device = device
        self._weights: Mapping[str, Array] = graph.external_weights()
        values = [_value(array, graph.dtypes.get(name)) for name, array in self._weights.items()]
        options.add_external_initializers(list(self._weights), values)
        self._session = device.session(graph.model().SerializeToString(), options)
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        self._output = "logits" if segment.has_head else "hidden_out"
        self._output_width = int(outputs[self._output][1])
        self._bindings: OrderedDict[tuple[object, ...], _Binding] = OrderedDict()

    def run(self, hidden: F32, grid: Grid, place: Place, wanted: Sequence[int]) -> F32:
        """Hidden states [rows, hidden_size] in; logits [len(wanted), vocab_size] of the rows `wanted` where
        the segment has the head, else hidden states [rows, hidden_size]. Keys and values are appended."""
        rows = len(wanted) if self.segment.has_head else len(hidden)
        output = np.empty((rows, self._output_width), np.float32)
        binding = self._binding(hidden, grid, place, wanted)
        binding.set(hidden, grid, wanted)
        binding.io.bind_output(self._output, "cpu", 0, np.float32, output.shape, output.ctypes.data)
        self._device.run(self._session, binding.io)
        return output

    def _binding(self, hidden: F32, grid: Grid, place: Place, wanted: Sequence[int]) -> _Binding:
        key = (
            len(hidden),
            len(wanted),
            grid.to_grid.shape,
            grid.first_slot,
            id(place.pool),
            place.pool.generation,
            id(place.table),
            len(place.table.cos),
        )
        binding = self._bindings.get(key)
        if binding is None:
            io = self._session.io_binding()
            binding = _Binding(io, self._device, self.segment, hidden, grid, place, wanted)
            if len(hidden) > _ROWS_KEPT:
                return binding
            self._bindings[key] = binding
            if len(self._bindings) > _BINDINGS_KEPT:
                self._bindings.popitem(last=False)
        self._bindings.move_to_end(key)
        return binding


class _Binding:
    """Inputs for runs of one shape over the same slots: bound to arrays that stay, where the device shares
    our memory, else copied there for every run. It holds the pool and the table, so that their addresses stay
    theirs."""

    def __init__(
        self,
        io: ort.IOBinding,
        device: Device,
        segment: Segment,
        hidden: F32,
        grid: Grid,
        place: Place,
        wanted: Sequence[int],
    ) -> None:
        self.io = io
        self._device = device
        self._place = place
        self._inputs: dict[str, npt.NDArray[np.generic]] = {"hidden": np.empty_like(hidden)}
        if segment.has_head:
            self._inputs["wanted"] = np.empty(len(wanted), np.int32)
        if segment.stop > segment.start:
            self._inputs |= {name: np.empty_like(array) for name, array in _grid_inputs(grid).items()}
            self._tables = (place.table.cos, place.table.sin)
            for name, table in zip(("cos", "sin"), self._tables, strict=True):
                self._bind(name, table)
            self._bind_kv(segment, grid)
        if not device.is_apart:
            for name, array in self._inputs.items():
                self._bind(name, array)

    def set(self, hidden: F32, grid: Grid, wanted: Sequence[int]) -> None:
        """Writes the inputs of a run."""
        values: dict[str, npt.ArrayLike] = {"hidden": hidden, "wanted": wanted, **_grid_inputs(grid)}
        for name, array in self._inputs.items():
            array[...] = values[name]
            if self._device.is_apart:
                self.io.bind_cpu_input(name, array)  # copies it to where it is needed

    def _bind(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """To the array itself, or to a copy in the device's memory."""
        if self._device.is_apart:
            self.io.bind_ortvalue_input(name, self._device.copy_of(array))
        else:
            self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_kv(self, segment: Segment, grid: Grid) -> None:
        pool = self._place.pool
        shape = (len(grid.totals_less_1), pool.n_kv_heads, pool.capacity, pool.head_dim)
        device = self._device
        where = (device.memory, device.index, ONNX_TYPES[device.numbers.attention], shape)
        for number, block in zip(range(segment.start, segment.stop), segment.kv_blocks, strict=True):
            for kind in ("keys", "values"):
                address = pool.address(block, kind == "values", grid.first_slot)
                self.io.bind_input(f"{kind}.{number}", *where, address)
                self.io.bind_output(f"new_{kind}.{number}", *where, address)


def _value(array: Array, dtype: DType | None) -> ort.OrtValue:
    if dtype == "bf16":  # NumPy has none
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(array)


def _grid_inputs(grid: Grid) -> dict[str, npt.NDArray[np.generic]]:
    return {
        "to_grid": grid.to_grid,
        "from_grid": grid.from_grid,
        "totals_less_1": grid.totals_less_1,
        "counts": grid.counts,
        "longest_total": np.array(grid.longest_total, np.int32),
    }
