"""`dgnctl chat` at a terminal that can do more than write: what its screen shows, and what keys do."""

from __future__ import annotations

import os
import signal
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Row
from echo_service import EchoDaemon
from seat import Seat


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a chat go to the test's own directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with the model that comes along."""
    with Cluster(tmp_path_factory.mktemp("demo"), None, "onnx") as cluster:
        cluster.full_mesh(
            [Row("desk", "embed,0-7,head", "dgn-demo")], models={"dgn-demo": {"backend": "onnx"}}
        )
        yield cluster


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


# --- with the model that comes along


def test_a_conversation_in_80x24(demo: Cluster) -> None:
    node = demo.nodes["desk"]
    with Seat("chat", "--socket", str(node.socket), "--temperature", "0") as seat:
        seat.shows("^desk is ready. Type help")
        seat.prompt()
        seat.shows(r"^dgn-demo · 0/512 tokens \(0 %\)$")
        answer = node.ctl("run", "--temperature", "0", "What is the capital of France?").stdout
        shown = seat.say("What is the capital of France?")
        assert " ".join(shown.split("\n")[1:]).split() == answer.split()
        assert all(len(row) < 80 for row in seat.rows())
        seat.shows(r"^dgn-demo · desk · [\d.]+ tok/s · \d+/512 tokens \(\d+ %\)$")
        assert "list the peers" in seat.say("help")
        assert "no peers" in seat.say("peers")
        assert "connect the dots" in seat.say("connect the dots")
        assert "forgotten" in seat.say("clear")
        seat.keys("exit\r")
        assert seat.ends() == 0
    assert node.status().sessions == []


# --- with words that are known


def test_markdown_streams_and_the_session_is_forgotten_at_the_end(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        assert seat.say("**bold** and `code`").split("\n")[1:] == ["bold and code"]
        cell = seat.screen.buffer[seat.screen.cursor.y - 1][0]
        assert (cell.data, cell.bold) == ("b", True)
        seat.keys("\x04")
        assert seat.ends() == 0
    until(lambda: not daemon.service.sessions)


@pytest.mark.parametrize("key", [" ", "\x03"], ids=["space", "ctrl-c"])
def test_a_key_stops_the_answer_within_a_token(daemon: EchoDaemon, key: str) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        seat.keys("slow\r")
        seat.shows(r"w2 ")
        seat.shows("space stops")
        seat.keys(key)
        sent = daemon.service.words
        seat.shows(r"^\(stopped\)$")
        seat.prompt()
        assert daemon.service.cancelled[0] - sent <= 8  # a key takes a moment to arrive
        seat.say("go on")  # the partial answer is in the context
        name = daemon.service.seen[0].session
        assert name is not None
        assert len(daemon.service.sessions[name]) == 1 + daemon.service.cancelled[0] + 2 + 2


def test_what_is_typed_while_an_answer_comes_is_kept(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        seat.keys("slow\r")
        seat.shows("w2 ")
        seat.keys("\x1b[Aabx\x7f\x1bOB ")
        seat.shows(r"^\(stopped\)$")
        seat.shows(r"^> ab$")
        seat.keys("c\r")
        seat.shows(r"^ab c$")
        assert daemon.service.seen[-1].prompt == "ab c"


def test_several_lines_are_one_message(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        seat.keys("one\x1b\rtwo\\\rthree")
        seat.shows("^… three$")
        seat.keys("\r")
        until(lambda: daemon.service.seen)
        seat.prompt()
        seat.keys("\x1b[200~pasted\rlines\x1b[201~")
        seat.shows("^… lines$")
        seat.keys("\r")
        until(lambda: len(daemon.service.seen) == 2)
        assert [seen.prompt for seen in daemon.service.seen] == ["one\ntwo\nthree", "pasted\nlines"]


def test_history_search_and_completion(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        seat.say("first thing")
        seat.say("second thing")
        seat.keys("\x12fir")
        seat.shows("I-search backward: fir")
        seat.shows("first thing")
        seat.keys("\r\r")  # what was found, and sent
        until(lambda: len(daemon.service.seen) == 3)
        assert daemon.service.seen[-1].prompt == "first thing"
        seat.prompt()
        seat.keys("\x1b[A\x1b[A")
        seat.shows("^> second thing$")
        seat.keys("\x15")
        seat.prompt()
        seat.keys("/pe")
        seat.shows("/peers +list the peers")
        seat.keys("\t\r")
        seat.shows("^attic: connected")


def test_wide_characters_stay_in_their_columns(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        text = " ".join(["日本語の文章です"] * 6 + ["😀🎉"] * 6)
        shown = "".join(seat.say(text).replace(" ", "").split("\n"))
        assert shown.count("日本語の文章です") == 12  # as typed, and as answered
        assert "�" not in seat.everything()


def test_no_color(daemon: EchoDaemon) -> None:
    with Seat("chat", env={"NO_COLOR": "1"}) as seat:
        seat.prompt()
        seat.say("`code` **bold**")
        seat.keys("/pe")
        seat.shows("list the peers")
        for code in (b"\x1b[3%d", b"\x1b[4%d", b"\x1b[9%d", b";3%d", b"38;", b"48;"):
            for digit in range(8):
                wanted = code % digit if b"%d" in code else code
                assert wanted + b"m" not in seat.raw
                assert wanted + b";" not in seat.raw


def test_a_model_can_not_steer_the_terminal(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        assert "a[31mred" in seat.say("escape")


def test_errors_are_lines_and_the_chat_goes_on(daemon: EchoDaemon) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        assert "dgnctl: tiny: nobody serves blocks 4-7" in seat.say("missing")
        shown = seat.say("died")
        assert "half" in shown
        assert "dgnctl: the worker of tiny died" in shown
        assert "hello" in seat.say("hello")
        seat.keys("half\x03")
        seat.shows("to leave")
        seat.prompt()


def test_another_size_in_mid_answer(daemon: EchoDaemon) -> None:
    with Seat("chat", columns=60) as seat:
        seat.prompt()
        seat.keys("slow\r")
        seat.shows("w9 ")
        seat.resize(100, 30)
        seat.shows("w60 ")
        seat.keys(" ")
        seat.shows(r"^\(stopped\)$")
        seat.prompt()
        assert "hello" in seat.say("hello")


# --- ends


def flags(seat: Seat) -> int:
    found = termios.tcgetattr(seat.child.child_fd)[3]
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("moment", ["answer", "prompt"])
def test_sigterm_puts_the_terminal_back_and_frees_the_work(daemon: EchoDaemon, moment: str) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        assert not flags(seat) & termios.ICANON
        if moment == "answer":
            seat.keys("slow\r")
            seat.shows("w2 ")
        os.kill(seat.child.pid, signal.SIGTERM)
        assert seat.ends() == 128 + signal.SIGTERM
        assert flags(seat) & termios.ECHO
        assert flags(seat) & termios.ICANON
        assert b"Traceback" not in seat.raw
    if moment == "answer":
        until(lambda: daemon.service.cancelled)
    until(lambda: not daemon.service.sessions)


@pytest.mark.parametrize("moment", ["answer", "prompt"])
def test_a_terminal_that_goes_away_frees_the_work(daemon: EchoDaemon, moment: str) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        if moment == "answer":
            seat.keys("slow\r")
            seat.shows("w2 ")
        seat.child.ptyproc.fileobj.close()
        assert seat.child.ptyproc.wait() == 128 + signal.SIGHUP
    if moment == "answer":
        until(lambda: daemon.service.cancelled)
    until(lambda: not daemon.service.sessions)
