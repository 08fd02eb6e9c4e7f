"""Sessions that are kept between the requests of one conversation, so that only what is new is computed.

Clients send the whole conversation each time. The session that answered its beginning is known by a digest of
that; whether its KV fits is decided by the engine, by comparing token ids, so a wrong guess costs time alone.
Knows nothing of HTTP or of engines.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict

import msgspec

from dgnd.control import api


class KeptSessions:
    """At most `most` sessions on which nothing runs, by what they answered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: OrderedDict[bytes, str] = OrderedDict()  # the one used last at the end

    def take(self, params: api.GenerateParams) -> str | None:
        """The session for a request: one that answered the beginning of its conversation, or a new one; None
        where none is to be kept. Nobody else gets it before `keep`."""
        if not self._most or params.messages is None:
            return None
        for digest in reversed(_beginnings(params)):
            if digest in self._names:
                return self._names.pop(digest)
        return f"http-{secrets.token_hex(8)}"

    def keep(self, name: str, params: api.GenerateParams) -> list[str]:
        """The session has answered this; returns those that are to be forgotten for it."""
        digest = _beginnings(params)[-1]
        before = self._names.pop(digest, None)
        self._names[digest] = name
        gone = [] if before is None else [before]
        while len(self._names) > self._most:
            gone.append(self._names.popitem(last=False)[1])
        return gone


def _beginnings(params: api.GenerateParams) -> list[bytes]:
    """A digest of what was asked before each answer in the conversation, and of all of it."""
    assert params.messages is not None
    so_far = hashlib.blake2b(msgspec.json.encode([params.model, params.tools]), digest_size=16)
    found = []
    for message in params.messages:
        if message.role == "assistant":
            found.append(so_far.digest())
        so_far.update(msgspec.json.encode(message) + b"\n")
    return [*found, so_far.digest()]
