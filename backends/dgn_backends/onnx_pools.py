"""Where each sequence's keys and values are: a slot of one of several pools, on the CPU or on an accelerator.

Knows nothing of attention, of spans or of what a sequence is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dgn_backends.errors import DgnError
from dgn_backends.onnx_batch import MAX_ROWS
from dgn_backends.onnx_device import Device
from dgn_backends.onnx_device_kv import FIRST_POSITIONS, Copier, DevicePool
from dgn_backends.onnx_kv import SlotPool


class KvPool(Protocol):
    """What `SlotPool` and `DevicePool` have in common; see there."""

    n_kv_heads: int
    head_dim: int
    capacity: int
    generation: int

    def give_back(self, slot: int) -> None:
        """Frees a slot."""

    def forget(self, slot: int, blocks: Iterable[int], kept: int, held: int) -> None:
        """Positions from `kept` on, of the `held` ones, are not needed any more."""

    def n_bytes(self, n_blocks: int, positions: int) -> int:
        """Bytes that so many positions of a slot take in so many blocks."""

    def address(self, block: int, values: bool, slot: int) -> int:
        """Where the keys or the values of `block` of the slots from `slot` on begin."""


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A slot of a pool."""

    pool: KvPool
    slot: int

    def leave(self) -> None:
        """Frees it."""
        self.pool.give_back(self.slot)


@dataclass(frozen=True, slots=True)
class KvShape:
    """`head_dim` is padded; `max_positions` is the model's context."""

    n_blocks: int
    n_kv_heads: int
    head_dim: int
    max_positions: int


class Pools(Protocol):
    """All pools of a span. Both methods raise LimitError where there is no room."""

    def seat(self, total_positions: int) -> Seat:
        """A seat for a sequence that never grows beyond `total_positions`."""

    def reserve(self, seat: Seat, positions: int) -> Seat:
        """The seat with room for `positions`: the same, or another one to which all has moved."""


class HostPools:
    """On the CPU: every slot has room for everything from the start, since memory that nobody has touched
    costs nothing."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self._pools: dict[int, SlotPool] = {}

    def seat(self, total_positions: int) -> Seat:
        """In the pool for the model's context, or, for what is longer, for a power of two."""
        capacity = max(self._shape.max_positions, 1)
        if total_positions > capacity:
            capacity = 1 << (total_positions - 1).bit_length()
        if capacity not in self._pools:
            shape = self._shape
            self._pools[capacity] = SlotPool(
                shape.n_blocks,
                shape.n_kv_heads,
                shape.head_dim,
                capacity + MAX_ROWS,  # a step that is padded to the longest of its run must fit as well
            )
        pool = self._pools[capacity]
        return Seat(pool, pool.take())

    def reserve(self, seat: Seat, positions: int) -> Seat:
        """See the protocol."""
        return seat


class DevicePools:
    """On an accelerator: see `dgn_backends.onnx_device_kv`."""

    def __init__(self, device: Device, copier: Copier, shape: KvShape) -> None:
        self._device = device
        self._copier = copier
        self._shape = shape
        self._pools: dict[int, DevicePool] = {}

    def seat(self, total_positions: int) -> Seat:
        """In the pool of the smallest slots."""
        pool = self._pool(FIRST_POSITIONS)
        return Seat(pool, pool.take())

    def reserve(self, seat: Seat, positions: int) -> Seat:
        """See the protocol."""
        old = seat.pool
        assert isinstance(old, DevicePool)
        if positions <= old.positions:
            return seat
        wanted = old.positions
        while wanted < positions:
            wanted *= 2
        pool = self._pool(wanted)
        slot = pool.take()
        try:
            old.move(seat.slot, pool, slot)
        except DgnError:
            pool.give_back(slot)
            raise
        seat.leave()
        return Seat(pool, slot)

    def _pool(self, positions: int) -> DevicePool:
        if positions not in self._pools:
            shape = self._shape
            self._pools[positions] = DevicePool(
                self._device,
                self._copier,
                (shape.n_blocks, shape.n_kv_heads, positions, shape.head_dim),
                MAX_ROWS,
            )
        return self._pools[positions]
