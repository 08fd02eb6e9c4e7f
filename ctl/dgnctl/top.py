"""`dgnctl top`: how the node is, again and again; once, as plain text, where stdout is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from dgnctl.next_daemon import next_daemon
from dgnctl.options import Finite, connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, printable
from dgnctl.top_view import Look, describe, rates
from dgnd.control.api import PeerList, Status
from dgnd.control.client import ControlClient
from dgnd.errors import NoDaemon


@click.command()
@click.option(
    "--interval", type=Finite(0.2, 60.0), default=1.0, show_default=True, metavar="SECONDS",
    help="Between two looks.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Look twice, print the difference, and end.")
@json_option
@socket_option
@click.pass_context
def top(ctx: click.Context, interval: float, once: bool, as_json: bool) -> None:
    """Watch the node: sessions, speed, peers, queues, memory. Ctrl-C ends."""
    with connect_client(ctx) as client:
        before = _look(client)
        if not (as_json or once) and sys.stdout is not None and sys.stdout.isatty():
            _watch(client, lambda: connect_client(ctx), before, interval)
            return
        time.sleep(interval)
        now = _look(client)
    if as_json:
        emit_json({"status": now.status, "peers": now.peers, "tokens_per_s": rates(before, now)})
    else:
        emit(describe(before, now))


def _look(client: ControlClient) -> Look:
    status: Status = client.call("status")
    peers: PeerList = client.call("peers.list")
    return Look(time.monotonic(), status, peers.peers)


def _watch(
    client: ControlClient, connect: Callable[[], ControlClient], before: Look, interval: float
) -> None:
    """On a screen of its own, of which the terminal's one comes back at the end."""
    from rich.console import Console  # a look without a terminal does without
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        now = before
        while True:
            text = describe(before, now, rows=console.height - 1)
            live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)
            time.sleep(interval)
            try:
                before, now = now, _look(client)
            except NoDaemon as error:
                said = f"{printable(error.message)}\nits next start is waited for; Ctrl-C ends\n"
                live.update(Text(said), refresh=True)
                client = next_daemon(connect, error)
