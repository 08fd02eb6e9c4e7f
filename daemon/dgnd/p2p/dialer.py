"""Dialling peers, again and again where asked, and saying in one line why it did not work.

Knows no frames.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence

import trio

from dgnd.errors import IdentityMismatch, PeerError, PeerGone, PeerRefused
from dgnd.p2p import addresses
from dgnd.p2p.addresses import Endpoint, endpoint_of
from dgnd.p2p.host import Connection, Host
from dgnd.p2p.last_seen import LastSeen
from dgnd.p2p.link import DUPLICATE, Link
from dgnd.p2p.settings import Known, NetworkSettings

log = logging.getLogger("dgnd.p2p")

_GROWTH = 1.7
_OTHER_S = 2.0
#: Before the next address of a peer is tried too: one that is gone swallows what is sent to it for many
#: seconds.
_STAGGER_S = 0.5


class Backoff:
    """Growing delays in seconds, each within a quarter of its value at random, so that nodes don't dial in
    step.
    """

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._next_s = first_s

    def next(self) -> float:
        """The delay before the next attempt."""
        delay = self._next_s
        self._next_s = min(delay * _GROWTH, self._last_s)
        return delay * random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """It worked: begin again with the shortest."""
        self._next_s = self._first_s


def refused_line(name: str, local_host: str, listening: list[Endpoint], me: str) -> str:
    """What to do when `name` hung up on us: we were reached from it at `local_host`, and listen on
    `listening`.
    """
    kind = "ip6" if ":" in local_host else "ip4"
    ports = [
        bound.port
        for bound in listening
        if bound.kind == kind and bound.host in (local_host, "0.0.0.0", "::")
    ]
    if local_host and ports:
        address = str(endpoint_of(local_host, ports[0]))
    else:
        address = str(listening[0]) if listening else "/ip4/THIS-NODE/tcp/PORT"
    return (
        f"{name} closed the connection: it probably doesn't list this node; "
        f"run there: dgnctl connect {address}/p2p/{me}"
    )


class Dialer:
    """Keeps one task for each peer that is to be kept connected.

    `links` are the connections in use, by peer; `start` makes a link of a new one and runs it; `last_seen`
    knows of further addresses than the peers' own.
    """

    def __init__(
        self,
        host: Host,
        settings: NetworkSettings,
        me: str,
        links: Mapping[str, Link],
        start: Callable[[Connection], Link],
        last_seen: LastSeen,
    ) -> None:
        self._host = host
        self._settings = settings
        self._me = me
        self._links = links
        self._start = start
        self._last_seen = last_seen
        self._keepers: dict[str, trio.CancelScope] = {}
        self._listening: list[Endpoint] = []
        self._nursery: trio.Nursery | None = None

    def started(self, nursery: trio.Nursery, listening: list[Endpoint]) -> None:
        """From now on peers can be dialled, by tasks in `nursery`; this node listens on `listening`."""
        self._nursery, self._listening = nursery, listening

    def stopped(self) -> None:
        """The nursery has ended."""
        self._nursery = None
        self._keepers.clear()

    def keep(self, known: Known) -> None:
        """Starts keeping the peer connected, or starts again with what is known of it now."""
        self.leave(known.id)
        if self._nursery is not None and known.keep_connected and not known.held:
            scope = self._keepers[known.id] = trio.CancelScope()
            self._nursery.start_soon(self._keep, known, scope)

    def leave(self, peer_id: str) -> None:
        """Stops dialling the peer."""
        keeper = self._keepers.pop(peer_id, None)
        if keeper is not None:
            keeper.cancel()

    async def _keep(self, known: Known, scope: trio.CancelScope) -> None:
        backoff = Backoff(self._settings.first_delay_s, self._settings.last_delay_s)
        with scope:
            while True:
                link = self._links.get(known.id)
                if link is not None:
                    begun = trio.current_time()
                    await link.ended.wait()
                    if link.was_up and trio.current_time() - begun > self._settings.gone_s:
                        backoff.reset()
                elif known.addrs or self._last_seen.of(known.id):
                    try:
                        await self.dial(
                            known,
                            [addresses.parse(text)[0] for text in known.addrs],
                            self._last_seen.of(known.id),
                        )
                        continue
                    except PeerError as error:
                        log.debug("%s: %s", known.name, error.message)
                else:
                    known.detail = "waiting for it to connect: its addresses are not known here"
                await trio.sleep(backoff.next())

    async def dial(self, known: Known, endpoints: list[Endpoint], seen_at: Sequence[Endpoint] = ()) -> None:
        """Connects by the first endpoint that works, in their order, those where it was only `seen_at` last;
        returns after Hello.

        One that does not answer soon is not waited for before the next is tried. Raises the PeerError that
        says most: of a peer that answered before that of an address that did not.
        """
        errors: dict[Endpoint, PeerError] = {}
        connected = False

        async def attempt(endpoint: Endpoint, over: trio.Event) -> None:
            nonlocal connected
            try:
                await self._dial_endpoint(known, endpoint)
                connected = True
            except PeerError as error:
                errors[endpoint] = error
                connected = connected or self._is_up(known)
                if isinstance(error, IdentityMismatch) and endpoint in seen_at:
                    self._last_seen.forget(known.id, endpoint)  # somebody else has the address now
            over.set()
            if connected:
                nursery.cancel_scope.cancel()

        every = dict.fromkeys((*endpoints, *seen_at))
        async with trio.open_nursery() as nursery:
            for endpoint in every:
                over = trio.Event()
                nursery.start_soon(attempt, endpoint, over)
                with trio.move_on_after(_STAGGER_S):
                    await over.wait()
        if connected:
            return
        most: PeerError = PeerGone(f"{known.name} has no address", peer=known.id)
        for endpoint in endpoints or every:
            if type(most) is PeerGone:
                most = errors[endpoint]
        known.state = "refused" if isinstance(most, PeerRefused) else "unreachable"
        known.detail = most.message
        raise most

    async def _dial_endpoint(self, known: Known, endpoint: Endpoint) -> None:
        try:
            connection = await self._host.dial(endpoint, known.id, self._settings.connect_s)
        except PeerRefused as error:
            local = str(error.data.get("local", ""))
            raise PeerRefused(
                refused_line(known.name, local, self._listening, self._me), peer=known.id
            ) from error
        link = self._start(connection)
        await link.settled.wait()
        if link.error is not None and DUPLICATE in link.error.message and not self._is_up(known):
            with trio.move_on_after(_OTHER_S):  # the peer prefers another connection, which is being greeted
                await known.came_up.wait()
        if link.error is not None and not self._is_up(known):
            raise type(link.error)(f"{known.name} at {endpoint}: {link.error.message}", peer=known.id)

    def _is_up(self, known: Known) -> bool:
        link = self._links.get(known.id)
        return link is not None and link.is_up
