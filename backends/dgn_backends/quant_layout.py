"""How a quantised matrix lies in the file of an entry of the cache: codes, scales and zero points, each from
a page's start on. Knows nothing of what an entry is made from, or of where it is kept."""

from __future__ import annotations

import hashlib
import mmap

import numpy as np
import numpy.typing as npt

from dgn_backends.quant import F32, U8, Quantised, Scheme

PAGE = 4096
DIGEST_BYTES = 32


def layout(shape: tuple[int, int], scheme: Scheme) -> tuple[int, int, int, int]:
    """Where codes, scales and zero points of a matrix begin, and where the file ends."""
    groups = scheme.groups(shape[1])
    codes = 2 * PAGE
    scales = codes + _up(shape[0] * groups * scheme.group_bytes(shape[1]))
    zeros = scales + _up(shape[0] * groups * 4)
    return codes, scales, zeros, zeros + _up(shape[0] * scheme.zeros_bytes(groups))


def _up(count: int) -> int:
    return -(-count // PAGE) * PAGE


def views(mapped: mmap.mmap, shape: tuple[int, int], scheme: Scheme) -> Quantised:
    """The matrix in a mapped file."""
    mapped.madvise(mmap.MADV_DONTNEED)  # what is used of it comes back, most of an embedding never
    codes, scales, zeros, _ = layout(shape, scheme)
    out, groups = shape[0], scheme.groups(shape[1])
    packed: U8 = np.frombuffer(mapped, np.uint8, out * groups * scheme.group_bytes(shape[1]), codes)
    factors: F32 = np.frombuffer(mapped, np.float32, out * groups, scales)
    points: U8 = np.frombuffer(mapped, np.uint8, out * scheme.zeros_bytes(groups), zeros)
    return Quantised(
        packed.reshape(out, groups, -1), factors.reshape(out, groups), points.reshape(out, -1), scheme
    )


def digest_of(data: npt.NDArray[np.uint8]) -> bytes:
    """Of whole pages: a hash of the pages' sums. It finds what disks and crashes do (flipped bits, pages lost
    or swapped) about as fast as memory can be read, which a hash of all bytes does not."""
    sums = data.view("<u8").reshape(-1, PAGE // 8).sum(axis=1, dtype=np.uint64)
    return hashlib.blake2b(sums.tobytes(), digest_size=DIGEST_BYTES).digest()
