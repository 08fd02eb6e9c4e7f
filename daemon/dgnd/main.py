"""The command line of the daemon: `dgnd --config F` runs, `dgnd init` makes the identity, `dgnd check` plans.

Knows nothing of what running means; that is imported only when it runs.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from dgn_backends.errors import DgnError
from dgnd.config import load_config
from dgnd.config.example import configuration_for, write_configuration
from dgnd.errors import ConfigError
from dgnd.identity import IDENTITY_FILE, Identity

DEFAULT_CONFIG = Path("/etc/dgn/dgn.toml")
DEFAULT_STATE_DIR = Path("/var/lib/dgn")

_PATH = click.Path(path_type=Path)
_config_option = click.option(
    "--config", "config", type=_PATH, help=f"The configuration; else {DEFAULT_CONFIG}."
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@_config_option
@click.option("--socket", type=_PATH, help="The control socket, instead of the configured one.")
@click.version_option(importlib.metadata.version("distributed-gpt-node"), prog_name="dgnd")
@click.pass_context
def cli(context: click.Context, config: Path | None, socket: Path | None) -> None:
    """Serves this node's blocks to its peers and answers dgnctl, in the foreground; logs to stderr."""
    context.obj = config
    if context.invoked_subcommand is None:
        gc.disable()  # imports leave no garbage, and looking for it takes a sixth of them
        from dgnd.app import run

        try:
            run(load_config(_named(config)), socket)
        except OSError:  # a fault, to be seen whole; those of other commands are of their stdout
            traceback.print_exc()
            sys.exit(1)


class _Folder(click.Path):
    """A directory that is named: an empty text is a variable that was not set, not the current one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, after that."""
        if value == "":
            self.fail("it is empty; name a directory", param, ctx)
        return super().convert(value, param, ctx)


@cli.command()
@click.option(
    "--state-dir",
    type=_Folder(path_type=Path),
    help=f"Where the key is kept; else the configured one, {DEFAULT_STATE_DIR}.",
)
@_config_option
@click.pass_obj
def init(group_config: Path | None, config: Path | None, state_dir: Path | None) -> None:
    """Makes this node's identity, if it has none yet, and prints its peer id.

    Where no configuration is named, one with comments is written beside it, if there is none.
    """
    named = config or group_config
    if state_dir is None:
        state_dir = load_config(named).config.node.state_dir if named else DEFAULT_STATE_DIR
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{state_dir}: the state directory can't be made: {error.strerror or error}; name another one "
            "with --state-dir"
        ) from None
    peer_id = Identity.load_or_create(state_dir / IDENTITY_FILE).peer_id
    click.echo(peer_id)
    if named is None:
        path = state_dir / DEFAULT_CONFIG.name
        if write_configuration(path, configuration_for(state_dir.absolute(), peer_id)):
            click.echo(f"wrote {path}; edit it, then: dgnd check --config {path}", err=True)


@cli.command()
@_config_option
@click.pass_obj
def check(group_config: Path | None, config: Path | None) -> None:
    """Checks a configuration and its models, and prints who holds what, without loading anything."""
    from dgnd.upkeep.plan import format_plan, make_plan

    path = _named(config or group_config)
    plans = make_plan(load_config(path))
    click.echo(format_plan(plans))
    absent = [f"{plan.path / file}" for plan in plans for file in plan.absent]
    if absent:
        raise ConfigError(
            f"{path}: this node needs files that are not here: {', '.join(absent)}; "
            "copy them there, or give their blocks to another node"
        )


def _named(config: Path | None) -> Path:
    if config is None and not DEFAULT_CONFIG.exists():
        raise ConfigError(f"there is no {DEFAULT_CONFIG}; name a configuration with --config FILE")
    return config or DEFAULT_CONFIG


def main() -> None:
    """The entry point: runs the command; an error of ours is one line on stderr and its exit code."""
    try:
        cli(prog_name="dgnd")
    except DgnError as error:
        prefix = "" if "line" in error.data else "dgnd: "  # file:line:column stands first, for editors
        click.echo(prefix + error.message, err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # stdout itself, such as a file on a full disk
        with open(os.devnull, "wb") as null:  # noqa: PTH123 - a device; the interpreter flushes once more
            os.dup2(null.fileno(), 1)
        click.echo(f"dgnd: stdout can't be written: {error.strerror or error}", err=True)
        sys.exit(1)
