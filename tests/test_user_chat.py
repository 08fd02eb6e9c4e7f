"""`dgnctl chat` as its user has it: a real terminal, real daemons, an answer that comes from two nodes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from cluster import Cluster, Row, TestNode
from user_kit import ANSWER, IM_END, byte_ids, chat_ids, readable_model, scripted_model

from dgnctl.token_file import read_ids

CHAT = ["-m", "dgnctl", "chat"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """a and b share `long`, whose answers never end, `m`, the same with a short context, and `talk`."""
    folder = tmp_path_factory.mktemp("models")
    paths = {
        "long": readable_model(folder / "long", max_positions=4096),
        "m": readable_model(folder / "m", max_positions=96),
        "talk": scripted_model(folder / "talk"),
    }
    models = {name: {"path": str(path), "backend": "reference"} for name, path in paths.items()}
    rows = [row for name in paths for row in (Row("a", "embed,0-1", name), Row("b", "2-3,head", name))]
    with Cluster(tmp_path_factory.mktemp("nodes"), None) as cluster:
        cluster.full_mesh(rows, models=models)
        cluster.add("stranger")
        yield cluster


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the test's own for /save and /load, and a terminal without colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "dumb")


class Person:
    """Someone at a terminal."""

    def __init__(self, node: TestNode, *options: str) -> None:
        arguments = [*CHAT, "--socket", str(node.socket), *options]
        self.child = pexpect.spawn(
            sys.executable, arguments, timeout=90, encoding="utf-8", dimensions=(24, 80)
        )
        self.child.delaybeforesend = None

    def __enter__(self) -> Person:
        self.child.expect_exact("Type help")
        self.prompt()
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def prompt(self) -> None:
        self.child.expect_exact("\n> ")

    def type(self, line: str) -> None:
        """Types a line and sees its echo."""
        self.child.sendline(line)
        self.child.expect_exact("\n")

    def say(self, line: str) -> str:
        """Types a line; returns what is shown until the next prompt."""
        self.type(line)
        self.prompt()
        shown: str = self.child.before
        return shown.replace("\r", "").strip("\n")

    def ends(self) -> int:
        """Waits for the end; returns the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.wait()
        code: int = self.child.exitstatus
        return code


def sessions(node: TestNode) -> list[Any]:
    found: list[Any] = node.ctl_json("status")["sessions"]
    return found


def test_a_conversation(cluster: Cluster) -> None:
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    with Person(a, "--model", "talk") as person:
        shown = person.say("help")
        for word in ("help", "exit", "peers", "connect ADDR", "clear", "/save", "/load", "Space", "Ctrl-C"):
            assert word in shown
        assert person.say("hello") == ANSWER
        person.child.sendline("")  # nothing is said, the prompt comes again
        person.prompt()
        assert person.say("connect the dots") == ANSWER  # said to the model
        assert "b: connected, " in (shown := person.say("peers"))
        assert b.peer_id in shown
        assert person.say(f"connect {b.address}").startswith("connected: b offers long 2-3,head")
        shown = person.say(f"connect {cluster.nodes['stranger'].address}")
        assert shown.startswith("dgnctl: ")
        assert str(cluster.nodes["stranger"].port) in shown
        assert "\n" not in shown
        assert "/connect takes" in person.say("/connect 192.168.1.20:4001")
        assert "no command /hlep" in person.say("/hlep")
        assert person.say("hello again") == ANSWER
        person.child.sendline("exit")
        assert person.ends() == 0
    for node in (a, b):
        node.wait_for(lambda node=node: sessions(node) == [], 10, "end of the session")


def test_the_answer_is_in_the_context_and_clear_forgets_it(cluster: Cluster) -> None:
    with Person(cluster.nodes["a"], "--model", "talk", "--system", "be brief") as person:
        person.say("one")
        person.say("two")
        assert "token ids written" in person.say("/save x.csv")
        expected = chat_ids(("system", "be brief"), ("user", "one"), ("assistant", ANSWER), ("user", "two"))
        assert read_ids(Path("x.csv")) == [*expected, *byte_ids(ANSWER), IM_END]
        assert "forgotten" in person.say("clear")
        person.say("three")
        person.say("/save y.csv")
        expected = chat_ids(("system", "be brief"), ("user", "three"))
        assert read_ids(Path("y.csv")) == [*expected, *byte_ids(ANSWER), IM_END]


def test_save_and_load_go_on_with_the_same_ids(cluster: Cluster) -> None:
    """Another chat that loads the file answers as the first one does."""
    options = ["--model", "long", "--max-tokens", "30", "--temperature", "0"]
    a = cluster.nodes["a"]
    with Person(a, *options) as person:
        person.say("tell me")
        person.say("/save half.csv")
        first = person.say("more")
        person.say("/save whole.csv")
    with Person(a, *options) as person:
        assert "token ids read" in person.say("/load half.csv")
        assert person.say("more") == first
        person.say("/save again.csv")
        assert "can't be read" in person.say("/load nosuch.csv")
        assert "can't be written" in person.say("/save nosuch/x.csv")
        assert person.say("/load").startswith("dgnctl: /load takes a file")
    assert Path("again.csv").read_text() == Path("whole.csv").read_text()
    assert re.fullmatch(r"\d+(,\d+)*\n", Path("half.csv").read_text())


