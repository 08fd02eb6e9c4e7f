"""`dgnctl system install`, `uninstall` and `status`: dgnd as a service, for the Python that runs dgnctl."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from dgnctl.options import json_option
from dgnctl.output import emit, emit_json, table
from dgnctl.system.manager import Manager
from dgnctl.system.places import UNITS, Places
from dgnctl.system.reach import hindrance, in_a_home, places_of_python
from dgnctl.system.units import MARK, files, interpreter_of
from dgnd.errors import BadRequest

_SHOWN: Final = ("ActiveState", "SubState", "StatusText", "NRestarts", "UnitFileState")
_MOST_TEXT: Final = 1 << 20
_USER_CONFIG: Final = "# See docs/config.md and dgn.toml.example.\n[node]\nstate_dir = {state}\n"


class _Folder(click.Path):
    """A directory that is named: an empty text is a variable that was not set, not the current one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, after that."""
        if value == "":
            self.fail("it is empty; name a directory, such as /", param, ctx)
        return super().convert(value, param, ctx)


_user_option = click.option("--user", is_flag=True, help="For yourself alone, without root.")
_root_option = click.option(
    "--root", type=_Folder(path_type=Path, file_okay=False), default=Path("/"), metavar="DIR",
    help="Another system's /, such as an image; nothing is run there.",
)  # fmt: skip
_dry_option = click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")


@dataclass(frozen=True, slots=True)
class UnitState:
    """One unit, as `status` shows it. by: dgnctl, package, somebody, or empty where there is none."""

    name: str
    path: str
    by: str
    python: str
    active: str
    status: str
    restarts: str
    enabled: str


@click.group()
def system() -> None:
    """Have systemd run dgnd: install, uninstall, status."""


@system.command()
@_user_option
@_root_option
@_dry_option
def install(user: bool, root: Path, dry_run: bool) -> None:
    """Write the units of dgnd for the Python that runs this.

    Units that a package brought, or that somebody else wrote, are left alone.
    """
    places = _places(user, root)
    _refuse_others(places)
    here = places_of_python() if root == Path("/") and not user else []
    why = hindrance(here)
    if why:
        raise BadRequest(
            f"the service runs as the user dgn, who can't use this Python: {why}; install dgn elsewhere, "
            "such as in /opt/dgn, or use --user"
        )
    found = files(places, sys.executable, home=in_a_home(here))
    if user and not _is_there(places.under_root(places.config)):
        found[places.config] = _USER_CONFIG.format(state=_toml(str(places.state)))
    commands = _after_install(places)
    if dry_run:
        for path, text in found.items():
            emit(f"# {places.under_root(path)}\n{text}\n")
        emit("".join(f"$ {shlex.join(command)}\n" for command in commands))
        return
    for path, text in found.items():
        _write(places.under_root(path), text, user=user)
        emit(f"wrote {places.under_root(path)}\n")
    _run(commands)
    emit(_next_step(places))


@system.command()
@_user_option
@_root_option
@_dry_option
def uninstall(user: bool, root: Path, dry_run: bool) -> None:
    """Stop the service and remove what install wrote; the configuration and the node's key stay."""
    places = _places(user, root)
    candidates = [places.under_root(path) for path in files(places, sys.executable, home=False)]
    ours = [path for path in candidates if _by(path) == "dgnctl"]
    if not ours:
        raise BadRequest(
            f"nothing that 'dgnctl system install' wrote is in {places.under_root(places.units)}; "
            "'dgnctl system status' says whose the units are"
        )
    manager = Manager(user)
    asked = root == Path("/") and manager.runs
    before = [manager.systemctl("disable", "--now", *reversed(UNITS))] if asked else []
    after = [manager.systemctl("daemon-reload")] if asked else []
    if dry_run:
        emit("".join(f"$ {shlex.join(command)}\n" for command in before))
        emit("".join(f"would remove {path}\n" for path in ours))
        emit("".join(f"$ {shlex.join(command)}\n" for command in after))
        return
    _run(before)
    for path in ours:
        try:
            path.unlink()
        except OSError as error:
            raise BadRequest(f"{path}: can't be removed: {error.strerror or error}") from None
        emit(f"removed {path}\n")
    _run(after)
    kept = [str(path) for path in map(places.under_root, (places.config, places.state)) if _is_there(path)]
    emit(f"left: {', '.join(kept)}\n" if kept else "")


