"""Sessions and hops as the operator sees them. Only words; decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import trio

from dgnd.control import api
from dgnd.hosting.server import HopServer
from dgnd.origin.answering import route_of
from dgnd.origin.engine import Engine
from dgnd.peers.names import Names
from dgnd.sessions.driver import Waits


def session_statuses(names: Names, engine: Engine, hops: HopServer) -> Iterator[api.SessionStatus]:
    """This node's own sessions, then the hops that it computes for others."""
    for item in engine.conversations:
        session = item.driver.session
        yield api.SessionStatus(
            id=session.id,
            model=item.model.name,
            origin=names.me,
            position=len(session.tokens),
            route_number=session.route_number,
            route=route_of(session, names.of),
            waiting=_waiting(item.driver.waits),
            generated=session.generated,
        )
    for key, hop in hops.hops.items():
        if key.origin != names.me:
            yield api.SessionStatus(
                id=key.session,
                model=hop.ticket.model,
                origin=key.origin,
                position=hop.fence.length,
                route_number=hop.ticket.route,
                route=[api.RouteHop(peer=names.me, name=names.my_name, span=str(hop.span))],
                generated=hop.generated,
            )


def relay_notes(names: Names, engine: Engine) -> list[str]:
    """Edges of routes that go through this node, since their ends don't know each other."""
    notes: dict[str, None] = {}  # each once, in order
    for item in engine.conversations:
        for hop, following in itertools.pairwise(item.driver.session.route):
            if hop.relayed:
                a, b = names.of(hop.peer), names.of(following.peer)
                notes[f"relayed: {a} and {b} don't know each other, so their edge goes through here"] = None
    return list(notes)


def _waiting(waits: Waits | None) -> api.WaitStatus | None:
    if waits is None:
        return None
    left_s = max(waits.deadline - trio.current_time(), 0.0)
    return api.WaitStatus(str(waits.error.data.get("missing", "")), waits.error.message, round(left_s, 1))
