"""`dgnctl cache list` and `dgnctl cache clear`."""

from __future__ import annotations

import click

from dgnctl.completion import session_names
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, size, table
from dgnd.control.api import CacheClearParams, CacheClearResult, CacheEntry


@click.group()
@socket_option
def cache() -> None:
    """List or forget what sessions keep in memory."""


@cache.command("list")
@json_option
@socket_option
@click.pass_context
def list_entries(ctx: click.Context, as_json: bool) -> None:
    """List the sessions that have KV on this node."""
    with connect_client(ctx) as client:
        found: list[CacheEntry] = client.call("cache.list")
    if as_json:
        emit_json(found)
    elif not found:
        emit("no session has anything in memory\n")
    else:
        rows = [
            (
                e.session,
                e.model,
                e.role,
                str(e.positions),
                size(e.kv_bytes),
                f"{e.idle_s:.0f} s",
                e.origin[-8:],
            )
            for e in found
        ]
        emit(table(("SESSION", "MODEL", "ROLE", "TOKENS", "KV", "IDLE", "ORIGIN"), rows))


@cache.command()
@click.argument("session", required=False, shell_complete=session_names)
@json_option
@socket_option
@click.pass_context
def clear(ctx: click.Context, session: str | None, as_json: bool) -> None:
    """Forget SESSION, or without it all sessions that this node is the origin of."""
    with connect_client(ctx) as client:
        found: CacheClearResult = client.call("cache.clear", CacheClearParams(session=session))
    if as_json:
        emit_json(found)
    else:
        left = f", {found.busy} left: still answering" if found.busy else ""
        emit(f"{found.cleared} session{'' if found.cleared == 1 else 's'} forgotten{left}\n")
