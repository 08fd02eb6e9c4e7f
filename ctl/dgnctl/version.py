"""`dgnctl version`."""

from __future__ import annotations

import click

from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json
from dgnd.control.api import Status
from dgnd.errors import DgnError


@click.command()
@json_option
@socket_option
@click.pass_context
def version(ctx: click.Context, as_json: bool) -> None:
    """Show the versions of dgnctl and dgnd."""
    from importlib.metadata import version as installed  # takes longer to import than the rest of dgnctl

    mine = installed("distributed-gpt-node")
    daemon: str | None = None
    why = ""
    try:
        with connect_client(ctx) as client:
            found: Status = client.call("status")
        daemon = found.version
    except DgnError as error:
        why = error.message
    if as_json:
        emit_json({"dgnctl": mine, "dgnd": daemon})
    else:
        emit(f"dgnctl {mine}\ndgnd   {daemon or why}\n")
