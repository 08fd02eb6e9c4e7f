"""What the documents say is compared with what is there."""

from __future__ import annotations

import re
import shlex
import tomllib
import typing
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

from dgn_backends.quant_plan import FINE_SCHEMES, SCHEMES
from dgnctl.cli import COMMANDS
from dgnd.config import load_config
from dgnd.config.schema import Config, Section
from dgnd.main import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def keys_by_section() -> dict[str, set[str]]:
    """Every section of the schema by its heading, with its keys."""
    found: dict[str, set[str]] = {}
    for field in msgspec.structs.fields(Config):
        inner = typing.get_args(field.type) or (field.type,)
        section = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, Section))
        heading = {dict: f"[{field.name}.NAME]", tuple: f"[[{field.name}]]"}.get(
            typing.get_origin(field.type), f"[{field.name}]"
        )
        found[heading] = {each.name for each in msgspec.structs.fields(section)}
    return found


def test_every_key_is_documented_and_no_other() -> None:
    text = (ROOT / "docs/config.md").read_text()
    sections = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    documented = {
        heading: set(re.findall(r"^\| `(\w+)` \|", body, flags=re.M))
        for heading, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert documented == keys_by_section()


def test_documented_defaults_are_the_real_ones() -> None:
    text = (ROOT / "docs/config.md").read_text()
    sections = re.split(r"^## (.+)$", text, flags=re.M)[1:]
    bodies = dict(zip(sections[::2], sections[1::2], strict=True))
    checked = 0
    for field in msgspec.structs.fields(Config):
        body = bodies.get(f"[{field.name}]")
        if body is None:
            continue
        for key, default in re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", body, flags=re.M):
            real = msgspec.to_builtins(getattr(field.default, key), enc_hook=str)
            shown = tomllib.loads(f"value = {default}")["value"]
            assert (tuple(shown) if isinstance(shown, list) else shown) == real
            checked += 1
    assert checked >= 4


def test_documented_bytes_of_quantised_weights_are_the_real_ones() -> None:
    text = (ROOT / "docs/config.md").read_text()
    rows = re.findall(r"^\| (int\S+) \| (\d+|a row) \| ([\d.]+) \|", text, flags=re.M)
    shown = {(name, None if group == "a row" else int(group)): float(size) for name, group, size in rows}
    schemes = [*SCHEMES.items(), *FINE_SCHEMES.items()]
    wanted = {(name, each.group): each.n_bytes(1, 4096) / 4096 for name, each in schemes}
    assert shown == pytest.approx(wanted, abs=5e-4)


def test_the_example_shows_every_key() -> None:
    text = (ROOT / "dgn.toml.example").read_text()
    for heading, keys in keys_by_section().items():
        assert heading.replace("NAME]", "") in text
        for key in keys:
            assert re.search(rf"^(# )?{key} = ", text, flags=re.M), f"{heading} {key}"


def test_the_example_passes_the_check() -> None:
    result = CliRunner().invoke(cli, ["check", "--config", str(ROOT / "dgn.toml.example")])
    assert result.exception is None
    assert "embed,0-7,head" in result.output
    assert "warning" not in result.output


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "dgn.toml.example"], ids=lambda path: path.name)
def test_configurations_in_documents_are_accepted(document: Path, tmp_path: Path) -> None:
    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    text = document.read_text()
    if document.suffix == ".md":
        blocks = re.findall(r"^```toml\n(.*?)^```", text, flags=re.M | re.S)
    else:  # all of it, and all of it with the examples in its comments
        blocks = [text, re.sub(r"^# (?=[\[\w].*(=|\]))", "", text, flags=re.M)]
    for block in blocks:
        path = tmp_path / "dgn.toml"
        path.write_text(re.sub(r"12D3KooW…|ID-OF-\w+", peer, block))
        load_config(path, ["torch", "reference"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_documents_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    used = set(re.findall(r"`make ([\w-]+)|^make ([\w-]+)", document.read_text(), flags=re.M))
    assert {first or second for first, second in used} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_dgnd_commands_in_documents_exist(document: Path) -> None:
    lines = re.findall(r"^(?:sudo (?:-u dgn )?)?(dgnd .+)$|`(dgnd [^`]+)`", document.read_text(), flags=re.M)
    options = {
        option for command in (cli, *cli.commands.values()) for each in command.params for option in each.opts
    }
    for line in (first or second for first, second in lines):
        words = shlex.split(line)[1:]
        for index, word in enumerate(words):
            if word.startswith("-"):
                assert word.split("=")[0] in options | {"--help"}, line
            elif index == 0:
                assert word in cli.commands, line


def test_every_command_and_option_of_dgnd_is_documented() -> None:
    text = (ROOT / "docs/operations.md").read_text().split("## The commands of dgnd\n")[1].split("\n## ")[0]
    documented: dict[str, set[str]] = {}
    name = ""
    for command, option in re.findall(r"^\| (?:`(dgnd[^`]*)`)? ?\| (?:`(--[^`]+)`)? ?\|", text, flags=re.M):
        name = command or name
        documented.setdefault(name, set()).update([option] if option else [])
    real = {"dgnd": cli, **{f"dgnd {name}": command for name, command in cli.commands.items()}}
    assert documented == {
        name: {each.opts[0] for each in command.params if isinstance(each, click.Option)}
        for name, command in real.items()
    }


def names_of(requirements: list[str]) -> set[str]:
    return {match[0] for each in requirements if (match := re.match(r"[\w-]+", each))}


def test_every_dependency_has_its_reason() -> None:
    project = PYPROJECT["project"]
    declared = names_of(project["dependencies"]) | names_of(PYPROJECT["dependency-groups"]["dev"])
    for extra, requirements in project["optional-dependencies"].items():
        declared |= names_of(requirements) if extra != "all" else set()
    documented = set(
        re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/dependencies.md").read_text(), flags=re.M)
    )
    assert documented == declared


def test_the_changelog_has_an_unreleased_part_or_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{PYPROJECT['project']['version']}]" in text


def test_quoted_messages_are_in_the_sources() -> None:
    sources = [path for name in ("daemon", "backends", "ctl") for path in (ROOT / name).rglob("*.py")]
    text = "\n".join(path.read_text() for path in [*sources, ROOT / "scripts/bootstrap.sh"])
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)
    assert len(messages) >= 12
    assert [message for message in messages if message not in text] == []


def test_the_readme_names_every_command_of_the_client() -> None:
    (line,) = [
        item for item in (ROOT / "README.md").read_text().split("\n* ") if item.startswith("**dgnctl**")
    ]
    assert re.findall(r"`(\w+)`", line) == list(COMMANDS)
