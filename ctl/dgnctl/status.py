"""`dgnctl status`."""

from __future__ import annotations

import click

from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, size, table, wrapped
from dgnctl.speeds import speed_table
from dgnd.control.api import MemoryStatus, RouteHop, Status


@click.command()
@json_option
@socket_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the node, its workers and sessions, and what is missing."""
    with connect_client(ctx) as client:
        found: Status = client.call("status")
    if as_json:
        emit_json(found)
    else:
        emit(describe(found))


def describe(found: Status) -> str:
    """For people, in 80 columns."""
    parts = [
        f"{found.name}: {found.state} (dgnd {found.version}, pid {found.pid})\n"
        + (wrapped(found.why, "  ") if found.why else "")
        + f"peer id {found.peer_id}\n"
    ]
    if found.workers:
        rows = [
            (w.model, w.spans, w.state, w.backend, size(w.weights_bytes), size(w.kv_bytes), w.detail)
            for w in found.workers
        ]
        parts.append(table(("MODEL", "BLOCKS", "STATE", "BACKEND", "WEIGHTS", "KV", ""), rows))
    if found.memory.budget:
        parts.append(memory(found.memory))
    if found.missing:
        rows_missing = [(model, span) for model, span in found.missing.items()]
        parts.append(table(("MODEL", "MISSING: NOBODY IN REACH SERVES"), rows_missing))
    if found.sessions:
        rows_sessions = [(s.id[:16], s.model, str(s.position), route(s.route)) for s in found.sessions]
        parts.append(table(("SESSION", "MODEL", "TOKENS", "ROUTE"), rows_sessions))
    if waiting := [(s, s.waiting) for s in found.sessions if s.waiting is not None]:
        rows_waiting = [
            (s.id[:16], f"{w.missing} of {s.model}" if w.missing else w.why, f"{w.left_s:.0f} s")
            for s, w in waiting
        ]
        parts.append(table(("WAITING", "FOR", "AT MOST"), rows_waiting))
    if found.speeds:
        parts.append(speed_table(found.speeds))
    if found.notes:
        parts.append(table(("NOTES",), [(note,) for note in found.notes]))
    return "\n".join(parts)


def memory(found: MemoryStatus) -> str:
    """What holds it, in two lines."""
    mapped = f" ({size(found.weights_mapped)} mapped)" if found.weights_mapped else ""
    held = [
        f"weights {size(found.weights)}{mapped}",
        f"KV {size(found.kv)} of {size(found.kv_limit)}",
        f"journals {size(found.journals)}",
        f"queues {size(found.queues)}",
        f"programs {size(found.programs)}",
    ]
    budget = f"{size(found.used)} of {size(found.budget)} ({found.by}), {size(found.free)} free"
    return wrapped(f"MEMORY  {budget}: {', '.join(held)}", "", "        ")


def route(hops: list[RouteHop]) -> str:
    """A route in one line."""
    return " > ".join(f"{hop.name or hop.peer} {hop.span}" for hop in hops)
