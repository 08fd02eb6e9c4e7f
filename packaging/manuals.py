"""Writes man pages and completions of shells: from the commands, and from the schema of the configuration.

    packaging/manuals.py DIR VERSION DATE      into DIR/usr/share, as a package has them

What a key of the configuration means is read from docs/config.md, which a test compares with the schema.
"""

from __future__ import annotations

import gzip
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from click.shell_completion import get_completion_class

from dgnctl.cli import cli as dgnctl
from dgnd.config.schema import Config, Section
from dgnd.main import cli as dgnd

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, tuple[int, click.Command, str]] = {
    "dgnd": (8, dgnd, "serves blocks of a language model to its peers"),
    "dgnctl": (1, dgnctl, "talks to dgnd: chat, run, status and what else there is to do"),
}
#: Where each shell looks for the completion of a command.
COMPLETIONS = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/vendor-completions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}
FILES = """\
.SH FILES
.TP
.I /etc/dgn/dgn.toml
The configuration, see
.BR dgn.toml (5).
.TP
.I /run/dgn/dgnd.sock
The control socket, for root and members of the group dgn.
.TP
.I /var/lib/dgn
The node's key, and caches.
"""


def roff(text: str) -> str:
    """Plain text as it stands in a page."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.M)


def plain(markdown: str) -> str:
    """Without Markdown's signs and places of links."""
    text = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", markdown).replace("\\|", "|")
    return re.sub(r"[`*]", "", text)


def head(name: str, section: int, version: str, date: str, about: str) -> str:
    """The begin of a page."""
    return f'.TH {name.upper()} {section} "{date}" "dgn {version}"\n.SH NAME\n{name} \\- {roff(about)}\n'


def command_page(name: str, version: str, date: str) -> str:
    """A command with all its subcommands."""
    section, command, about = COMMANDS[name]
    context = click.Context(command, info_name=name)
    page = head(name, section, version, date, about)
    page += f".SH SYNOPSIS\n{synopsis(context)}.SH DESCRIPTION\n{description(command)}"
    page += ".SH OPTIONS\n" + options(context)
    page += ".SH COMMANDS\n" + "".join(map(subcommand, children(context)))
    others = ", ".join(f".BR {other} ({number})" for other, (number, *_) in COMMANDS.items() if other != name)
    return page + FILES + f".SH SEE ALSO\n{others},\n.BR dgn.toml (5)\n"


def children(context: click.Context) -> Iterator[click.Context]:
    """Every subcommand, those of groups too."""
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                inner = click.Context(found, info_name=name, parent=context)
                yield inner
                yield from children(inner)


def synopsis(context: click.Context) -> str:
    """`.B command [OPTIONS] ARGUMENT`."""
    words = " ".join(context.command.collect_usage_pieces(context))
    return f".B {roff(context.command_path)}\n{roff(words)}\n"


def description(command: click.Command) -> str:
    """The help text, by paragraphs."""
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    return ".PP\n".join(roff(part.strip()) + "\n" for part in re.split(r"\n\s*\n", text))


def options(context: click.Context) -> str:
    """Each option with what it does."""
    rows = [row for each in context.command.get_params(context) if (row := each.get_help_record(context))]
    return "".join(f".TP\n.B {roff(left)}\n{roff(right)}\n" for left, right in rows)


def subcommand(context: click.Context) -> str:
    """One of them."""
    arguments = " ".join(context.command.collect_usage_pieces(context))
    title = f"{context.command_path} {arguments}".strip()
    return f".SS {roff(title)}\n{description(context.command)}{options(context)}"


def config_page(version: str, date: str) -> str:
    """Every key by the schema: its default, and what it is."""
    page = head("dgn.toml", 5, version, date, "the configuration of a node of Distributed-GPT-Node")
    words = documented()
    page += ".SH DESCRIPTION\n" + intro()
    for field in msgspec.structs.fields(Config):
        heading, section = section_of(field)
        page += f".SH {roff(heading)}\n"
        for key in msgspec.structs.fields(section):
            default, text = words[heading][key.name]
            about = "; ".join(filter(None, (type_name(key.type), "required" if key.required else default)))
            page += f".TP\n.B {key.name}\n({roff(about)}) {roff(text)}\n"
    page += ".SH EXAMPLE\n.nf\n" + roff((ROOT / "dgn.toml.example").read_text()) + ".fi\n"
    return page + FILES + ".SH SEE ALSO\n.BR dgnd (8),\n.BR dgnctl (1)\n"


def section_of(field: msgspec.structs.FieldInfo) -> tuple[str, type[Section]]:
    """How the table of a field is written, and its keys."""
    kinds = typing.get_args(field.type) or (field.type,)
    (section,) = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    forms = {dict: f"[{field.name}.NAME]", tuple: f"[[{field.name}]]"}
    return forms.get(typing.get_origin(field.type), f"[{field.name}]"), section


def type_name(kind: object) -> str:
    """Of a key, in the words of TOML."""
    names = {str: "string", Path: "path", bool: "boolean", int: "integer", float: "number"}
    kinds = [each for each in typing.get_args(kind) or (kind,) if each not in (type(None), Ellipsis)]
    name = " or ".join(names[each] for each in kinds if isinstance(each, type))
    return f"array of {name}s" if typing.get_origin(kind) is tuple else name


def intro() -> str:
    """The first paragraphs of the document."""
    text = (ROOT / "docs/config.md").read_text().partition("\n## ")[0]
    text = re.sub(r"^```\n(.*?)^```\n", r"\1", text.partition("\n")[2], flags=re.M | re.S)
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    lines = [re.sub(r"\n +", " ", part).split("\n* ") for part in parts]
    lines = [[first.removeprefix("* "), *more] for first, *more in lines]
    return ".PP\n".join("\n.PP\n".join(roff(plain(line)) for line in each) + "\n" for each in lines)


def documented() -> dict[str, dict[str, tuple[str, str]]]:
    """By heading and key, what docs/config.md says: the default, and the meaning."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    parts = re.split(r"^## (.+)$", (ROOT / "docs/config.md").read_text(), flags=re.M)[1:]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        rows = re.findall(r"^\| `(\w+)` \| (?:(.*?) \| )?(.*) \|$", body, flags=re.M)
        found[heading] = {key: (plain(default), plain(text)) for key, default, text in rows}
    return found


def completion(command: str, shell: str) -> str:
    """The script for a shell, which asks the command itself what fits."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(COMMANDS[command][1], {}, command, f"_{command.upper()}_COMPLETE").source()


def write_all(share: Path, version: str, date: str) -> None:
    """All pages, and all completions."""
    pages = {f"{name}.{COMMANDS[name][0]}": command_page(name, version, date) for name in COMMANDS}
    pages["dgn.toml.5"] = config_page(version, date)
    for name, text in pages.items():
        path = share / f"man/man{name[-1]}" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    for shell, place in COMPLETIONS.items():
        for name in COMMANDS:
            path = share / place.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(completion(name, shell))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]) / "usr/share", sys.argv[2], sys.argv[3])