@pytest.mark.parametrize("key", [" ", "\x03"], ids=["space", "ctrl-c"])
def test_a_key_stops_the_answer_everywhere_and_what_came_stays(cluster: Cluster, key: str) -> None:
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    with Person(a, "--model", "long", "--max-tokens", "4000") as person:
        person.type("go")
        person.child.expect(r"\S{20}")
        assert [session["origin"] for session in sessions(b)] == [a.peer_id]
        person.child.send(key)
        person.child.expect_exact("(stopped)")
        person.prompt()
        time.sleep(0.1)  # nothing moves any more, neither here nor there
        before = [session["position"] for node in (a, b) for session in sessions(node)]
        time.sleep(0.5)
        assert [session["position"] for node in (a, b) for session in sessions(node)] == before
        person.say("/save x.csv")
        ids = read_ids(Path("x.csv"))
        prompt = chat_ids(("user", "go"))
        assert ids[: len(prompt)] == prompt
        assert 20 <= len(ids) - len(prompt) < 4000
        assert len(ids) - before[1] <= 2  # the peer computed no further than what was shown
        person.child.sendline("exit")
        assert person.ends() == 0
    for node in (a, b):
        node.wait_for(lambda node=node: sessions(node) == [], 10, "end of the session")


def test_the_end_of_the_context_offers_clear(cluster: Cluster) -> None:
    with Person(cluster.nodes["a"], "--model", "m") as person:
        shown = person.say("hi")
        assert "the context is full" in shown
        assert "clear" in shown
        shown = person.say("and?")  # there is no room for anything more
        assert shown.startswith("dgnctl: ")
        assert "96" in shown
        assert "clear" in shown
        person.say("clear")
        assert "the context is full" in person.say("hi")
    with Person(cluster.nodes["a"], "--model", "m", "--max-tokens", "3") as person:
        assert person.say("hi").endswith("(stopped after 3 tokens, as max_tokens says)")


def test_ctrl_c_at_the_prompt_and_ctrl_d(cluster: Cluster) -> None:
    with Person(cluster.nodes["a"], "--model", "talk") as person:
        person.child.send("half a line\x03")
        person.child.expect_exact("to leave")
        person.prompt()
        assert person.say("hello") == ANSWER
        person.child.sendeof()
        assert person.ends() == 0


def test_lines_from_a_pipe(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    command = [sys.executable, *CHAT, "--socket", str(a.socket), "--model", "talk"]
    done = subprocess.run(
        command, input="hello\nconnect the dots\n/save p.csv\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n{ANSWER}\n")
    said = chat_ids(("user", "hello"), ("assistant", ANSWER), ("user", "connect the dots"))
    assert read_ids(Path("p.csv")) == [*said, *byte_ids(ANSWER), IM_END]
    a.wait_for(lambda: sessions(a) == [], 10, "end of the session")


def test_an_empty_line_goes_on_with_an_answer_that_lost_its_nodes(tmp_path: Path) -> None:
    path = readable_model(tmp_path / "long", max_positions=4096)
    rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
    with Cluster(tmp_path / "nodes", path) as cluster:
        cluster.full_mesh(rows, more="[sessions]\nrecover_s = 1")
        a, b = cluster.nodes["a"], cluster.nodes["b"]
        sampling = ("--max-tokens", "1500", "--temperature", "0.7", "--seed", "3")
        with Person(a, *sampling) as person:
            person.say("go")
            person.say("/save undisturbed.csv")
        with Person(a, *sampling) as person:
            person.type("go")
            person.child.expect(r"\S{20}")
            b.kill()
            person.child.expect(r"it began with b \(2-3,head\): [^;]*; now b is ")
            person.child.expect_exact("an empty line goes on with the answer")
            person.prompt()
            assert "nobody reachable serves 2-3,head" in person.say("")  # nobody yet
            b.start()
            b.wait_ready()
            a.wait_for(lambda: a.state() == "ready", what="b")
            person.say("")
            person.say("/save cut-off.csv")
        assert read_ids(Path("cut-off.csv")) == read_ids(Path("undisturbed.csv"))


def test_a_chat_lives_through_a_restart_of_the_daemon(cluster: Cluster) -> None:
    """Last here: a's daemon is stopped in the middle of a chat."""
    a = cluster.nodes["a"]
    with Person(a, "--model", "talk") as person:
        assert person.say("hello") == ANSWER
        assert a.terminate() == 0
        assert person.say("still there?").startswith("dgnctl: ")
        assert "no dgnd is running" in person.say("and now?")
        a.start()
        a.wait_ready()
        shown = person.say("hello")
        assert "has forgotten the conversation" in shown
        assert shown.endswith(ANSWER)
