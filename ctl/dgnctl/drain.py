"""`dgnctl drain`."""

from __future__ import annotations

import click

from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json
from dgnd.control.api import Drained, DrainParams


@click.command()
@click.option("--undo", is_flag=True, help="Take sessions again.")
@json_option
@socket_option
@click.pass_context
def drain(ctx: click.Context, undo: bool, as_json: bool) -> None:
    """Hand over the node's sessions, and begin no new ones.

    Returns when nothing is left, or when drain_s of the configuration is over. The node stays up, drained.
    """
    with connect_client(ctx) as client:
        found: Drained = client.call("drain", DrainParams(undo=undo), timeout_s=None)
    if as_json:
        emit_json(found)
    else:
        emit(describe(found))


def describe(found: Drained) -> str:
    """For people, in one line."""
    if found.state != "drained":
        return f"{found.state}: not draining\n"
    left = f"{found.left} session{'' if found.left == 1 else 's'} ended or went elsewhere"
    cut = f", {found.ended} cut off: nobody else has the blocks, or not in time" if found.ended else ""
    return f"drained: {left}{cut}; 'dgnctl drain --undo' takes sessions again\n"
