"""`dgnctl logs`: what dgnd logged last, from its memory. Knows nothing of journald."""

from __future__ import annotations

import time
from typing import Final

import click
import msgspec

from dgnctl.next_daemon import next_daemon
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, printable
from dgnd.control.api import LOG_LEVELS, LogLine, LogPage, LogsParams
from dgnd.errors import NoDaemon

_LOOK_S: Final = 0.3
_PAGE: Final = 512


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on; Ctrl-C ends it.")
@click.option("--generation", metavar="ID", help="Only lines about this answer; `run --json` tells its id.")
@click.option(
    "--level", type=click.Choice(LOG_LEVELS), default="debug", help="Only lines of this level and above."
)
@click.option(
    "-n", "--lines", type=click.IntRange(0, _PAGE), default=50, show_default=True, help="How many lines."
)
@json_option
@socket_option
@click.pass_context
def logs(
    ctx: click.Context, follow: bool, generation: str | None, level: str, lines: int, as_json: bool
) -> None:
    """Show what dgnd logged last, or follow it."""
    client = connect_client(ctx)
    params = LogsParams(most=lines, level=level, generation=generation)
    while True:
        try:
            page: LogPage = client.call("logs", params)
        except NoDaemon as error:
            if not follow:
                raise
            click.echo(f"dgnctl: {printable(error.message)}; its next start is waited for", err=True)
            client = next_daemon(lambda: connect_client(ctx), error)
            params = msgspec.structs.replace(params, after=None, most=_PAGE)  # all of a new dgnd
            continue
        if page.lost:
            click.echo(f"dgnctl: {page.lost} lines came faster than they were read", err=True)
        for line in page.lines:
            emit_json(line) if as_json else emit(_shown(line))
        if not follow:
            return
        if len(page.lines) < _PAGE:
            time.sleep(_LOOK_S)
        params = msgspec.structs.replace(params, after=page.after, most=_PAGE)


def _shown(line: LogLine) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.time))
    return f"{when} {line.level.upper()} {line.logger}: {line.message}\n"
