"""Writing at once what a socket takes, and the rest in order when it takes more."""

import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from dgnd.eager import EagerWriter, write_now

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def fill(sock: socket.socket) -> int:
    """Until it takes no more; how many bytes it took."""
    taken = 0
    while sent := write_now(sock.fileno(), b"x" * 65536):
        taken += sent
    return taken


async def read_all(sock: socket.socket, size: int) -> bytes:
    """The next `size` bytes."""
    data = bytearray()
    with trio.fail_after(30):
        while len(data) < size:
            await trio.lowlevel.wait_readable(sock)
            data += sock.recv(size - len(data))
    return bytes(data)


def test_what_fits_is_there_without_any_task(pair: Pair) -> None:
    ours, theirs = pair
    EagerWriter(ours).write([b"one ", b"two"])
    assert theirs.recv(100) == b"one two"


def test_a_full_socket_takes_nothing_and_says_so(pair: Pair) -> None:
    assert fill(pair[0]) > 0
    assert write_now(pair[0].fileno(), b"more") == 0


def test_what_does_not_fit_follows_in_order_and_nothing_overtakes_it(pair: Pair) -> None:
    ours, theirs = pair

    async def main() -> None:
        writer = EagerWriter(ours)
        first = fill(ours)
        pieces = [bytes([number]) * 100_000 for number in range(20)]
        for piece in pieces[:10]:
            writer.write([piece])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await trio.testing.wait_all_tasks_blocked()
            assert await read_all(theirs, first) == b"x" * first  # now there is room for some of it
            for piece in pieces[10:]:  # written while the task may be in the middle of a piece
                writer.write([piece[:7], piece[7:]])
            wanted = b"".join(pieces)
            assert await read_all(theirs, len(wanted)) == wanted
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("is_full", [False, True])
def test_a_peer_that_is_gone_is_no_error_and_nothing_is_kept(pair: Pair, is_full: bool) -> None:
    ours, theirs = pair

    async def main() -> None:
        writer = EagerWriter(ours)
        if is_full:
            fill(ours)
            writer.write([b"waits"])
        theirs.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await trio.testing.wait_all_tasks_blocked()
            writer.write([b"y" * 100_000] * 3)
            nursery.cancel_scope.cancel()
        assert not writer._rest

    trio.run(main)
