"""A peer whose address changed is dialled where it was last seen; the file of that is small and whole."""

from __future__ import annotations

import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from p2p_kit import Node, pair, running, until

from dgn_backends.whole_file import write_whole
from dgnd.identity import Identity
from dgnd.p2p.addresses import Endpoint, parse
from dgnd.p2p.last_seen import PEERS, PER_PEER, LastSeen

QUICK = {"first_delay_s": 0.02, "last_delay_s": 0.2}


def at(port: int) -> Endpoint:
    return Endpoint("ip4", "10.0.0.9", port)


def seen(path: Path) -> dict[str, list[str]]:
    """What the file holds now."""
    found: dict[str, list[str]] = json.loads(path.read_bytes())["peers"] if path.exists() else {}
    return found


@contextmanager
def swallowing_port() -> Iterator[int]:
    """A port that takes connections and says nothing, as an address does behind which nobody is any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("configured", ["nowhere", "swallowing"])
def test_a_peer_that_dialled_in_is_dialled_there_after_a_restart(tmp_path: Path, configured: str) -> None:
    async def main() -> None:
        file = tmp_path / "addresses.json"
        a, b = Node("desk", settings={**QUICK, "last_seen": file}), Node("attic", settings=QUICK)
        async with running(a, b):
            a.network.allow(b.id, "attic", keep_connected=False)
            b.network.allow(a.id, "desk", (a.address,))
            await until(lambda: a.network.is_up(b.id))
            where = b.address.partition("/p2p/")[0]
            await until(lambda: seen(file) == {b.id: [where]})
        # Both begin anew; b does not know where a is, and what a is told of b is not true any more.
        again = Node("desk", a.identity, settings={**QUICK, "last_seen": file})
        still = Node("attic", b.identity, listen=(where,), settings=QUICK)
        with swallowing_port() as port:
            wrong = {"nowhere": (), "swallowing": (f"/ip4/127.0.0.1/tcp/{port}",)}[configured]
            still.network.allow(a.id, "desk")
            again.network.allow(b.id, "attic", wrong)
            async with running(again, still):
                with trio.fail_after(8):  # below the time for a handshake
                    await until(lambda: again.network.is_up(b.id))

    trio.run(main)


def test_an_address_that_somebody_else_has_now_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        file = tmp_path / "addresses.json"
        b, other = Node("attic", settings=QUICK), Node("other", settings=QUICK)
        async with running(b, other):
            there = other.address.partition("/p2p/")[0]
            file.write_text(json.dumps({"format": 1, "peers": {b.id: [there]}}))
            a = Node("desk", settings={**QUICK, "last_seen": file})
            async with running(a):
                a.network.allow(b.id, "attic")
                other.network.allow(a.id, "desk")
                await until(lambda: seen(file) == {})
                assert a.state(b.id) == "unreachable"

    trio.run(main)


def test_a_peer_that_is_not_allowed_any_more_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        file = tmp_path / "addresses.json"
        a, b = Node("desk", settings={"last_seen": file}), Node("attic")
        async with running(a, b):
            await pair(a, b)
            await until(lambda: seen(file) == {b.id: [b.address.partition("/p2p/")[0]]})
            a.network.disallow(b.id)
            await until(lambda: seen(file) == {})

    trio.run(main)


def test_it_is_bounded_and_the_newest_come_first(tmp_path: Path) -> None:
    book = LastSeen(None)
    ids = [Identity.generate().peer_id for _ in range(PEERS + 1)]
    for peer in ids:
        book.note(peer, [at(1)])
    assert [len(book.of(peer)) for peer in ids] == [0, *[1] * PEERS]
    for port in range(2, 20):
        book.note(ids[-1], [at(port)])
    book.note(ids[-1], [at(18)])
    assert book.of(ids[-1]) == [at(18), at(19), at(17), at(16)][:PER_PEER]


GOOD = Identity.generate().peer_id


def text_of(addresses: object, peer: str = GOOD, form: int = 1) -> str:
    return json.dumps({"format": form, "peers": {peer: addresses}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        text_of(["/ip4/10.0.0.1/tcp/4001"], form=2),
        text_of(["/ip4/10.0.0.1/tcp/4001"], peer="me"),
        text_of(["/ip4/10.0.0.1/udp/4001"]),
        text_of(["/dns/evil.example/tcp/4001"]),
        text_of(["/ip4/10.0.0.1/tcp/4001"] * (PER_PEER + 1)),
        text_of("/ip4/10.0.0.1/tcp/4001"),
        " " * (256 << 10) + text_of(["/ip4/10.0.0.1/tcp/4001"]),
    ],
)
def test_what_is_not_such_a_file_is_begun_anew(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "addresses.json"
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "dgnd.p2p"):
        book = LastSeen(file)
    assert book.of(GOOD) == []
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{file}: where peers were last seen is begun anew: ")
    assert len(record.getMessage()) < 400


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 64 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_neither_half_a_file_nor_an_empty_one(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_whole(file, b"old")
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_whole(file, bytes(1000))
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_where_nothing_can_be_written_it_works_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        file = tmp_path / "gone" / "addresses.json"
        a, b, c = Node("desk", settings={"last_seen": file}), Node("attic"), Node("den")
        async with running(a, b, c):
            await pair(a, b)
            await pair(a, c)
            await until(lambda: "can't be kept" in caplog.text)
            assert a.network._last_seen.of(c.id) == [parse(c.address)[0]]
        assert caplog.text.count("can't be kept") == 1  # not at every change

    trio.run(main)
