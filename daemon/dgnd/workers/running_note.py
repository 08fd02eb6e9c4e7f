"""Which hops' steps a worker computes right now, noted where it can be read after the worker's death.

One shared page of memory without a name: the worker writes it before each batch, its daemon reads it when the
worker has ended. Knows nothing of what a step does.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection

import msgspec

from dgnd.wire.messages import HopKey

_BYTES = 64 << 10  # for more hops than a batch has steps
_LENGTH_BYTES = 4


class RunningNote:
    """The page. Its `fd` is what the other process is given."""

    def __init__(self, fd: int | None = None) -> None:
        """A new one, or that of `fd`, which is then this object's."""
        self.fd = os.memfd_create("dgn-running") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _BYTES)
        self._page = mmap.mmap(self.fd, _BYTES)

    def write(self, keys: Collection[HopKey]) -> None:
        """These hops' steps begin, or with none: they have ended."""
        # The length last: a reader after a death in between finds nothing, not half of it.
        self._page[:_LENGTH_BYTES] = bytes(_LENGTH_BYTES)
        text = msgspec.msgpack.encode(list(keys)) if keys else b""
        if not 0 < len(text) <= _BYTES - _LENGTH_BYTES:
            return
        self._page[_LENGTH_BYTES : _LENGTH_BYTES + len(text)] = text
        self._page[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")

    def read(self) -> frozenset[HopKey]:
        """Whose steps were running. The other process may have written anything: what can't be read counts
        as none."""
        length = int.from_bytes(self._page[:_LENGTH_BYTES], "little")
        try:
            text = self._page[_LENGTH_BYTES : _LENGTH_BYTES + length]
            return frozenset(msgspec.msgpack.decode(text, type=list[HopKey])) if text else frozenset()
        except msgspec.MsgspecError:
            return frozenset()

    def close(self) -> None:
        """Gives the page back."""
        self._page.close()
        os.close(self.fd)
