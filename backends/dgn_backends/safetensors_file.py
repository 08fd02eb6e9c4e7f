"""One safetensors file, memory-mapped: 8 bytes of header length, a JSON header, then the tensors' bytes.

Format: https://huggingface.co/docs/safetensors. Everything in the header is checked before use, as strictly
as the format demands: the tensors cover the data without overlap, holes, or bytes left over. Knows nothing of
models.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

from dgn_backends.errors import ModelError
from dgn_backends.json_values import parse_json_object
from dgn_backends.regular_file import open_regular
from dgn_backends.tensor import DType, Tensor, tensor_bytes

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 16
_DTYPES: dict[str, DType] = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: `[begin, end)` in the data, and what its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open file. Raises ModelError, naming file and tensor, for everything that is not as it must be.

    The header is read; the data is mapped, and paged in by the system where a tensor is used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                size = file.seek(0, 2)
                file.seek(0)
                header_bytes = self._header_bytes(file.read(_LENGTH_BYTES), size)
                header = parse_json_object(file.read(header_bytes), path)
                self._data_begin = _LENGTH_BYTES + header_bytes
                self._entries = self._check_header(header, size - self._data_begin)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}", file=str(path)) from error

    def names(self) -> frozenset[str]:
        """The names of all tensors in the file."""
        return frozenset(self._entries)

    def check(self, name: str, shape: tuple[int, ...]) -> tuple[Entry, DType]:
        """The entry of tensor `name`, which must have `shape` and a dtype that we compute with."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._error(name, "is missing")
        if entry.shape != shape:
            raise self._error(name, f"has shape {list(entry.shape)}; config.json makes it {list(shape)}")
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise self._error(name, f"has dtype {entry.dtype}; supported: {', '.join(_DTYPES)}")
        return entry, dtype

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A read-only view of tensor `name`; checks as `check` does."""
        entry, dtype = self.check(name, shape)
        begin = self._data_begin + entry.begin
        return Tensor(dtype, shape, memoryview(self._map)[begin : begin + tensor_bytes(dtype, shape)])

    def release(self, name: str) -> None:
        """Lets go of the pages of tensor `name` that were read, as far as they hold nothing else."""
        entry = self._entries[name]
        begin = -(-(self._data_begin + entry.begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self._data_begin + entry.end) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: tensor {name} {problem}", file=str(self.path), tensor=name)

    def _header_bytes(self, prefix: bytes, size: int) -> int:
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or (length <= _MAX_HEADER_BYTES and _LENGTH_BYTES + length > size):
            raise ModelError(f"{self.path}: is truncated: it has only {size} bytes", file=str(self.path))
        if length > _MAX_HEADER_BYTES:
            raise ModelError(
                f"{self.path}: is not a safetensors file: its header would have {length} bytes",
                file=str(self.path),
            )
        return length

    def _check_header(self, header: dict[str, object], data_bytes: int) -> dict[str, Entry]:
        entries = {name: self._entry(name, value) for name, value in header.items() if name != "__metadata__"}
        end, previous = 0, "the start"
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                problem = "overlaps" if entry.begin < end else "leaves a hole after"
                raise self._error(name, f"{problem} {previous} (byte {entry.begin} of the data, not {end})")
            end, previous = entry.end, name
            if end > data_bytes:
                raise self._error(
                    name, f"ends beyond the file, which is truncated: {data_bytes} of {end} bytes"
                )
        if end != data_bytes:
            raise ModelError(
                f"{self.path}: has {data_bytes - end} bytes after its last tensor: it is corrupt",
                file=str(self.path),
            )
        return entries

    def _entry(self, name: str, value: object) -> Entry:
        match value:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise self._error(name, "has a header entry without dtype, shape and data_offsets")
        bits = _ITEM_BITS.get(dtype)
        if bits is None:
            raise self._error(name, f"has the unknown dtype {dtype[:40]!r}")
        if len(shape) > _MAX_DIMENSIONS or not all(type(item) is int and 0 <= item < 2**48 for item in shape):
            raise self._error(name, "has an unusable shape")
        if not 0 <= begin <= end:
            raise self._error(name, f"has unusable data_offsets [{begin}, {end}]")
        if math.prod(shape) * bits != (end - begin) * 8:
            raise self._error(name, f"has {end - begin} bytes, which is not {dtype}{shape}")
        return Entry(dtype, tuple(shape), begin, end)
