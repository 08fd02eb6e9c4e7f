"""`dgnctl setup` at a terminal, as a user answers it; what it writes is what dgnd takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pexpect
import pytest

from dgn_backends.testing_models import make_tiny_llama
from dgnctl.setup_file import is_host, is_name, is_peer_id, multiaddress, span_problem, table_name
from dgnd.config import load_config
from dgnd.config.schema import BlocksRow

DEADLINE_S = 60
YES, NO, ENTER = "y", "n", ""


def answered(arguments: Sequence[str], talk: Sequence[tuple[str, str]]) -> tuple[int, str]:
    """Runs setup, and gives each answer when its question is there; the exit code, and all that was shown."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "dgnctl", "setup", *arguments],
        env={**os.environ, "TERM": "dumb"},
        encoding="utf-8",
        timeout=DEADLINE_S,
        dimensions=(24, 100),
    )
    shown = ""
    for question, answer in talk:
        child.expect_exact(question)
        shown += child.before + question
        child.sendline(answer)
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, shown + child.before.replace("\r\n", "\n")


def places(tmp_path: Path) -> tuple[Path, list[str]]:
    path = tmp_path / "etc/dgn.toml"
    return path, ["--output", str(path), "--state-dir", str(tmp_path / "state")]


def test_one_pc_with_the_model_that_comes_along(tmp_path: Path) -> None:
    path, where = places(tmp_path)
    talk = [("Name of this PC", "den"), ("Directory of the model", ENTER)]
    talk += [("Do other PCs take part?", NO), ("over HTTP", YES)]
    code, shown = answered(where, talk)
    assert code == 0, shown
    config = load_config(path).config
    assert (config.node.name, config.node.state_dir) == ("den", tmp_path / "state")
    assert config.blocks == (BlocksRow(model="dgn-demo", peer="self", span="embed,0-7,head"),)
    assert config.http.listen == "127.0.0.1:11435"
    assert config.node.listen == ("/ip4/127.0.0.1/tcp/4001",)  # nobody else is to come in
    assert f"dgnd --config {path}" in shown
    assert "embed,0-7,head" in shown  # what check says

    before = path.read_text()
    code, shown = answered(where, [("Replace it?", NO)])
    assert (code, path.read_text()) == (0, before)
    assert "nothing was changed" in shown
    answered(where, [("Replace it?", YES), ("Name of this PC", "attic"), *talk[1:]])
    assert path.with_name("dgn.toml.old").read_text() == before
    assert load_config(path).config.node.name == "attic"


def test_two_pcs_and_answers_that_are_wrong_at_first(tmp_path: Path) -> None:
    path, where = places(tmp_path)
    model = make_tiny_llama(tmp_path / "My Model")
    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    talk = [
        ("Name of this PC", "the desk"),
        ("without blanks and slashes", "desk"),
        ("Directory of the model", str(tmp_path / "nowhere")),
        ("No such file or directory; name a directory that holds a model", ENTER + str(model)),
        ("in 8 bits?", YES),
        ("Do other PCs take part?", YES),
        ("What does this PC serve", "attic"),
        ("'attic' is no block", "embed,0-4"),
        ("0-4: the blocks are 0 to 3", "embed, 0-1, head"),
        ("Name one of the other PCs?", YES),
        ("Its name", "self"),
        ("can be called 'self'", "Attic 2"),
        ("Its peer id", "12D3"),
        ("that is no peer id", peer),
        ("Its address", "192.168.1.300"),
        ("'192.168.1.300' is none of these", "192.168.1.20"),
        ("What does it serve", "2-3"),
        ("Name another PC?", NO),
        ("over HTTP", NO),
    ]
    code, shown = answered(where, talk)
    assert code == 0, shown
    config = load_config(path).config
    assert config.models["my-model"].path == model
    assert config.models["my-model"].quant == "int8"
    assert config.peers["attic-2"].id == peer
    assert config.peers["attic-2"].addrs == ("/ip4/192.168.1.20/tcp/4001",)
    spans = {row.peer: row.span for row in config.blocks}
    assert spans == {"self": "embed,0-1,head", "attic-2": "2-3"}
    own = subprocess.run(
        [sys.executable, "-m", "dgnd", "init", "--config", str(path)],
        capture_output=True, text=True, check=True, timeout=DEADLINE_S,
    ).stdout.strip()  # fmt: skip
    assert f'[peers.desk]\nid = "{own}"' in shown


def test_what_dgnd_would_not_take_is_said_at_once(tmp_path: Path) -> None:
    path, where = places(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    talk = [("Name of this PC", ENTER), ("Directory of the model", str(tmp_path)), ("in 8 bits?", NO)]
    talk += [("Do other PCs take part?", NO), ("over HTTP", NO)]
    code, shown = answered(where, talk)
    assert code == 2
    assert f"then: dgnd check --config {path}" in shown


def test_without_a_terminal_it_says_what_asks_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dgnctl", "setup"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'dgnd init' writes a file without" in done.stderr


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.2", "/ip4/10.0.0.2/tcp/4001"),
        ("fd00::2", "/ip6/fd00::2/tcp/4001"),
        ("attic.lan", "/dns4/attic.lan/tcp/4001"),
        ("/ip4/10.0.0.2/tcp/5001", "/ip4/10.0.0.2/tcp/5001"),
    ],
)
def test_an_address_from_what_people_call_it(host: str, address: str) -> None:
    assert multiaddress(host) == address


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("10.0.0.2", True),
        ("10.0.0.300", False),
        ("fd00::2", True),
        ("attic", True),
        ("attic.lan.", True),
        ("two words", False),
        ("http://attic", False),
        ("/ip4/10.0.0.2/tcp/5001", True),
        ("/dns4/attic/tcp/5001/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", True),
        ("/etc/hosts", False),
    ],
)
def test_what_an_address_may_be(host: str, good: bool) -> None:
    assert is_host(host) == good


@pytest.mark.parametrize(
    ("span", "problem"),
    [
        ("embed,0-3,head", ""),
        ("2", ""),
        ("", "'' is no block"),
        ("0-4", "0-4: the blocks are 0 to 3"),
        ("3-1", "3-1: the blocks are 0 to 3"),
        ("-1", "'-1' is no block"),
        ("embed;0", "'embed;0' is no block"),
    ],
)
def test_what_a_pc_may_serve(span: str, problem: str) -> None:
    found = span_problem(span, 4)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_names() -> None:
    assert is_name("désk")
    assert not any(map(is_name, ["", "a b", "a/b", "a\0", "x" * 65]))
    assert table_name("Llama 3.2 (3B)") == "llama-3-2-3b"
    assert table_name("…") == "model"
    assert is_peer_id("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")
    assert not is_peer_id("12D3KooW")
