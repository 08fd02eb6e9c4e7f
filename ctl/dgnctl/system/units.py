"""The text of the units for one interpreter, made from those of `packaging/systemd`. Pure but for reading
these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dgnctl.system.places import Places
from dgnd.errors import NotFound

#: The first line of every file that this writes; what lacks it is somebody else's.
MARK: Final = "# Written by 'dgnctl system install'; 'dgnctl system uninstall' removes it.\n"
_PACKAGED_COMMAND: Final = "/usr/bin/dgnd --config /etc/dgn/dgn.toml --socket /run/dgn/dgnd.sock"
#: What only the machine's service manager can do.
_SYSTEM_ONLY: Final = (
    "After=", "Wants=", "User=", "Group=", "StateDirectory", "ConfigurationDirectory=", "Protect", "Private",
    "CapabilityBoundingSet=", "AmbientCapabilities=", "DevicePolicy=", "RemoveIPC=", "KeyringMode=",
    "SocketUser=", "SocketGroup=", "RuntimeDirectoryMode=", "DirectoryMode=",
)  # fmt: skip


def masters() -> Path:
    """The directory of the units as a package has them: installed beside this module, or in a checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "masters", here.parents[3] / "packaging/systemd"):
        if (folder / "dgnd.service").is_file():
            return folder
    raise NotFound(
        f"the units are missing from this installation: no {here.parent / 'masters'}; install dgn again"
    )


def files(places: Places, python: str, *, home: bool) -> dict[Path, str]:
    """What is to be written, by place without the root. `python`: the interpreter that has dgn; `home`: it
    lies in a home directory."""
    source = masters()
    service = (source / "dgnd.service").read_text()
    socket = (source / "dgnd.socket").read_text()
    command = f"{quoted(python)} -P -m dgnd"
    if places.user:
        command += f" --config {quoted(str(places.config))} --socket %t/dgn/dgnd.sock"
    else:
        command += f" --config {places.config} --socket /run/dgn/dgnd.sock"
    service = service.replace(_PACKAGED_COMMAND, command)
    if places.user:
        service, socket = _of_user(service), _of_user(socket).replace("SocketMode=0660", "SocketMode=0600")
    if home:
        service = service.replace("ProtectHome=yes", "ProtectHome=read-only")
    found = {places.units / "dgnd.service": service, places.units / "dgnd.socket": socket}
    if not places.user:
        found[Path("/etc/sysusers.d/dgn.conf")] = (source / "dgn.sysusers").read_text()
        found[Path("/etc/tmpfiles.d/dgn.conf")] = (source / "dgn.tmpfiles").read_text()
    return {path: MARK + text for path, text in found.items()}


def _of_user(text: str) -> str:
    """Without what only the machine's service manager can do, and without comments, which speak of that."""
    lines = [line for line in text.splitlines() if not line.startswith((*_SYSTEM_ONLY, "#"))]
    changed = "\n".join([*lines, ""])
    return changed.replace("ListenStream=/run/", "ListenStream=%t/").replace(
        "multi-user.target", "default.target"
    )


def quoted(word: str) -> str:
    """`word` as one word of a command in a unit."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(char in escaped for char in " \t;'\"\\") else escaped


def interpreter_of(service: str) -> str:
    """The program that a unit's text starts, as far as it can be read; empty where there is none."""
    for line in service.splitlines():
        if line.startswith("ExecStart="):
            command = line.removeprefix("ExecStart=")
            word = command[1:].split('"')[0] if command.startswith('"') else command.split(" ")[0]
            return word.replace("%%", "%").replace("$$", "$")
    return ""
