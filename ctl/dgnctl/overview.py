"""`dgnctl` without a command: how things are, and the command that is useful next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from dgnctl.options import connect_client
from dgnctl.output import emit, printable, wrapped
from dgnd.control.api import ModelInfo, PeerList, Status
from dgnd.errors import DaemonSilent, DgnError, NoDaemon, StaleSocket

SYSTEM_CONFIG = Path("/etc/dgn/dgn.toml")
_UNITS = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))
_HELP = "dgnctl --help"
_WIDTH = 80
_MOST_COMMAND = 40  #: characters; what a longer one is for stands below it


class Next(NamedTuple):
    """A command, and what for."""

    command: str
    why: str


def overview(ctx: click.Context) -> int:
    """Says it; returns the exit code, which is that of the error where there is no daemon to ask."""
    try:
        with connect_client(ctx) as client:
            status: Status = client.call("status")
            models: list[ModelInfo] = client.call("models.list")
            peers: PeerList = client.call("peers.list")
    except DgnError as error:
        emit(_shown(printable(error.message), _without_daemon(error)))
        return error.exit_code
    state = f"{status.name}: {status.state}" + (f": {status.why}" if status.why else "")
    emit(_shown(state, _with_daemon(status, models, peers)))
    return 0


def _without_daemon(error: DgnError) -> list[Next]:
    if isinstance(error, DaemonSilent):
        return [Next("journalctl -u dgnd", "what it did last, where it is a service")]
    if not isinstance(error, NoDaemon):
        return []
    unit = any((folder / "dgnd.service").is_file() for folder in _UNITS)
    if unit:
        return [
            Next("systemctl start dgnd", "start the service"),
            Next("journalctl -u dgnd", "why it is not running"),
        ]
    if SYSTEM_CONFIG.is_file() or isinstance(error, StaleSocket):
        return [Next(f"dgnd --config {SYSTEM_CONFIG}", "start it in this terminal")]
    return [
        Next("dgnctl setup", "answer a few questions, and have a configuration"),
        Next("dgnd --config FILE", "start dgnd with one that you have"),
    ]


def _with_daemon(status: Status, models: Sequence[ModelInfo], peers: PeerList) -> list[Next]:
    found: list[Next] = []
    if not models:
        found.append(Next("dgnctl reload", "once [models.NAME] and [[blocks]] are in dgnd's configuration"))
    match status.state:
        case "paused":
            found.append(Next("dgnctl resume", "end the pause"))
        case "draining" | "drained":
            found.append(Next("dgnctl drain --undo", "begin new answers again"))
        case "starting" | "loading":
            found.append(Next("dgnctl status", "how far loading is"))
    if any(worker.state in ("failed", "restarting") for worker in status.workers):
        found.append(Next("dgnctl status", "why a worker does not run"))
        found.append(Next("dgnctl backends", "what can compute here"))
    if status.missing:
        found.append(Next("dgnctl map", "who should serve what is missing: " + _missing(status)))
    if any(peer.state != "connected" for peer in peers.peers):
        found.append(Next("dgnctl peers", "why some are not connected"))
    if peers.refused:
        found.append(Next("dgnctl peers --refused", "who was turned away, and how to let them in"))
    ready = [model.name for model in models if model.name not in status.missing]
    if ready and status.state in ("ready", "degraded", "loading"):
        one = f" --model {ready[0]}" if len(models) > 1 else ""
        wait = " --wait 120" if status.state == "loading" else ""
        found.append(Next(f"dgnctl chat{one}{wait}", "chat with it"))
    return list(dict.fromkeys(found))


def _missing(status: Status) -> str:
    return ", ".join(f"{units} of {model}" for model, units in status.missing.items())


def _shown(state: str, steps: Sequence[Next]) -> str:
    steps = [*steps, Next(_HELP, "all commands")]
    room = max(len(step.command) for step in steps if len(step.command) <= _MOST_COMMAND)
    return wrapped(state) + "\nnext:\n" + "".join(_line(step, room) for step in steps)


def _line(step: Next, room: int) -> str:
    line = f"  {step.command:<{room}}  {step.why}\n"
    return line if len(line) <= _WIDTH else f"  {step.command}\n      {step.why}\n"
