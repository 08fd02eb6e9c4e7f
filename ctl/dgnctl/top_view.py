"""What `dgnctl top` shows, from two looks at a node. Pure: knows nothing of terminals or sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgnctl.output import size, table
from dgnctl.speeds import ms
from dgnd.control.api import PeerInfo, SessionStatus, Status

#: Of a list that is cut, at least so many rows are shown.
_LEAST_ROWS = 2


@dataclass(frozen=True, slots=True)
class Look:
    """How a node was at a time, in seconds of any clock."""

    at: float
    status: Status
    peers: list[PeerInfo]


def rates(before: Look, now: Look) -> dict[str, float]:
    """Tokens generated a second by session, between two looks; one that has just begun here counts 0."""
    passed = now.at - before.at
    were = {(each.origin, each.id): each.generated for each in before.status.sessions}
    return {
        each.id: max(each.generated - were.get((each.origin, each.id), each.generated), 0) / passed
        if passed > 0
        else 0.0
        for each in now.status.sessions
    }


def describe(before: Look, now: Look, rows: int | None = None) -> str:
    """For people, in 80 columns and at most `rows` lines."""
    found, speed = now.status, rates(before, now)
    up = [peer for peer in now.peers if peer.state == "connected"]
    memory = found.memory
    head = [
        f"{found.name}: {found.state}   {sum(speed.values()):.1f} tok/s   {len(found.sessions)} sessions   "
        f"{found.hops} hops   {len(up)} of {len(now.peers)} peers",
        f"memory {size(memory.used)} of {size(memory.budget)}, {size(memory.free)} free: "
        f"KV {size(memory.kv)} of {size(memory.kv_limit)}, queues {size(memory.queues)}",
    ]
    queues = {(figures.span, node.model): figures.queue for node in found.speeds
              if node.peer == found.peer_id for figures in node.figures}  # fmt: skip
    tables = [
        table(
            ("MODEL", "BLOCKS", "STATE", "WEIGHTS", "KV", "QUEUE"),
            [
                (w.model, w.spans, w.state, size(w.weights_bytes), size(w.kv_bytes), _queue(queues, w.model))
                for w in found.workers
            ],
        ),
        table(
            ("SESSION", "MODEL", "FROM", "TOKENS", "TOK/S", "ROUTE"),
            [_session(each, now, speed.get(each.id, 0.0)) for each in _busiest(found.sessions, speed)],
        ),
        table(
            ("PEER", "STATE", "TRIP MS"),
            [(peer.name or peer.id[:16], peer.state, ms(peer.rtt_ms)) for peer in now.peers],
        ),
    ]
    return "\n".join([*head, "", *_fitting([part.splitlines() for part in tables], rows)]) + "\n"


def _busiest(sessions: Sequence[SessionStatus], speed: dict[str, float]) -> list[SessionStatus]:
    return sorted(sessions, key=lambda each: (-speed.get(each.id, 0.0), each.id))


def _queue(queues: dict[tuple[str, str], float], model: str) -> str:
    return f"{max((queue for (_, name), queue in queues.items() if name == model), default=0.0):.1f}"


def _session(each: SessionStatus, now: Look, speed: float) -> tuple[str, ...]:
    names = {peer.id: peer.name for peer in now.peers} | {now.status.peer_id: "here"}
    whence = names.get(each.origin) or each.origin[:8]
    route = ">".join(names.get(hop.peer) or hop.name or hop.peer[:8] for hop in each.route)
    waits = f"waits for {each.waiting.missing or each.waiting.why}" if each.waiting is not None else route
    return each.id[:12], each.model, whence, str(each.position), f"{speed:.1f}", waits


def _fitting(tables: Sequence[Sequence[str]], rows: int | None) -> list[str]:
    """The tables one below the other; each one's end is cut where all of them have no room, and said so."""
    room = None if rows is None else max((rows - 3 - 2 * len(tables)) // len(tables), _LEAST_ROWS)
    lines: list[str] = []
    for head, *rest in (part for part in tables if len(part) > 1):
        shown = (
            rest
            if room is None or len(rest) <= room
            else [*rest[: room - 1], f"… {len(rest) - room + 1} more"]
        )
        lines += [head, *shown, ""]
    return lines[:-1]
