"""What a message may hold: sizes, counts, ranges. Checked on what arrives and on what leaves; by dgnd alone
where it speaks with its workers.

Three checks, in the order in which bytes arrive: lengths of a frame (before its header is taken), the
message and its tensor's dtype and shape (before the payload is taken), and the payload's values; what is of
one kind of message alone is in `dgnd.wire.checks`. Every field of every message is bounded here by its type
and name, so a new field is never unbounded. Knows nothing of bytes on a wire, of sessions or of who sent
what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from dgnd.errors import ProtocolError
from dgnd.wire import allowed
from dgnd.wire.messages import (
    HopKey,
    Manifest,
    Sampling,
)


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: they are part of a cache's key
class Limits:
    """Bounds of one connection. Sizes in bytes, texts in characters."""

    header_bytes: int = 64 << 10
    large_header_bytes: int = 1 << 20  #: of the messages in LARGE_HEADERS
    payload_bytes: int = 64 << 20
    rank: int = 4
    dim: int = 1 << 20
    step_positions: int = 4096  #: of one StepFrame
    position: int = (1 << 31) - 1  #: the highest that a position, length or token id may be
    text: int = 512
    long_text: int = 8192  #: of the fields in LONG_TEXTS
    items: int = 1024  #: of one tuple or dict
    manifest_entries: int = 8192


DEFAULT_LIMITS = Limits()
#: Tags of the only messages whose header may be large.
LARGE_HEADERS = frozenset({"hello", "offers", "manifest"})
LONG_TEXTS = frozenset({"message", "reason", "path", "span", "spans"})
POSITIONS = frozenset(
    {"start", "count", "stop", "position", "length", "truncate_to", "answer_start",
     "max_positions", "kv_positions", "max_chunk", "token_id", "n_blocks", "credits"}
)  # fmt: skip
U64_FIELDS = frozenset({"digest_start", "digest_end", "nonce", "seed"})
U64_MAX = (1 << 64) - 1
I64_MAX = (1 << 63) - 1
TICKET_BYTES = 16 << 10
#: Parts of a message that are the same in every frame of an answer.
_REPEATED = frozenset({HopKey, Sampling})


def tag_of(message: msgspec.Struct) -> str:
    """The word that names the message's kind on the wire."""
    return _tag(type(message))


@lru_cache(maxsize=256)  # msgspec makes a new object each time it is asked
def _tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def check_lengths(header_len: int, payload_len: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuses a frame by its prefix alone. Raises ProtocolError."""
    if not 0 < header_len <= limits.large_header_bytes:
        raise ProtocolError(f"a frame's header of {header_len} bytes; at most {limits.large_header_bytes}")
    if payload_len > limits.payload_bytes:
        raise ProtocolError(f"a frame's payload of {payload_len} bytes; at most {limits.payload_bytes}")


def check_header_size(tag: str, header_len: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuses a large header of a message that has no need for one. Raises ProtocolError."""
    if header_len > limits.header_bytes and tag not in LARGE_HEADERS:
        raise ProtocolError(f"{tag}: a header of {header_len} bytes; at most {limits.header_bytes}")


def check_fields(value: msgspec.Struct, where: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuses a struct of which any field, by its type and name, is out of bounds. Raises ProtocolError."""
    for name, bound in _bounds(type(value), limits):
        item = getattr(value, name)
        # Every frame comes by here: what is plainly good is let through before any text is made.
        kind = type(item)
        if kind is int:
            if 0 <= item <= bound:
                continue
        elif item is None or kind is bool:
            continue
        elif kind in _REPEATED:
            _check_repeated(item, where, name, limits)
            continue
        elif kind is str and len(item) <= min(limits.text, limits.long_text):
            continue
        _check_value(item, name, f"{where}.{name}", limits)


@lru_cache(maxsize=512)
def _bounds(kind: type[msgspec.Struct], limits: Limits) -> tuple[tuple[str, int], ...]:
    """The fields of `kind`, each with the highest number that it may hold if it holds one."""
    return tuple((name, _highest(name, limits)) for name in kind.__struct_fields__)


def _highest(name: str, limits: Limits) -> int:
    return limits.position if name in POSITIONS else U64_MAX if name in U64_FIELDS else I64_MAX


@lru_cache(maxsize=1024)  # the same values come with every frame of an answer
def _check_repeated(value: HopKey | Sampling, where: str, name: str, limits: Limits) -> None:
    check_fields(value, f"{where}.{name}", limits)


def _check_value(value: object, name: str, where: str, limits: Limits) -> None:
    match value:
        case None | bool():
            return
        case int():
            high = _highest(name, limits)
            if not 0 <= value <= high:
                raise ProtocolError(f"{where}: {value} is not within 0 to {high}")
        case float():
            if not math.isfinite(value):
                raise ProtocolError(f"{where}: {value} is not a finite number")
        case str():
            high = limits.long_text if name in LONG_TEXTS else limits.text
            if len(value) > high:
                raise ProtocolError(f"{where}: {len(value)} characters; at most {high}")
        case bytes():
            high = allowed.MAX_BYTES if name == "allowed" else TICKET_BYTES
            if len(value) > high:
                raise ProtocolError(f"{where}: {len(value)} bytes; at most {high}")
        case tuple() | list():
            if len(value) > limits.items:
                raise ProtocolError(f"{where}: {len(value)} items; at most {limits.items}")
            for item in value:
                _check_value(item, name, where, limits)
        case dict():
            _check_dict(value, where, limits)
        case msgspec.Struct():
            check_fields(value, where, limits)
        case _:
            raise ProtocolError(f"{where}: a {type(value).__name__}")


def _check_dict(value: dict[object, object], where: str, limits: Limits) -> None:
    """A manifest's digests, or an error's data, whose numbers may be anything finite."""
    most = limits.manifest_entries if where == f"{Manifest.__struct_config__.tag}.tensors" else limits.items
    if len(value) > most:
        raise ProtocolError(f"{where}: {len(value)} entries; at most {most}")
    for key, item in value.items():
        _check_value(key, "", f"{where}: a key", limits)
        for part in item if isinstance(item, list) else (item,):
            if not isinstance(part, int):
                _check_value(part, "message", f"{where}: a value", limits)
