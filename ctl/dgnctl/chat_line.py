"""What a line typed in `dgnctl chat` means: a command, or something said to the model. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dgnctl.multiaddress import is_multiaddress

HELP: Final = """\
help            show this list
exit            leave; Ctrl-D does too
peers           list the peers
connect ADDR    dial a peer at its multiaddress, /ip4/.../tcp/.../p2p/ID
clear           forget the conversation and start anew
/save FILE.csv  write the conversation as token ids
/load FILE.csv  go on from token ids written by /save
Space or Ctrl-C stops an answer. Where nodes were lacking for the rest of one,
an empty line goes on with it.
Anything else is said to the model.
"""


#: Every command by the name that follows its slash, with a few words for who completes it.
SLASHED: Final[dict[str, str]] = {
    "help": "what can be typed",
    "exit": "leave",
    "peers": "list the peers",
    "connect": "dial a peer",
    "clear": "start anew",
    "save": "write the conversation to a file",
    "load": "go on from a file",
}


@dataclass(frozen=True)
class Say:
    """Said to the model."""

    text: str


@dataclass(frozen=True)
class Plain:
    """A command without an argument: help, exit, peers, clear."""

    name: str


@dataclass(frozen=True)
class WithArgument:
    """A command with one: connect, save, load."""

    name: str
    argument: str


@dataclass(frozen=True)
class Mistake:
    """Meant as a command, but none; `text` says what is wrong."""

    text: str


Line = Say | Plain | WithArgument | Mistake

_PLAIN: Final = ("help", "exit", "peers", "clear")
_COMMAND: Final = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


def parse(line: str) -> Line | None:
    """The meaning of a line; None for a blank one.

    Words without a slash are commands only where nobody would say them to a model: alone, or `connect` with a
    valid multiaddress ("connect the dots" is said). With a slash they are always meant as commands.
    """
    text = line.strip()
    if not text:
        return None
    if text in _PLAIN:
        return Plain(text)
    word, _, rest = text.partition(" ")
    if word == "connect" and is_multiaddress(rest.strip()):
        return WithArgument("connect", rest.strip())
    slashed = _COMMAND.fullmatch(text)
    if slashed is None:
        return Say(text)
    name, argument = slashed[1], (slashed[2] or "").strip()
    if name in _PLAIN and not argument:
        return Plain(name)
    if name == "connect":
        return WithArgument(name, argument) if is_multiaddress(argument) else Mistake(
            "/connect takes a peer's address, /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID")  # fmt: skip
    if name in ("save", "load"):
        return (
            WithArgument(name, argument) if argument else Mistake(f"/{name} takes a file: /{name} FILE.csv")
        )
    if len(text.split()) <= 2:
        return Mistake(f"there is no command /{name}; type help for those there are")
    return Say(text)
