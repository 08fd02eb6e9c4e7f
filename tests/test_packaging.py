"""Man pages and completions are made from what they are about; the shell completes names that dgnd knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cluster import Cluster, Row
from deb_kit import copy_of_the_checkout
from disturbed import asked
from test_docs import keys_by_section
from tiny_llama import make_tiny_llama

from dgnd.control.client import ControlClient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "packaging"))

from manuals import COMMANDS, command_page, completion, config_page  # noqa: E402 - beside the package, not in it

WHEN = ("0.1.0", "2026-11-28")


def said(page: str) -> str:
    """What groff makes of it; it has nothing to say about it."""
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    command = ["groff", "-Kutf8", "-man", "-Tascii", "-P-c", "-ww"]
    done = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
    assert "warning: can't find special character" in done.stderr or done.stderr == ""
    return re.sub(".\b", "", done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_has_every_command_and_option(name: str) -> None:
    page = said(command_page(name, *WHEN))
    names = set()

    def walk(context: click.Context) -> None:
        command = context.command
        assert context.command_path in page
        names.update(option for each in command.params for option in each.opts if option.startswith("--"))
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                walk(click.Context(found, info_name=inner, parent=context))

    walk(click.Context(COMMANDS[name][1], info_name=name))
    assert len(names) > 2
    assert {name for name in names if name not in page} == set()


def test_the_page_of_the_configuration_has_every_key() -> None:
    page = config_page(*WHEN)
    assert said(page)
    for heading, keys in keys_by_section().items():
        _, _, body = page.partition(f".SH {heading}\n")
        assert keys <= set(re.findall(r"^\.B (\w+)$", body.partition(".SH ")[0], flags=re.M))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("name", COMMANDS)
def test_shells_read_the_completions(name: str, shell: str) -> None:
    text = completion(name, shell)
    assert f"_{name.upper()}_COMPLETE={shell}_complete" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_wheel_and_sdist_are_the_same_wherever_they_are_built(tmp_path: Path) -> None:
    """With other times, other modes, in another place."""
    places = [copy_of_the_checkout(tmp_path / name) for name in ("one", "another/place")]
    for path in places[1].rglob("*"):
        if path.is_file():
            path.chmod(0o664)
            os.utime(path, (1e9, 1e9))
    built = []
    for place in places:
        done = subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", place / "out"], cwd=place, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        built.append({path.name: path.read_bytes() for path in (place / "out").iterdir()})
    assert [Path(name).suffix for name in sorted(built[0])] == [".whl", ".gz"]
    assert built[0] == built[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that share a model `m`."""
    directory = tmp_path_factory.mktemp("completion")
    with Cluster(directory, make_tiny_llama(directory / "tiny", n_blocks=2)) as cluster:
        cluster.full_mesh([Row("a", "embed,0"), Row("b", "1,head")])
        cluster.nodes["a"].wait_ready()
        yield cluster


def completed(words: str, socket: Path | str, **environ: str) -> list[str]:
    """What bash is offered for the last word, as the script of the package asks."""
    shell = {"_DGNCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "DGN_SOCKET": str(socket)}
    done = subprocess.run(
        [sys.executable, "-m", "dgnctl"],
        env={**os.environ, **shell, "COMP_CWORD": str(len(words.split(" ")) - 1), **environ},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_the_shell_completes_names_that_dgnd_knows(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.nodes["a"]
    with ControlClient(node.socket) as client:
        client.generate(asked(max_tokens=2, session="mine"), lambda _: None)
    assert completed("dgnctl sta", node.socket) == ["status"]
    assert completed("dgnctl run --model ", node.socket) == ["m"]
    assert completed(f"dgnctl --socket {node.socket} run --model ", tmp_path / "none") == ["m"]
    assert completed("dgnctl run --model x", node.socket) == []
    assert completed("dgnctl disconnect ", node.socket) == ["b"]
    assert completed("dgnctl chat --session m", node.socket) == ["mine"]
    assert completed("dgnctl cache clear ", node.socket) == ["mine"]


@pytest.mark.parametrize("words", ["run --model ", "disconnect ", "cache clear ", "chat --session "])
def test_without_a_dgnd_nothing_is_offered_and_nothing_said(tmp_path: Path, words: str) -> None:
    assert completed(f"dgnctl {words}", tmp_path / "none") == []


def test_kept_conversations_are_offered(tmp_path: Path) -> None:
    chats = tmp_path / "dgn/chats"
    chats.mkdir(parents=True)
    (chats / "20261128-101112-abcd.json").write_text("{}")
    state = {"XDG_STATE_HOME": str(tmp_path)}
    offered = completed("dgnctl chats show ", tmp_path / "none", **state)
    assert offered == ["last", "20261128-101112-abcd"]
    assert completed("dgnctl chat --resume 2026", tmp_path / "none", **state) == offered[1:]
