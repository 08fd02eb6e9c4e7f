"""The command line of dgnctl: finds the subcommand, and turns every failure into one line and an exit code.

Subcommands are imported when they are used, so that `--help` stays quick. Knows nothing of what they do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

import click

from dgnctl.options import socket_option
from dgnctl.output import StdoutClosed, discard_stdout, emit_json, printable
from dgnd.errors import BadRequest, Cancelled, DgnError

EXIT_STDOUT_CLOSED: Final = 141

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Each subcommand: where it is, and its line in the help.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "chat": ("dgnctl.chat:chat", "Chat with the model in this terminal."),
    "chats": ("dgnctl.chats:chats", "List, show, remove or export kept conversations."),
    "run": ("dgnctl.run:run", "Answer one prompt and end."),
    "status": ("dgnctl.status:status", "Show the node, its workers and sessions, and what is missing."),
    "top": ("dgnctl.top:top", "Watch the node: sessions, speed, peers, queues, memory."),
    "peers": ("dgnctl.peers:peers", "List the peers, or with --refused who was turned away."),
    "connect": ("dgnctl.peers:connect", "Dial a peer, and let it be used and served until dgnd ends."),
    "disconnect": ("dgnctl.peers:disconnect", "Close the connection to a peer."),
    "map": ("dgnctl.models:show_map", "Show which peer serves which blocks."),
    "models": ("dgnctl.models:models", "List the configured models."),
    "backends": ("dgnctl.backends:backends", "List the installed backends, and what is wrong with them."),
    "cache": ("dgnctl.cache:cache", "List or forget what sessions keep in memory."),
    "logs": ("dgnctl.logs:logs", "Show what dgnd logged last, or follow it."),
    "drain": ("dgnctl.drain:drain", "Hand over the node's sessions, and begin no new ones."),
    "pause": ("dgnctl.pause:pause", "Compute nothing here for a while, and give the memory back."),
    "resume": ("dgnctl.pause:resume", "End a pause: load and serve again."),
    "reload": ("dgnctl.reload:reload", "Have dgnd take its changed configuration."),
    "setup": ("dgnctl.setup:setup", "Ask a few questions, and write a configuration."),
    "system": ("dgnctl.system.commands:system", "Have systemd run dgnd: install, uninstall, status."),
    "bench": ("dgnctl.bench:bench", "Measure how fast a model runs on this machine."),
    "version": ("dgnctl.version:version", "Show the versions of dgnctl and dgnd."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the one asked for."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Of the commands from the table, importing none; and the options."""
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=line)
            for name, (_, line) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # takes longer to import than the rest of dgnctl

        click.echo(f"dgnctl {version('distributed-gpt-node')}")
        ctx.exit()


@click.group(
    cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version of dgnctl and exit.",
)
@socket_option
@click.pass_context
def cli(ctx: click.Context) -> int | None:
    """Talks to dgnd, the daemon that runs one language model together with its peers.

    Without a command: how things are, and what to do next.
    """
    if ctx.invoked_subcommand is not None:
        return None
    from dgnctl.overview import overview  # `dgnctl --help` does without

    return overview(ctx)


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(args: Sequence[str]) -> int:
    """Runs one command line; returns the exit code, having said what failed."""
    arguments = list(args)
    as_json = "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
    try:
        try:
            code = cli.main(args=arguments, prog_name="dgnctl", standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
            return int(code or 0)
        except click.ClickException as error:
            if not as_json:
                error.show()
                return error.exit_code
            return report(BadRequest(error.format_message()), as_json)
        except (click.Abort, KeyboardInterrupt):
            return report(Cancelled("interrupted"), as_json)
        except DgnError as error:
            return report(error, as_json)
    except (StdoutClosed, BrokenPipeError):
        discard_stdout()
        return EXIT_STDOUT_CLOSED
    except OSError as error:  # stdout itself, such as a file on a full disk
        discard_stdout()
        click.echo(f"dgnctl: stdout can't be written: {error.strerror or error}", err=True)
        return 1


def report(error: DgnError, as_json: bool) -> int:
    """Says what failed, in one line; returns the exit code."""
    if as_json:
        data = {**error.data, "retryable": error.retryable}
        fields = {"code": error.code, "kind": error.kind, "message": error.message, "data": data}
        emit_json({"error": fields})
    else:
        click.echo(f"dgnctl: {printable(error.message)}", err=True)
    return error.exit_code
