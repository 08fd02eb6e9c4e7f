"""docs/control-api.md and docs/dgnctl.md hold all types, errors and commands, and no others."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from dgnctl.cli import COMMANDS, EXIT_STDOUT_CLOSED, cli
from dgnctl.run import EXIT_INTERRUPTED
from dgnd.control import api, connection, jsonrpc, server
from dgnd.errors import all_errors

DOCS = Path(__file__).parent.parent / "docs"
API = (DOCS / "control-api.md").read_text(encoding="utf-8")
CTL = (DOCS / "dgnctl.md").read_text(encoding="utf-8")

TYPES = [
    value
    for value in vars(api).values()
    if isinstance(value, type) and issubclass(value, msgspec.Struct) and not issubclass(value, api.Params)
]


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"there is no section '### {title}'"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text whose first cell is code."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return [[row[0].strip("`"), *row[1:]] for row in cells]


def written(annotation: str) -> str:
    return annotation.replace(" | ", " or ").replace("None", "null")


def fields(kind: type[msgspec.Struct]) -> list[list[str]]:
    """Name and type of each field, as the page writes them."""
    annotations: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        annotations |= inspect.get_annotations(cls)
    return [[field.name, written(annotations[field.name])] for field in msgspec.structs.fields(kind)]


def default_of(field: msgspec.structs.FieldInfo) -> str:
    value: Any = field.default
    if value is msgspec.NODEFAULT:
        if field.default_factory is msgspec.NODEFAULT:
            return "required"
        value = field.default_factory()
    return f"`{msgspec.json.encode(value).decode()}`"


@pytest.mark.parametrize("method", api.METHODS)
def test_every_method_with_its_parameters_and_result(method: str) -> None:
    params, result = api.METHODS[method]
    text = section(API, method)
    assert [row[:2] for row in rows(text)] == fields(params)
    assert [row[2] for row in rows(text)] == [default_of(field) for field in msgspec.structs.fields(params)]
    assert all(row[3] for row in rows(text))
    name = f"list[{typing.get_args(result)[0].__name__}]" if typing.get_args(result) else result.__name__  # type: ignore[attr-defined]
    assert f"Result: {name}." in text


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_field_of_every_type(kind: type[msgspec.Struct]) -> None:
    documented = rows(section(API, kind.__name__))
    assert [row[:2] for row in documented] == fields(kind)
    assert all(row[2] for row in documented)


def test_the_page_has_no_other_methods_or_types() -> None:
    headings = set(re.findall(r"^### (.*)$", API, re.MULTILINE))
    assert headings == {*api.METHODS, *(kind.__name__ for kind in TYPES), "generate.delta"}


def test_every_word_of_the_states() -> None:
    for words in (api.NodeState, api.FinishReason, api.BackendState):
        for word in typing.get_args(words):
            assert f"`{word}`" in API


def test_every_error() -> None:
    documented = {row[0]: row[1:4] for row in rows(API.split("## Errors")[1])}
    expected = {
        kind: [str(error.code), str(error.exit_code), "yes" if error.retryable else "no"]
        for kind, error in all_errors().items()
        if error.__module__ in ("dgnd.errors", "dgn_backends.errors")
    }
    assert documented == expected, "the table of errors in docs/control-api.md differs from dgnd.errors"


def test_the_bounds() -> None:
    mebibytes = jsonrpc.MAX_REQUEST_BYTES // 2**20
    for bound in (
        f"{server.MAX_CONNECTIONS} connections",
        f"{connection.MAX_REQUESTS} requests at once",
        f"{mebibytes} MiB for a line",
        f"more than {connection.ANSWER_WAITS_BYTES // 2**10} KiB unread",
        f"beyond {connection.REQUESTS_WAIT_BYTES // 2**20} MiB no further request",
        f"at most {jsonrpc._MAX_ID_LENGTH} characters",
    ):
        assert bound in API


def test_the_example_is_json_rpc() -> None:
    lines = re.findall(r"^[<>] (.*)$", API, re.MULTILINE)
    assert len(lines) == 3
    request = jsonrpc.parse(lines[0].encode())
    assert isinstance(request, jsonrpc.Request)
    jsonrpc.read_params(request.params, api.GenerateParams)
    delta = jsonrpc.parse(lines[1].encode())
    assert isinstance(delta, jsonrpc.Notification)
    jsonrpc.read_value(delta.params, api.GenerateDelta, "delta")


# --- dgnctl ---


def commands() -> dict[str, click.Command]:
    """Every command by what is typed."""
    found: dict[str, click.Command] = {}
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": command.commands[sub] for sub in command.commands}
        else:
            found[name] = command
    return found


def test_every_command_and_its_arguments() -> None:
    titles = {}
    for name, command in commands().items():
        arguments = [param for param in command.params if isinstance(param, click.Argument)]
        shown = [
            str(arg.human_readable_name) if arg.required else f"[{arg.human_readable_name}]"
            for arg in arguments
        ]
        titles[" ".join(["dgnctl", name, *shown])] = command
    assert set(re.findall(r"^### (.*)$", CTL, re.MULTILINE)) == set(titles)


def test_every_option() -> None:
    from dgnctl.sampling import _OPTIONS

    for name, command in commands().items():
        text = next(
            part for part in re.split(r"^### dgnctl ", CTL, flags=re.MULTILINE) if part.startswith(name)
        )
        for param in command.params:
            if not isinstance(param, click.Option) or param.name in ("socket", "as_json"):
                continue
            if name == "chat" and param.name not in ("session", "resume", "no_keep"):
                continue  # those of run, as the page says
            assert f"`{param.opts[0]}" in text, f"dgnctl {name} {param.opts[0]} is not in docs/dgnctl.md"
    assert len(_OPTIONS) == len(commands()["chat"].params) - 4  # those above, and --socket


def test_no_option_that_is_not_there() -> None:
    known = {opt for command in commands().values() for param in command.params for opt in param.opts} | {
        "--config"
    }
    assert set(re.findall(r"--[a-z][a-z-]*", CTL)) <= known


def test_every_exit_code() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", CTL, re.MULTILINE)}
    used = {error.exit_code for error in all_errors().values()}
    assert documented == used | {0, EXIT_INTERRUPTED, EXIT_STDOUT_CLOSED, 143}
