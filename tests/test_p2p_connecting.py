"""Dialling, refusals, reconnecting: what is kept, what is said, and that each failure has its own line."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio
from p2p_kit import Node, child, pair, running, until

from dgnd.errors import BadRequest, IdentityMismatch, ListenFailed, NotFound, PeerGone, PeerRefused
from dgnd.identity import Identity
from dgnd.p2p.addresses import Endpoint
from dgnd.p2p.dialer import Backoff, refused_line
from dgnd.p2p.settings import NetworkSettings
from dgnd.wire.messages import EndTurn, Frame, HopKey

FRAME = Frame(EndTurn(key=HopKey("o", "s", 1), branch=0))
QUICK = {"connect_s": 0.5, "handshake_s": 1.0, "first_delay_s": 0.02, "last_delay_s": 0.2}


@contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_operator_s_connect_lets_the_peer_in_and_keeps_it() -> None:
    async def main() -> None:
        a, b = Node("desk", settings=QUICK), Node("attic", settings=QUICK)
        b.network.allow(a.id, "desk", keep_connected=False)
        bogus = f"/ip4/127.0.0.1/tcp/1/p2p/{b.id}"
        async with running(a, b):
            with pytest.raises(PeerGone):
                await a.network.connect(bogus)
            assert await a.network.connect(b.address) == b.id
            (known,) = a.network.peers()
            assert b.address.startswith(
                f"/ip4/127.0.0.1/tcp/{known.name.split(':')[1]}/"
            )  # not the bogus one
            assert await a.network.connect(bogus) == b.id  # connected already: nothing is dialled or kept
            assert len(a.network.peers()[0].addrs) == 1
            assert a.network.is_up(b.id)
            assert await a.network.connect(b.address) == b.id  # once more changes nothing
            assert len(a.ups) == 1
            b.network._links[a.id].connection.mux.close_now()
            await until(lambda: len(a.ups) == 2)
            # Disconnected, it is neither dialled nor let in, until it is connected again.
            await a.network.disconnect(b.id)
            await until(lambda: len(b.downs) == 2)
            assert b.downs[1][1] == "it said goodbye: disconnected by the operator"
            b.network.allow(a.id, "desk", (a.address,))
            await until(lambda: b.state(a.id) == "refused")
            assert a.state(b.id) == "unreachable"
            assert "disconnected here by the operator" in a.detail(b.id)
            await a.network.connect(b.address)
            assert a.network.is_up(b.id)
            with pytest.raises(NotFound):
                await a.network.disconnect(Identity.generate().peer_id)

    trio.run(main)


def test_a_stranger_is_refused_before_hello_and_told_what_to_do() -> None:
    async def main() -> None:
        a, b = Node("desk", settings=QUICK), Node("attic", settings=QUICK)
        async with running(a, b):
            a.network.allow(b.id, "attic", (b.address,))
            await until(lambda: a.state(b.id) == "refused")
            line = (
                "attic closed the connection: it probably doesn't list this node; "
                f"run there: dgnctl connect {a.address}"
            )
            assert a.detail(b.id) == line
            with pytest.raises(PeerRefused) as caught:
                await a.network.connect(b.address)
            assert caught.value.message == line
            (record,) = b.network.refusals()
            assert (record.id, record.reason) == (a.id, "not in this node's configuration")
            assert record.addr.startswith("/ip4/127.0.0.1/tcp/")
            assert record.when.endswith("+00:00")
            assert a.ups == b.ups == []
            # Doing what the line says helps, and the record goes.
            await b.network.connect(a.address)
            assert b.network.refusals() == []
            await until(lambda: a.network.is_up(b.id))

    trio.run(main)


def test_the_last_twenty_refused_are_kept() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node):
            strangers = [Node(f"s{n}") for n in range(23)]
            for stranger in strangers:
                async with running(stranger):
                    with pytest.raises(PeerRefused):
                        await stranger.network.connect(node.address)
            await until(lambda: node.network.refusals()[-1].id == strangers[-1].id)
            assert [record.id for record in node.network.refusals()] == [s.id for s in strangers[-20:]]

    trio.run(main)


def test_disallowed_it_is_closed_and_refused() -> None:
    async def main() -> None:
        a, b = Node("desk", settings=QUICK), Node("attic", settings=QUICK)
        async with running(a, b):
            await pair(a, b)
            b.network.disallow(a.id)
            assert not b.network.is_up(a.id)
            with pytest.raises(PeerGone):
                await b.network.send(a.id, FRAME)
            await until(lambda: a.state(b.id) == "refused")
            assert b.network.peers() == []
            assert len(b.ups) == len(b.downs) == 1

    trio.run(main)


def test_each_failure_to_connect_has_its_own_line() -> None:
    async def main() -> None:
        a, b = Node("desk", settings=QUICK), Node("attic")
        someone = Identity.generate().peer_id
        with silent_port() as silent:
            async with running(a, b):
                where, loopback = b.address.partition("/p2p/")[0], "/ip4/127.0.0.1/tcp"
                nowhere = f"/dns4/no-such-host.invalid/tcp/1/p2p/{someone}"
                for address, error, line in (
                    (f"{loopback}/{free_port()}/p2p/{someone}", PeerGone, "refused: nothing listens"),
                    (f"{loopback}/{silent}/p2p/{someone}", PeerGone, "did not finish the handshake in 1 s"),
                    (f"{where}/p2p/{someone}", IdentityMismatch, f"expected peer {someone} but {b.id} "),
                    (nowhere, PeerGone, "can't be resolved|no answer within"),
                    (where, BadRequest, "add /p2p/PEER-ID"),
                    (a.address, BadRequest, "this node itself"),
                    ("/ip4/127.0.0.1/udp/1/quic-v1", BadRequest, "can be used|not a multiaddress"),
                    ("192.168.1.20:4001", BadRequest, "not a multiaddress"),
                    ("/ip4/1.2.3.4/tcp/99999", BadRequest, "not a multiaddress"),
                    (f"{where}/p2p/garbage", BadRequest, "not a (multiaddress|peer id)"),
                ):  # fmt: skip
                    with pytest.raises(error, match=line) as caught:
                        await a.network.connect(address)
                    assert "\n" not in caught.value.message
                # A wrong id is not let in for having been typed once; who did not answer is.
                assert len(a.network.peers()) == 1
                assert b.ups == []

    trio.run(main)


def test_a_machine_that_does_not_answer_is_a_timeout() -> None:
    async def main() -> None:
        a = Node("desk", settings=QUICK)
        with socket.socket() as full:  # a listener whose queue is full drops what comes
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(3)]
            try:
                for filler in fillers:
                    filler.setblocking(False)
                    filler.connect_ex(("127.0.0.1", port))
                async with running(a):
                    with pytest.raises(
                        PeerGone, match=r"no answer within 0\.5 s: is the machine on, and does its firewall"
                    ):
                        await a.network.connect(
                            f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}"
                        )
            finally:
                for filler in fillers:
                    filler.close()

    trio.run(main)


def test_something_else_on_the_port() -> None:
    async def main() -> None:
        a = Node("desk", settings=QUICK)

        async def http(stream: trio.SocketStream) -> None:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async with running(a), trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, http, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            with pytest.raises(PeerGone, match="not as a libp2p node"):
                await a.network.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}")
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)])
def test_both_dial_at_once_and_agree_on_one(seeds: tuple[int, int]) -> None:
    async def main() -> None:
        for _ in range(10):
            a, b = (Node(str(seed), Identity(bytes([seed]) * 32), settings=QUICK) for seed in seeds)
            async with running(a, b):
                a.network.allow(b.id, "b", (b.address,))
                b.network.allow(a.id, "a", (a.address,))
                await until(lambda a=a, b=b: a.network.is_up(b.id) and b.network.is_up(a.id))
                await a.network.send(b.id, FRAME)
                await b.network.send(a.id, FRAME)
                await until(lambda a=a, b=b: a.frames and b.frames)
                await trio.sleep(0.05)
                assert (len(a.ups), len(b.ups), a.downs, b.downs) == (1, 1, [], [])
                ours, theirs = a.network._links[b.id].connection, b.network._links[a.id].connection
                assert ours.local == theirs.remote
                await until(lambda a=a, b=b: a.network._open == {b.id: 1} and b.network._open == {a.id: 1})

    trio.run(main)


def test_two_operators_connect_at_the_same_time() -> None:
    async def main() -> None:
        for _ in range(10):
            a, b = Node("desk", settings=QUICK), Node("attic", settings=QUICK)
            async with running(a, b):
                a.network.allow(b.id, "attic", keep_connected=False)
                b.network.allow(a.id, "desk", keep_connected=False)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(a.network.connect, b.address)
                    nursery.start_soon(b.network.connect, a.address)
                assert a.network.is_up(b.id)
                assert b.network.is_up(a.id)
                assert (a.downs, b.downs) == ([], [])

    trio.run(main)


@pytest.mark.parametrize("parent_is_smaller", [True, False])
def test_a_peer_that_is_killed_and_restarted_is_back_without_help(parent_is_smaller: bool) -> None:
    async def main() -> None:
        node = Node("desk")
        with child(node.id) as other:
            while (node.id < other.identity.peer_id) != parent_is_smaller:
                node = Node("desk")
            other.kill()
            other._arguments[2] = node.id
            other.start()
            async with running(node):
                node.network.allow(other.identity.peer_id, "other", (other.address,))
                await until(lambda: node.network.is_up(other.identity.peer_id))
                for n in range(2, 4):
                    other.kill()
                    await until(lambda n=n: len(node.downs) == n - 1)
                    await trio.to_thread.run_sync(other.start)
                    # The delay has grown while it started, on a busy machine up to the longest.
                    await until(lambda n=n: len(node.ups) == n, 3 * 1.25 * NetworkSettings().last_delay_s)
                await node.network.send(other.identity.peer_id, FRAME)
                await until(lambda: node.frames)

    trio.run(main)


@pytest.mark.parametrize("a_is_smaller", [True, False])
def test_a_new_connection_replaces_one_whose_other_end_is_lost(a_is_smaller: bool) -> None:
    """As after a power cut: no packet says that the old connection is over."""

    async def main() -> None:
        late = {"gone_s": 120.0}  # long after the deadline below
        a, b = Node("desk", settings=late), Node("attic", settings=late)
        while (a.id < b.id) != a_is_smaller:
            b = Node("attic", settings=late)
        async with running(a):
            async with trio.open_nursery() as nursery:
                await nursery.start(b.network.run)
                await pair(b, a)
                old = b.network._links[a.id].connection.mux
                # The old end goes on existing, but answers nothing any more.
                old.tcp.close_now = lambda: None  # type: ignore[method-assign]
                kept = old.tcp._stream
                old._session._raw.stream.read = never  # type: ignore[attr-defined]
                nursery.cancel_scope.cancel()
            a.downs.clear()
            again = Node("attic", b.identity)
            async with running(again):
                with trio.fail_after(30):
                    await again.network.connect(a.address)
                assert again.network.is_up(a.id)
                await until(lambda: a.network.is_up(b.id))
            await kept.aclose()

    trio.run(main)


async def never(n: int | None = None) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


def test_names_and_ipv6() -> None:
    async def main() -> None:
        b = Node("attic", listen=("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"))
        async with running(b):
            four, six = b.network.listen_addrs()
            assert six.startswith("/ip6/::1/tcp/")
            port = four.split("/")[4]
            for address in (
                f"/dns4/localhost/tcp/{port}/p2p/{b.id}",
                f"/dns/localhost/tcp/{port}/p2p/{b.id}",
                six,
            ):
                a = Node("desk")
                b.network.allow(a.id, "desk", keep_connected=False)
                async with running(a):
                    await a.network.connect(address)
                    assert a.network.is_up(b.id)

    trio.run(main)


def test_a_busy_port_is_said_and_a_left_one_binds_at_once() -> None:
    async def main() -> None:
        first = Node("desk")
        async with running(first):
            where = first.address.partition("/p2p/")[0]
            second = Node("again", listen=(where,))
            with pytest.raises(ListenFailed, match=f"can't listen on {where}: another process has this port"):
                await second.network.run()
            peer = Node("attic")
            await_peer = running(peer)
            async with await_peer:
                await pair(peer, first)
        async with running(second):
            assert second.address.startswith(where)
        elsewhere = Node("elsewhere", listen=("/ip4/203.0.113.7/tcp/0",))
        with pytest.raises(ListenFailed, match="this machine has no such address"):
            await elsewhere.network.run()

    trio.run(main)


def test_what_can_not_be_allowed() -> None:
    node, other = Node("desk"), Identity.generate().peer_id
    with pytest.raises(BadRequest, match="this node itself"):
        node.network.allow(node.id, "self")
    with pytest.raises(BadRequest, match="names another peer"):
        node.network.allow(other, "other", (f"/ip4/127.0.0.1/tcp/1/p2p/{node.id}",))


def test_delays_grow_to_the_last_and_begin_again() -> None:
    backoff = Backoff(0.2, 15.0)
    delays = [backoff.next() for _ in range(40)]
    assert 0.15 <= delays[0] <= 0.25
    assert all(0.75 * 15 <= delay <= 1.25 * 15 for delay in delays[15:])
    assert len({round(delay, 6) for delay in delays[20:]}) > 10
    backoff.reset()
    assert backoff.next() <= 0.25


@pytest.mark.parametrize(
    ("local", "listening", "said"),
    [
        ("10.0.0.5", [Endpoint("ip4", "0.0.0.0", 4001)], "/ip4/10.0.0.5/tcp/4001/p2p/ME"),
        ("10.0.0.5", [Endpoint("ip6", "::", 1), Endpoint("ip4", "0.0.0.0", 2)], "/ip4/10.0.0.5/tcp/2/p2p/ME"),
        ("fd00::5", [Endpoint("ip4", "0.0.0.0", 1), Endpoint("ip6", "::", 3)], "/ip6/fd00::5/tcp/3/p2p/ME"),
        ("10.0.0.5", [], "/ip4/THIS-NODE/tcp/PORT/p2p/ME"),
    ],
)  # fmt: skip
def test_the_line_for_the_refused_names_the_address_that_works(
    local: str, listening: list[Endpoint], said: str
) -> None:
    assert refused_line("attic", local, listening, "ME").endswith(f"run there: dgnctl connect {said}")