@system.command()
@_user_option
@_root_option
@json_option
def status(user: bool, root: Path, as_json: bool) -> None:
    """Show which units are there, whose they are, and how the service is."""
    places = _places(user, root)
    manager = Manager(user)
    found = [_unit(places, manager, name, ask=root == Path("/")) for name in UNITS]
    if as_json:
        emit_json([asdict(unit) for unit in found])
        return
    rows = [
        (unit.name, unit.by or "not installed", unit.active or "-", unit.enabled or "-", unit.status)
        for unit in found
    ]
    emit(table(("UNIT", "FROM", "IS", "AT BOOT", ""), rows))
    service = found[0]
    if service.by:
        starts = f"starts {service.python}" if service.python else "starts nothing: it is masked, or no unit"
        emit(f"\n{service.path} {starts}\n")
        if service.restarts not in ("", "0"):
            emit(f"started again {service.restarts} times; see: journalctl -u dgnd\n")
    else:
        emit("\nto install it: dgnctl system install" + (" --user\n" if user else "\n"))


def _unit(places: Places, manager: Manager, name: str, *, ask: bool) -> UnitState:
    own = places.under_root(places.units / name)
    path = next((each for each in (own, *places.packaged) if each.name == name and _is_there(each)), own)
    said = manager.properties(name, _SHOWN) if ask else {}
    active = said.get("ActiveState", "")
    return UnitState(
        name=name,
        path=str(path),
        by=_by(path) if path == own else "package",
        python=interpreter_of(_text(path)) if name == UNITS[0] else "",
        active=f"{active} ({said['SubState']})" if active and said.get("SubState") else active,
        status=said.get("StatusText", ""),
        restarts=said.get("NRestarts", ""),
        enabled=said.get("UnitFileState", ""),
    )


def _places(user: bool, root: Path) -> Places:
    return Places.of_user(root.absolute()) if user else Places.of_system(root.absolute())


def _refuse_others(places: Places) -> None:
    for path in places.packaged:
        if _is_there(path):
            raise BadRequest(
                f"{path} is there: a package brought it, and the units written here would hide it; use it, "
                "or remove the package first"
            )
    for path in files(places, sys.executable, home=False):
        if _by(places.under_root(path)) == "somebody":
            raise BadRequest(
                f"{places.under_root(path)} was not written by 'dgnctl system install'; move it away first"
            )


def _by(path: Path) -> str:
    if not _is_there(path):
        return ""
    return "dgnctl" if _text(path).startswith(MARK) else "somebody"


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BadRequest(f"{path}: can't be looked at: {error.strerror or error}") from None
    return True


def _text(path: Path) -> str:
    """What is in it, as far as it is a file with text: a pipe is not waited for."""
    try:
        if not path.is_file():
            return ""
        with path.open(errors="replace") as file:
            return file.read(_MOST_TEXT)
    except OSError:
        return ""


def _write(path: Path, text: str, *, user: bool) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.chmod(0o644)
        os.replace(temporary, path)  # noqa: PTH105 - in the same directory
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cure = "; run it as root, or with --user" if isinstance(error, PermissionError) and not user else ""
        raise BadRequest(f"{path}: can't be written: {error.strerror or error}{cure}") from None


def _after_install(places: Places) -> list[list[str]]:
    if places.root != Path("/"):
        return []
    manager = Manager(places.user)
    reload = [manager.systemctl("daemon-reload")] if manager.runs else []
    if places.user:
        return reload
    return [["systemd-sysusers", "dgn.conf"], ["systemd-tmpfiles", "--create", "dgn.conf"], *reload]


def _run(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        emit(f"$ {shlex.join(command)}\n")
        Manager(False).do(command)


def _next_step(places: Places) -> str:
    if places.root != Path("/"):
        return ""
    user = "--user " if places.user else ""
    lines = [] if places.config.exists() else [f"write {places.config}; docs/config.md says how"]
    lines.append(f"systemctl {user}enable --now dgnd")
    if places.user:
        lines.append("loginctl enable-linger  # to go on when you log out")
    else:
        lines.append("usermod -aG dgn USER  # who may use dgnctl")
    return "next:\n" + "".join(f"  {line}\n" for line in lines)


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
