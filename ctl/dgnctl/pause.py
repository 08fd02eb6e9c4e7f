"""`dgnctl pause` and `dgnctl resume`."""

from __future__ import annotations

import click

from dgnctl.duration import seconds_of
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json
from dgnd.control.api import Paused, PauseParams, Resumed


def _read(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else seconds_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("duration", required=False, callback=_read)
@json_option
@socket_option
@click.pass_context
def pause(ctx: click.Context, duration: float | None, as_json: bool) -> None:
    """Compute nothing here for a while, and give the memory back.

    DURATION such as 30m, 2h or 1h30m; without it until 'dgnctl resume'. Sessions that run through this node
    go on with others that have the same blocks; the rest are kept where they were asked for, with the reason.
    """
    with connect_client(ctx) as client:
        found: Paused = client.call("pause", PauseParams(seconds=duration))
    if as_json:
        emit_json(found)
    else:
        emit(describe(found))


def describe(found: Paused) -> str:
    """For people."""
    line = f"{found.state}: {found.why}\n"
    said = [
        (found.left, "answer", "ended or went on elsewhere"),
        (found.idle, "session", "between two answers let go: computed again when they go on"),
        (found.closed, "session", "closed here: who asked goes on with other nodes, or is told why"),
    ]
    parts = [f"{number} {noun}{'s' * (number != 1)} {what}" for number, noun, what in said if number]
    return line + (f"{'; '.join(parts)}\n" if parts else "")


@click.command()
@json_option
@socket_option
@click.pass_context
def resume(ctx: click.Context, as_json: bool) -> None:
    """End a pause: load and serve again."""
    with connect_client(ctx) as client:
        found: Resumed = client.call("resume")
    if as_json:
        emit_json(found)
    else:
        emit(f"{found.state}{'' if found.was_paused else ': it was not paused'}\n")
