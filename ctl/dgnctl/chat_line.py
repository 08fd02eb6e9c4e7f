"""What a line typed in `dgnctl chat` means: a command, or something said to the model. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dgnctl.multiaddress import is_multiaddress


@dataclass(frozen=True)
class Command:
    """One command: what comes after it, whether it may be left out, and what it does in a few words."""

    argument: str
    about: str
    optional: bool = False
    example: str = ""


#: Every command by the name that follows its slash, in the order of the help.
COMMANDS: Final[dict[str, Command]] = {
    "help": Command("", "show this list"),
    "exit": Command("", "leave; Ctrl-D does too"),
    "peers": Command("", "list the peers"),
    "connect": Command("ADDR", "dial a peer at /ip4/.../tcp/.../p2p/ID"),
    "clear": Command("", "forget the conversation and start anew"),
    "save": Command("FILE", "write the conversation; as token ids for .csv", example="talk.json"),
    "load": Command("FILE", "go on with what /save wrote", example="talk.json"),
    "regenerate": Command("", "another answer to the last message"),
    "edit": Command("TEXT", "change the last message and ask again", optional=True),
    "system": Command("TEXT", "the system message; alone: show it", optional=True),
    "set": Command("NAME VALUE", "a setting of sampling; alone: show all", optional=True),
    "stop": Command("TEXT", "end answers before this text; alone: none", optional=True),
    "model": Command("NAME", "go on with another model; alone: list them", optional=True),
    "stats": Command("", "how fast the last answer was"),
    "route": Command("", "which nodes compute what"),
}
#: Those that are commands without a slash too.
PLAIN: Final = ("help", "exit", "peers", "clear", "connect")

_FOOT: Final = """\
Space or Ctrl-C stops an answer. Where nodes were lacking for the rest of one,
an empty line goes on with it. Anything else is said to the model.
"""


def _help() -> str:
    lines = []
    for name, command in COMMANDS.items():
        shown = name if name in PLAIN else f"/{name}"
        argument = f"[{command.argument}]" if command.optional else command.argument
        lines.append(f"{f'{shown} {argument}'.rstrip():<18} {command.about}\n")
    return "".join(lines) + _FOOT


HELP: Final = _help()


@dataclass(frozen=True)
class Say:
    """Said to the model."""

    text: str


@dataclass(frozen=True)
class Plain:
    """A command with nothing after it."""

    name: str


@dataclass(frozen=True)
class WithArgument:
    """A command with something after it."""

    name: str
    argument: str


@dataclass(frozen=True)
class Mistake:
    """Meant as a command, but none; `text` says what is wrong."""

    text: str


Line = Say | Plain | WithArgument | Mistake

_SLASHED: Final = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


def parse(line: str) -> Line | None:
    """The meaning of a line; None for a blank one.

    Words without a slash are commands only where nobody would say them to a model: alone, or `connect` with a
    valid multiaddress ("connect the dots" is said). With a slash they are always meant as commands.
    """
    text = line.strip()
    if not text:
        return None
    word, _, rest = text.partition(" ")
    if text in PLAIN and text != "connect":
        return Plain(text)
    if word == "connect" and is_multiaddress(rest.strip()):
        return WithArgument("connect", rest.strip())
    slashed = _SLASHED.fullmatch(text)
    if slashed is None:
        return Say(text)
    return _command(slashed[1], (slashed[2] or "").strip()) or Say(text)


def _command(name: str, argument: str) -> Line | None:
    """What a slash began; None where it is rather part of a sentence."""
    command = COMMANDS.get(name)
    if command is None or (argument and not command.argument):
        if len(argument.split()) > 1:
            return None
        return Mistake(
            f"/{name} takes nothing after it"
            if command
            else f"there is no command /{name}; type help for those there are"
        )
    if name == "connect" and not is_multiaddress(argument):
        return Mistake("/connect takes a peer's address, /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID")
    if argument:
        return WithArgument(name, argument)
    if command.argument and not command.optional:
        return Mistake(f"/{name} takes a file: /{name} {command.example}")
    return Plain(name)
