"""A node's ed25519 identity: the key file, the libp2p peer id that follows from it, signatures.

A peer id is the base58btc text of the identity multihash of the protobuf public key, as the libp2p
specification "Peer Ids and Keys" has it; for ed25519 it contains the key itself, so a signature can be
checked with the id alone. Knows nothing of libp2p's code, of the configuration or of what is signed.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dgnd.errors import BadRequest, ConfigError

#: The name of the key in a state directory.
IDENTITY_FILE = "identity.key"
SEED_BYTES = 32
SIGNATURE_BYTES = 64
#: Multihash of kind identity (0x00), 36 bytes; then protobuf {1: key type ed25519, 2: 32 bytes of key}.
_ID_PREFIX = bytes.fromhex("0024080112" + "20")
_ID_BYTES = len(_ID_PREFIX) + 32
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {letter: value for value, letter in enumerate(_ALPHABET)}
_LONGEST_ID = 64  # base58 of 38 bytes has 52 letters; decoding is quadratic, so look at the length first


@dataclass(frozen=True)
class Identity:
    """The private key of this node."""

    seed: bytes = field(repr=False)
    peer_id: str = field(init=False)
    _key: Ed25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "peer_id", peer_id_of(key.public_key().public_bytes_raw()))

    @classmethod
    def generate(cls) -> Identity:
        """A new one, kept nowhere."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity kept in `path`: 32 bytes of seed, readable by its owner alone.

        Made where there is none; a file that is there is never replaced. Raises ConfigError naming it when
        it can't be used.
        """
        try:
            try:
                return cls(_read_seed(path))
            except FileNotFoundError:
                _create_seed(path)
                return cls(_read_seed(path))  # the winner's, where two processes started at once
        except OSError as error:
            raise ConfigError(
                f"{path}: the node's key can't be read or made: {error.strerror or error}; "
                "start as its owner, or name another state directory"
            ) from error

    def sign(self, data: bytes) -> bytes:
        """The 64-byte ed25519 signature of `data`."""
        return self._key.sign(data)


def peer_id_of(public_key: bytes) -> str:
    """The peer id of a 32-byte ed25519 public key."""
    assert len(public_key) == 32
    return _base58(_ID_PREFIX + public_key)


@lru_cache(maxsize=1024)
def public_key_of(peer_id: str) -> bytes:
    """The 32-byte ed25519 public key that a peer id contains. Raises BadRequest where there is none."""
    shown = peer_id[:_LONGEST_ID] if peer_id.isprintable() else ascii(peer_id[:_LONGEST_ID])
    if not 0 < len(peer_id) <= _LONGEST_ID or not _DIGITS.keys() >= set(peer_id):
        raise BadRequest(f"not a peer id: {shown!r}; one looks like 12D3KooW… and has 52 letters and digits")
    raw = _from_base58(peer_id)
    if len(raw) != _ID_BYTES or not raw.startswith(_ID_PREFIX):
        raise BadRequest(f"not the peer id of an ed25519 key: {shown!r}; one begins with 12D3KooW")
    return raw[len(_ID_PREFIX) :]


def parse_peer_id(text: str) -> str:
    """`text` without surrounding blanks, when it is a peer id. Raises BadRequest when it is not."""
    peer_id = text.strip()
    public_key_of(peer_id)
    return peer_id


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether the owner of `peer_id` signed `data`. Raises BadRequest for a malformed peer id."""
    public_key = public_key_of(peer_id)
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):  # ValueError: 32 bytes that are no point of the curve
        return False
    return True


def _read_seed(path: Path) -> bytes:
    # O_NONBLOCK: a pipe put there must not stop the daemon's start.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path}: the node's key is not a regular file; move it away to get a new one")
        if info.st_mode & 0o077:
            raise ConfigError(
                f"{path}: others may use the node's key (mode {stat.S_IMODE(info.st_mode):04o}); "
                f"chmod 600 {path}"
            )
        seed = os.read(handle, SEED_BYTES + 1)
    finally:
        os.close(handle)
    if len(seed) != SEED_BYTES or not any(seed):
        what = "only zeros" if len(seed) == SEED_BYTES else f"{info.st_size} bytes, not {SEED_BYTES}"
        raise ConfigError(
            f"{path}: the node's key is damaged ({what}); restore it, or move it away to get a new peer id"
        )
    return seed


def _create_seed(path: Path) -> None:
    """Writes a new seed aside and links it to `path`, so that a reader sees all of it or nothing.

    Nothing happens where another process was faster: link never replaces a file.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(handle, secrets.token_bytes(SEED_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(aside, path)
        except FileExistsError:
            return
    finally:
        aside.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _base58(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    letters: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        letters.append(_ALPHABET[digit])
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return _ALPHABET[0] * zeros + "".join(reversed(letters))


def _from_base58(text: str) -> bytes:
    number = 0
    for letter in text:
        number = number * 58 + _DIGITS[letter]
    zeros = len(text) - len(text.lstrip(_ALPHABET[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
