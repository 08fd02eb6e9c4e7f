"""Which token ids may be picked, as a step carries it: a bit for each id, the lowest first, deflated.

Knows nothing of why they may.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from dgnd.errors import ProtocolError

#: Of what is sent; incompressible bits of 320,000 ids still fit, and a frame's header holds it.
MAX_BYTES = 40 << 10


def pack(bits: bytes) -> bytes:
    """For a step. bits: a bit for each id, ids 0 to 7 in the first byte, id 0 its lowest bit."""
    return zlib.compress(bits, 1)


def unpack(data: bytes, vocab: int) -> NDArray[np.bool_]:
    """Bool [vocab]. Raises ProtocolError for what is not made by `pack` for that many ids, or allows none."""
    size = (vocab + 7) // 8
    inflate = zlib.decompressobj()
    try:
        bits = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise ProtocolError(f"step.allowed: {error}") from None
    if len(bits) != size or not inflate.eof:
        raise ProtocolError(f"step.allowed: it is not of {vocab} token ids")
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab, bitorder="little").astype(np.bool_)
    if not allowed.any():
        raise ProtocolError("step.allowed: it allows no token")
    return allowed
