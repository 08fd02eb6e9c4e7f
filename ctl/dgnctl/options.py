"""Options that several subcommands share, and the connection they lead to."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from dgnd.errors import NoDaemon

if TYPE_CHECKING:
    from dgnd.control.client import ControlClient

_SOCKET_KEY: Final = "dgnctl.socket"
_RETRY_S: Final = 0.1


def _keep_socket(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.meta[_SOCKET_KEY] = value


#: `--socket`, before or after the subcommand; the last one given wins.
socket_option = click.option(
    "--socket", type=click.Path(path_type=Path), metavar="PATH", expose_value=False, callback=_keep_socket,
    help="The control socket of dgnd. Else $DGN_SOCKET, $XDG_RUNTIME_DIR/dgn/dgnd.sock, /run/dgn/dgnd.sock.",
)  # fmt: skip

#: `--json`, given to the command as `as_json`.
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON and nothing else.")


class Finite(click.FloatRange):
    """A number within a range; `nan` and `inf` are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raises click.BadParameter for what is not a number in the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def connect_client(ctx: click.Context, wait_s: float = 0.0) -> ControlClient:
    """A connection to the daemon that options and environment lead to; waits so long for one to start. It
    ends with the command at the latest.

    Raises:
        NoDaemon, StaleSocket, SocketDenied: saying what to do.
    """
    from dgnd.control.client import ControlClient  # `dgnctl --help` does without
    from dgnd.control.socket_path import client_socket

    until = time.monotonic() + wait_s
    while True:
        try:
            return ctx.with_resource(ControlClient(client_socket(ctx.meta.get(_SOCKET_KEY))))
        except NoDaemon:
            if time.monotonic() >= until:
                raise
        time.sleep(_RETRY_S)
