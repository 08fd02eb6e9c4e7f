"""`dgnctl backends`: what is installed, as the daemon sees it, or this program's Python where none runs.

Knows nothing of how a backend is looked at.
"""

from __future__ import annotations

from typing import Final

import click
import msgspec

from dgnctl.child import child_running
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, table
from dgnd.control.api import BackendInfo
from dgnd.errors import InternalError, NoDaemon, SocketDenied

_PATIENCE_S: Final = 5


@click.command()
@json_option
@socket_option
@click.pass_context
def backends(ctx: click.Context, as_json: bool) -> None:
    """List the installed backends, and what is wrong with them.

    Each is imported in a process of its own, which takes seconds. No daemon is needed.
    """
    try:
        with connect_client(ctx) as client:
            found: list[BackendInfo] = client.call("backends.list", timeout_s=None)
    except (NoDaemon, SocketDenied):
        found = look()
    if as_json:
        emit_json(found)
    else:
        emit(describe(found))


def look() -> list[BackendInfo]:
    """The backends of this Python, found by a child, which is gone when this returns."""
    with child_running("dgnd.probe", patience_s=_PATIENCE_S) as child:
        raw, _ = child.communicate()
    if child.returncode != 0:
        raise InternalError(f"the process that looks at backends ended with exit code {child.returncode}")
    return msgspec.json.decode(raw, type=list[BackendInfo])


def describe(found: list[BackendInfo]) -> str:
    """For people, in 80 columns."""
    if not found:
        return "no backend is installed: pip install 'distributed-gpt-node[onnx]'\n"
    rows = [
        (info.name, info.state, f"{info.distribution} {info.version}", ", ".join(info.devices) or "-")
        for info in found
    ]
    parts = [table(("BACKEND", "STATE", "FROM", "DEVICES"), rows)]
    broken = [(info.name, info.reason) for info in found if info.state == "broken"]
    if broken:
        parts.append(table(("BROKEN", "WHY"), broken))
    auto = next((info.name for info in found if info.auto), None)
    parts.append(f'backend = "auto" takes {auto}\n' if auto else "")
    return "\n".join(part for part in parts if part)
