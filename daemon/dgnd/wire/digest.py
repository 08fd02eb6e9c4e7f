"""Prefix digests: 64 keyed bits for every prefix of a session's token ids.

    d(0) = H(key, "")        d(p + 1) = H(key, d(p) ‖ id[p])        H = BLAKE2b with a key, 8 bytes (RFC 7693)

Only the origin, which has the session's key, can make them; hops store and compare. Two prefixes with equal
digests have equal ids, save with probability 2^-64. Knows nothing of hops.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice
from struct import Struct

KEY_BYTES = 32
_LINK = Struct("<Qi")
_DIGEST = Struct("<Q")


class PrefixDigests:
    """The token ids of a session and the digest of each of their prefixes; 12 bytes a position."""

    def __init__(self, key: bytes) -> None:
        """`key`: 16 to 64 secret bytes, made for this session alone."""
        assert 16 <= len(key) <= 64
        self._key = key
        self._ids = array("i")
        self._digests = array("Q", _DIGEST.unpack(blake2b(b"", digest_size=8, key=key).digest()))

    def __len__(self) -> int:
        """The number of token ids."""
        return len(self._ids)

    @property
    def ids(self) -> Sequence[int]:
        """The token ids so far, to read."""
        return self._ids

    def extend(self, ids: Iterable[int]) -> None:
        """Appends token ids (0 to 2^31 - 1)."""
        key, pack, unpack = self._key, _LINK.pack, _DIGEST.unpack
        digest = self._digests[-1]
        for token_id in ids:
            (digest,) = unpack(blake2b(pack(digest, token_id), digest_size=8, key=key).digest())
            self._ids.append(token_id)
            self._digests.append(digest)

    def at(self, position: int) -> int:
        """The digest of the token ids `[0, position)`; position is at most the length."""
        assert 0 <= position <= len(self._ids)
        return int(self._digests[position])

    def truncate(self, position: int) -> None:
        """Forgets all token ids from `position` on."""
        assert 0 <= position <= len(self._ids)
        del self._ids[position:]
        del self._digests[position + 1 :]

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many leading token ids `ids` has in common with what is held."""
        common = 0
        for mine, other in zip(self._ids, islice(ids, len(self._ids)), strict=False):
            if mine != other:
                break
            common += 1
        return common
