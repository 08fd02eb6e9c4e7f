"""Giving back weights of which ONNX Runtime has made its own copy, in the order that its kernels like.

Of most linear layers it makes one while a session is made, and never looks at what it was given again; then
there would be two of each. It doesn't say for which layers it did. For a mapped file that does not matter:
what is looked at comes back. For all else it has to be tried. Knows nothing of graphs.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

#: Smaller ones are not worth it.
_LEAST_BYTES = 1 << 18
_MADV_DONTNEED = 4

_libc = ctypes.CDLL(None, use_errno=True)


def comes_back(array: npt.NDArray[np.generic]) -> bool:
    """Whether `array` lies in a mapped file, and is the same again when somebody looks after `release`: all
    that is loaded can be written to, but for what is mapped."""
    return not array.flags.writeable


def release(arrays: Iterable[npt.NDArray[np.generic]]) -> bool:
    """Takes the memory of large `arrays`: of mapped files it comes back as it was when somebody looks, of all
    others as zeros. Whether there was anything to take."""
    any_taken = False
    for array in arrays:
        if array.nbytes < _LEAST_BYTES or not array.flags.c_contiguous:
            continue
        start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED) == 0:
            any_taken = True
    return any_taken
