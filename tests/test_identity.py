"""The key file, peer ids, signatures: against libp2p's own peer ids, and with every way to be damaged."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from dgnd.errors import BadRequest, ConfigError
from dgnd.identity import SEED_BYTES, Identity, parse_peer_id, peer_id_of, public_key_of, verify

SEEDS = st.binary(min_size=SEED_BYTES, max_size=SEED_BYTES)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = Identity.load_or_create(path)
    assert path.read_bytes() == made.seed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert _names(tmp_path) == ["identity.key"]
    assert Identity.load_or_create(tmp_path / "other.key").peer_id != made.peer_id


def test_a_wide_umask_does_not_matter(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Identity.load_or_create(tmp_path / "key")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_two_first_starts_at_once_agree(tmp_path: Path) -> None:
    for attempt in range(20):
        path = tmp_path / f"{attempt}.key"
        barrier = threading.Barrier(4)
        found: list[str] = []

        def start(path: Path = path, barrier: threading.Barrier = barrier, found: list[str] = found) -> None:
            barrier.wait()
            found.append(Identity.load_or_create(path).peer_id)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert len(set(found)) == 1
    assert len(_names(tmp_path)) == 20


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "0 bytes, not 32"),
        (b"x" * 31, "31 bytes, not 32"),
        (b"x" * 33, "33 bytes, not 32"),
        (b"x" * 100_000, "100000 bytes, not 32"),
        (bytes(32), "only zeros"),
    ],
)
def test_a_damaged_key_is_an_error_and_stays(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        Identity.load_or_create(path)
    assert str(path) in caught.value.message
    assert expected in caught.value.message
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_an_error(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}.*chmod 600 {path}"):
        Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name in ("pipe", "folder"):
        with pytest.raises(ConfigError, match=f"{name}: the node's key is not a regular file"):
            Identity.load_or_create(tmp_path / name)


def test_a_missing_folder_and_a_dangling_link_are_errors(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "no" / "key", tmp_path / "link"):
        with pytest.raises(ConfigError, match=str(path)):
            Identity.load_or_create(path)
    assert _names(tmp_path) == ["link"]


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_peer_id_is_the_one_that_libp2p_makes(seed: bytes) -> None:
    theirs = create_new_key_pair(seed).public_key
    mine = Identity(seed)
    assert mine.peer_id == ID.from_pubkey(theirs).to_base58()
    assert public_key_of(mine.peer_id) == theirs.to_bytes()


@given(SEEDS, st.binary(max_size=100))
def test_a_signature_is_good_for_its_data_and_signer_alone(seed: bytes, data: bytes) -> None:
    signer = Identity(seed)
    signature = signer.sign(data)
    assert verify(signer.peer_id, data, signature)
    assert not verify(signer.peer_id, data + b"\0", signature)
    assert not verify(Identity.generate().peer_id, data, signature)
    assert not verify(signer.peer_id, data, signature[:-1])
    assert not verify(signer.peer_id, data, signature[:-1] + bytes([signature[-1] ^ 1]))


@given(st.binary(min_size=32, max_size=32))
def test_a_public_key_and_its_peer_id_are_one(public_key: bytes) -> None:
    peer_id = peer_id_of(public_key)
    assert peer_id.startswith("12D3KooW")
    assert public_key_of(peer_id) == public_key
    assert parse_peer_id(f" {peer_id}\n") == peer_id
    assert not verify(peer_id, b"data", bytes(64))


GOOD = Identity(b"s" * 32).peer_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "attic",
        GOOD[:-1],
        GOOD + "1",
        "1" + GOOD,
        GOOD[1:],
        GOOD.replace("K", "0"),
        GOOD[:-1] + "é",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "bafzaajaiaejca5ogyr6m5uvjvhsn2aupwyyqf5ocynqvrkiobrqv6ogyjdd2whue",
        "1" * 52,
        "z" * 52,
        "1" * 10_000_000,
        "line\nbreak",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_is_no_peer_id_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadRequest, match="peer id") as caught:
        parse_peer_id(text)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 250


@given(st.text(max_size=80))
def test_any_text_is_a_peer_id_or_a_bad_request(text: str) -> None:
    try:
        peer_id = parse_peer_id(text)
    except BadRequest:
        return
    assert peer_id_of(public_key_of(peer_id)) == peer_id


def test_the_seed_is_not_shown() -> None:
    assert "seed" not in repr(Identity(b"s" * 32))
