"""`dgnctl reload`."""

from __future__ import annotations

import click

from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json
from dgnd.control.api import Reloaded


@click.command()
@json_option
@socket_option
@click.pass_context
def reload(ctx: click.Context, as_json: bool) -> None:
    """Have dgnd take its changed configuration.

    It is checked first, and stays as it was where anything is wrong.
    """
    with connect_client(ctx) as client:
        found: Reloaded = client.call("reload")
    if as_json:
        emit_json(found)
    else:
        emit(describe(found))


def describe(found: Reloaded) -> str:
    """For people, a line each."""
    lines = found.changed or ["nothing changed" if not found.restart else "nothing else changed"]
    if found.restart:
        lines = [*lines, f"after a restart of dgnd only: {', '.join(found.restart)}"]
    return "\n".join(lines) + "\n"
