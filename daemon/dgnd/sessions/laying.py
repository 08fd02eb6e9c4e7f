"""Lays a session's route: opens hops, gives those that stay other neighbours, and fills those that are new
from what the hop before them kept.

Where nothing stays, that is the opening of a session; where a hop died, it is its replacement:

    1. Every hop gets a ticket of the new route. One that stays drops what is under way and says how far it
       is.
    2. What all that stay have in common stays; it ends where a frame ended.
    3. Each gap of new hops is filled up to there: its predecessor sends again what it journalled, chunk by
       chunk; before the first hop, the origin does so from the token ids. The last new hop of a gap keeps
       the results to itself, as the hop after it has them.
    4. The steps after that are sent on a new branch, which truncates whoever has more. Hops that were about
       to leave are closed now: had it failed, they could have gone on.

Knows nothing of how a route is chosen.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dgnd.errors import PeerError
from dgnd.routing.exactness import Way
from dgnd.routing.search import Edge, Hop
from dgnd.sessions.driver import MAX_CHUNK, SessionDriver
from dgnd.sessions.patience import Patience
from dgnd.sessions.session import RouteHop
from dgnd.wire.messages import Credit, Frame, HopOpened, Replay, Ticket
from dgnd.wire.ticket import sign_ticket

OPEN_TIMEOUT_S = 10.0
#: Without any progress of a replay for this long it has failed.
FILL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a ticket says of the model."""

    name: str
    config_digest: str
    manifest_digest: str | None
    context: int
    wire: str  #: how hidden states go from node to node in sessions that begin now


async def lay_route(
    driver: SessionDriver,
    line: Sequence[Hop | RouteHop],
    edges: Sequence[Edge],
    ways: Sequence[Way | None],
    model: ModelIdentity,
) -> None:
    """Opens `line`, of which every `RouteHop` is a hop of the session that stays; `ways`: how each computes.

    Raises the first error that a hop reports, or PeerError after OPEN_TIMEOUT_S. What was opened is known to
    the driver then, so that the next attempt can build on it or close it.
    """
    relayed = [edge.relayed for edge in edges] + [False]
    ids = driver.host.hop_ids
    route = tuple(
        RouteHop(hop.hop if isinstance(hop, RouteHop) else next(ids), hop.peer, hop.span, relay, way)
        for hop, relay, way in zip(line, relayed, ways, strict=True)
    )
    stay = {hop.hop for hop in line if isinstance(hop, RouteHop)}
    driver.begin_route(route)
    driver.session.fix_wire(model.wire)
    for index, hop in enumerate(route):
        ticket = _ticket(driver, model, index, stay)
        driver.host.post(hop.peer, Frame(sign_ticket(ticket, driver.host.identity)))
    opened = await _all_opened(driver)
    session = driver.session
    driver.note_rooms(opened)
    window = min(hop.credits for hop in opened.values())
    common = session.common(opened[hop].length for hop in stay)
    if common:
        ranges = session.fill_ranges(common, MAX_CHUNK)
        for gap in _gaps(route, stay):
            await _fill(driver, gap, ranges, window)
    fresh = {unit for hop in route if hop.hop not in stay for unit in hop.span.units()}
    driver.end_route(common, fresh, window)


def _ticket(driver: SessionDriver, model: ModelIdentity, index: int, stay: set[int]) -> Ticket:
    me, session = driver.host.identity.peer_id, driver.session
    route = session.route
    hop, last = route[index], index == len(route) - 1
    return Ticket(
        key=session.key(hop.hop),
        recipient=hop.peer,
        previous=me if index == 0 or route[index - 1].relayed else route[index - 1].peer,
        next=me if last or hop.relayed else route[index + 1].peer,
        next_hop=None if last else route[index + 1].hop,
        model=model.name,
        config_digest=model.config_digest,
        manifest_digest=model.manifest_digest,
        span=str(hop.span),
        route=session.route_number,
        branch=session.branch,
        max_positions=model.context,
        max_chunk=MAX_CHUNK,
        nonce=secrets.token_bytes(16),
        lease_s=driver.lease_s,
        wire=session.wire_after(hop),
        catch_up=hop.hop not in stay and not last and route[index + 1].hop in stay,
        generation=session.generation,
    )


async def _all_opened(driver: SessionDriver) -> dict[int, HopOpened]:
    """What every hop said, by hop id, once all of them have."""
    session = driver.session
    waiting = {hop.hop: hop for hop in session.route}
    opened: dict[int, HopOpened] = {}
    patience = Patience(OPEN_TIMEOUT_S)
    while waiting and (message := await driver.next_message(patience)) is not None:
        if not isinstance(message, HopOpened) or message.route != session.route_number:
            continue
        hop = waiting.pop(message.key.hop, None)
        if hop is None:
            continue
        if message.credits < 1:
            raise PeerError(f"{driver.place(hop)} opened the session without room for a step")
        opened[message.key.hop] = message
        patience.renew()
    if waiting:
        silent = driver.give_up_on(list(waiting.values()))  # alive, but too slow
        raise PeerError(f"no answer from {silent} for {OPEN_TIMEOUT_S:.0f} s when opening the session")
    return opened


def _gaps(route: Sequence[RouteHop], stay: set[int]) -> list[tuple[RouteHop | None, RouteHop]]:
    """For each run of new hops: the hop before it, None for the origin; and its last hop."""
    gaps = []
    before: RouteHop | None = None
    for index, hop in enumerate(route):
        if hop.hop in stay:
            before = hop
        elif index + 1 == len(route) or route[index + 1].hop in stay:
            gaps.append((before, hop))
    return gaps


async def _fill(
    driver: SessionDriver,
    gap: tuple[RouteHop | None, RouteHop],
    ranges: Sequence[tuple[int, int]],
    window: int,
) -> None:
    """Has `ranges` of positions computed by the new hops of a gap, at most `window` of them at a time."""
    before, last = gap
    session = driver.session
    waiting, under_way = deque(ranges), deque[int]()
    patience = Patience(FILL_TIMEOUT_S)
    while waiting or under_way:
        while waiting and len(under_way) < window:
            start, stop = waiting.popleft()
            under_way.append(stop)
            if before is None:
                driver.host.post(session.route[0].peer, session.fill_step(start, stop))
            else:
                replay = Replay(
                    key=session.key(before.hop),
                    branch=session.branch,
                    route=session.route_number,
                    start=start,
                    stop=stop,
                    alone=start < session.alone_until,
                )
                driver.host.post(before.peer, Frame(replay))
        message = await driver.next_message(patience)
        if isinstance(message, Credit) and message.key.hop == last.hop:
            while under_way and under_way[0] <= message.stop:
                under_way.popleft()
                patience.renew()
        elif message is None:
            where = driver.give_up_on([hop for hop in session.route if hop is not before])
            raise PeerError(f"no progress for {FILL_TIMEOUT_S:.0f} s of a replay to {where}")
