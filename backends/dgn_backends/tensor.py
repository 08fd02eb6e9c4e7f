"""One raw tensor as it travels between processes: dtype, shape and bytes. Knows nothing of frames or of
compute.

NumPy has no bfloat16, so bf16 data is held as its raw 16-bit words; `to_f32` and `from_f32` convert (round to
nearest, ties to even).

`q8` is how hidden states may travel between nodes, and nothing else: a row of n values is n int8 codes, then
one f32 scale for every Q8_GROUP of them, the last group being as long as there are values left. Turning
numbers into it and back is `dgnd.wire.q8`'s; here is only how many bytes it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

DType = Literal["f32", "bf16", "f16", "i32"]
#: What a tensor may be in between two nodes.
WireDType = DType | Literal["q8"]
WIRE_DTYPES: tuple[str, ...] = (*get_args(DType), "q8")
Q8_GROUP = 64

#: NumPy dtype that holds the raw bits of each; all little-endian.
STORAGE: dict[str, np.dtype[np.generic]] = {
    "f32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "i32": np.dtype("<i4"),
}
assert set(STORAGE) == set(get_args(DType))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """`data` holds exactly the C-ordered little-endian bytes of `shape` in `dtype`.

    Raises ValueError when they don't match; a reader of foreign bytes checks before (see `dgnd.wire`).
    """

    dtype: WireDType
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        if isinstance(self.data, memoryview) and self.data.format != "B":
            # Of wider items len() would count the items; casting fails where they are not contiguous.
            object.__setattr__(self, "data", self.data.cast("B"))
        if tensor_bytes(self.dtype, self.shape) != len(self.data):
            raise ValueError(f"{self.dtype}{list(self.shape)} does not have {len(self.data)} bytes")

    @classmethod
    def from_numpy(cls, array: npt.NDArray[np.generic], dtype: WireDType) -> Tensor:
        """Wraps `array`, whose items are the raw bits of `dtype` (see STORAGE), without a copy where
        possible."""
        if array.dtype != STORAGE.get(dtype):
            raise ValueError(f"{array.dtype} does not hold {dtype}")
        flat = np.ascontiguousarray(array).reshape(-1)  # also makes one dimension of none
        return cls(dtype, tuple(array.shape), flat.view(np.uint8).data)

    @classmethod
    def from_f32(cls, array: npt.NDArray[np.float32], dtype: DType) -> Tensor:
        """Converts float32 values to `dtype` (f32, bf16 or f16)."""
        if dtype == "bf16":
            return cls.from_numpy(f32_to_bf16(array), dtype)
        return cls.from_numpy(array.astype(STORAGE[dtype]), dtype)

    def to_numpy(self) -> npt.NDArray[np.generic]:
        """The raw bits as an array of STORAGE[dtype], shape `shape`, sharing memory, read-only if `data`
        is. Not of q8."""
        return np.frombuffer(self.data, dtype=STORAGE[self.dtype]).reshape(self.shape)

    def to_f32(self) -> npt.NDArray[np.float32]:
        """The values as float32, shape `shape`."""
        raw = self.to_numpy()
        return bf16_to_f32(raw) if self.dtype == "bf16" else raw.astype(np.float32, copy=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of the first axis, without a copy."""
        row = tensor_bytes(self.dtype, self.shape[1:])
        return Tensor(
            self.dtype, (stop - start, *self.shape[1:]), memoryview(self.data)[start * row : stop * row]
        )


def tensor_bytes(dtype: WireDType, shape: tuple[int, ...]) -> int:
    """The number of bytes of a tensor; of q8 at least one row."""
    if dtype == "q8":
        width = shape[-1]
        return math.prod(shape[:-1]) * (width + 4 * -(-width // Q8_GROUP))
    return math.prod(shape) * STORAGE[dtype].itemsize


def bf16_to_f32(raw: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Widens raw bf16 words (uint16) to float32, exactly."""
    wide = raw.astype(np.uint32)
    wide <<= np.uint32(16)  # in place: a matrix may be as large as the rest of the memory
    return wide.view(np.float32)


def f32_to_bf16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Rounds float32 to raw bf16 words (uint16), to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet_nan, rounded).astype(np.uint16)
