"""Keys and values in the memory of an accelerator: sequences are slots of pools of one size each.

Device memory that is reserved is taken, so a sequence begins in a pool of small slots, and moves to one whose
slots are twice as long whenever it has filled its own: at most about half of what is held is empty, and a
position is copied once on average. Sequences of one pool share a run. Knows nothing of attention or of what a
sequence is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime as ort

from dgn_backends.errors import LimitError
from dgn_backends.onnx_device import Device
from dgn_backends.onnx_graph import GraphBuilder

#: Positions of the smallest slots.
FIRST_POSITIONS = 512
_ITEM_BYTES = 2  # f16 and bf16


class DevicePool:
    """Slots of `positions` positions, and room behind them for a padded step, for `n_blocks` blocks.

    `generation` rises when the buffers have moved.
    """

    def __init__(self, device: Device, copier: Copier, shape: tuple[int, int, int, int], spare: int) -> None:
        """`shape`: blocks, KV heads, positions, padded head_dim. `spare`: positions of the room behind."""
        n_blocks, self.n_kv_heads, self.positions, self.head_dim = shape
        self.capacity = self.positions + spare
        self.generation = 0
        self._device = device
        self._copier = copier
        self._n_buffers = 2 * n_blocks
        self._buffers: list[ort.OrtValue] = []  # keys of block 0, values of block 0, keys of block 1, …
        self._n_slots = 0
        self._free: set[int] = set()
        self._slot_bytes = self.n_kv_heads * self.capacity * self.head_dim * _ITEM_BYTES

    def take(self) -> int:
        """The lowest free slot. Raises LimitError where the memory ends."""
        if not self._free:
            self._grow()
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Frees a slot; the memory goes when no slot is taken any more."""
        self._free.add(slot)
        if len(self._free) == self._n_slots:
            self._buffers.clear()
            self._free.clear()
            self._n_slots = 0
            self.generation += 1

    def forget(self, slot: int, blocks: Iterable[int], kept: int, held: int) -> None:
        """A slot's memory is its own until it is given back."""

    def n_bytes(self, n_blocks: int, positions: int) -> int:
        """Bytes that a slot takes in so many blocks, however many of its positions are used."""
        return 2 * n_blocks * self._slot_bytes

    def address(self, block: int, values: bool, slot: int) -> int:
        """Where the keys or the values of `block` of the slots from `slot` on begin."""
        return int(self._buffers[2 * block + values].data_ptr()) + slot * self._slot_bytes

    def move(self, slot: int, target: DevicePool, target_slot: int) -> None:
        """Copies all positions of a slot to one of a pool with longer slots."""
        source_shape = (1, self.n_kv_heads, self.capacity, self.head_dim)
        target_shape = (1, self.n_kv_heads, target.capacity, self.head_dim)
        for block in range(self._n_buffers // 2):
            for values in (False, True):
                self._copier.copy(
                    self.address(block, values, slot),
                    source_shape,
                    target.address(block, values, target_slot),
                    target_shape,
                )

    def _grow(self) -> None:
        """Room for twice as many slots. One buffer after the other is replaced, so that no more than one is
        there twice; a buffer that has grown stays so if the next one can't."""
        wanted = 2 * self._n_slots or 1
        shape = (wanted, self.n_kv_heads, self.capacity, self.head_dim)
        try:
            for number in range(self._n_buffers):
                new = self._device.zeros(shape)
                if number < len(self._buffers):
                    old = self._buffers[number]
                    held = (self._n_slots, *shape[1:])
                    self._copier.copy(old.data_ptr(), held, new.data_ptr(), shape)
                    self._buffers[number] = new
                else:
                    self._buffers.append(new)
        except MemoryError as error:
            raise LimitError(
                f"no memory on {self._device} for KV: {self._n_buffers} buffers of "
                f"{wanted * self._slot_bytes:,} bytes for {wanted} sequences of {self.positions:,} positions"
            ) from error
        finally:
            self.generation += 1
        self._free.update(range(self._n_slots, wanted))
        self._n_slots = wanted


class Copier:
    """Copies tensors of 16-bit items within a device's memory, into larger ones, with zeros behind."""

    def __init__(self, device: Device) -> None:
        """Raises BackendUnavailable where ONNX Runtime can't use the device."""
        graph = GraphBuilder(device.numbers)
        shape: list[int | str] = ["a", "b", "c", "d"]
        inputs = [graph.input("source", "f16", shape), graph.input("room", "i64", [8])]
        graph.nodes_to(["target"], "Pad", inputs)
        graph.output("target", "f16", ["e", "f", "g", "h"])
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._device = device
        self._session = device.session(graph.model().SerializeToString(), options)

    def copy(
        self, source: int, source_shape: tuple[int, ...], target: int, target_shape: tuple[int, ...]
    ) -> None:
        """From address to address; no dimension of the target is smaller. Raises as `Device.run` does."""
        room = np.zeros(8, np.int64)
        room[4:] = np.subtract(target_shape, source_shape)
        binding = self._session.io_binding()
        where = (self._device.memory, self._device.index, np.float16)
        binding.bind_input("source", *where, source_shape, source)
        binding.bind_cpu_input("room", room)
        binding.bind_output("target", *where, target_shape, target)
        self._device.run(self._session, binding)
