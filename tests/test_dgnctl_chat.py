"""`dgnctl chat` at a pseudo-terminal and over pipes, with the real server over a real socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from echo_service import PEER, EchoDaemon
from hypothesis import given
from hypothesis import strategies as st

from dgnctl import chat_line
from dgnctl.token_file import read_ids, write_ids
from dgnctl.type_ahead import TypeAhead
from dgnd.errors import BadRequest

ADDRESS = f"/ip4/10.0.0.2/tcp/4001/p2p/{PEER}"
CHAT = ["-m", "dgnctl", "chat"]


@pytest.fixture
def daemon(daemon: EchoDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EchoDaemon:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return daemon


class Person:
    """Someone at a terminal."""

    def __init__(self, *args: str) -> None:
        self.child = pexpect.spawn(
            sys.executable, [*CHAT, *args], timeout=60, encoding="utf-8", dimensions=(24, 80)
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

    def say(self, line: str, *answers: str) -> None:
        """Types a line, sees the answers in order, and the next prompt."""
        self.child.sendline(line)
        self.child.expect_exact("\n")  # the line's own echo
        for answer in answers:
            self.child.expect_exact(answer)
        self.prompt()

    def settings(self) -> list[object]:
        return list(termios.tcgetattr(self.child.child_fd))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


# --- at a terminal ---


def test_a_conversation_keeps_its_session_and_forgets_it_at_the_end(daemon: EchoDaemon) -> None:
    with Person("--system", "be brief") as person:
        person.say("hello there", "hello there ")
        person.say("and again", "and again ")
        person.child.sendline("exit")
        person.child.expect(pexpect.EOF)
        person.child.wait()
        assert person.child.exitstatus == 0
    first, second = daemon.service.seen
    assert first.session == second.session
    assert (first.system, second.system) == ("be brief", None)
    until(lambda: not daemon.service.sessions)


def test_a_named_session_is_kept(daemon: EchoDaemon) -> None:
    with Person("--session", "mine") as person:
        person.say("hello", "hello ")
        person.child.sendeof()
        person.child.expect(pexpect.EOF)
    assert list(daemon.service.sessions) == ["mine"]


@pytest.mark.parametrize("key", [" ", "\x03"], ids=["space", "ctrl-c"])
def test_a_key_stops_the_answer_within_a_token(daemon: EchoDaemon, key: str) -> None:
    with Person() as person:
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
        before = daemon.service.seen
        person.child.send(key)
        person.child.expect_exact("(stopped)")
        person.prompt()
        assert len(before) == 1
        assert 3 <= daemon.service.cancelled[0] <= 8  # it takes this test a token or two to press the key
        person.say("go on", "go on ")  # the partial answer is in the context
        name = daemon.service.seen[0].session
        assert name is not None
        assert len(daemon.service.sessions[name]) == 1 + daemon.service.cancelled[0] + 2 + 2


def test_what_is_typed_while_an_answer_comes_is_kept(daemon: EchoDaemon) -> None:
    with Person() as person:
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
        person.child.send("abx\x7f")
        person.child.send(" ")
        person.child.expect_exact("(stopped)")
        person.child.expect_exact("\n> ab")
        person.child.sendline("c")
        person.child.expect_exact("ab c ")
        person.prompt()
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
        person.child.send("/save talk.json\r")  # a space that stops is of the line too
        person.child.expect_exact("(stopped)")
        person.child.expect_exact("\n> /save talk.json")
        person.child.expect_exact("messages written to talk.json")
        person.prompt()
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
        person.child.send("whole\r \x1b[A")
        person.child.expect_exact("(stopped)")
        person.child.expect_exact("\n> whole")
        person.child.expect_exact("whole ")
        person.prompt()


def test_the_terminal_is_as_before_after_an_answer(daemon: EchoDaemon) -> None:
    with Person() as person:
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
        flags = person.settings()[3]
        assert isinstance(flags, int)
        assert not flags & (termios.ECHO | termios.ICANON)
        person.child.send(" ")
        person.prompt()
        person.child.sendline("exit")
        person.child.expect(pexpect.EOF)
        flags = person.settings()[3]
        assert isinstance(flags, int)
        assert flags & termios.ECHO
        assert flags & termios.ICANON


@pytest.mark.parametrize("moment", ["answer", "prompt"])
def test_sigterm_puts_the_terminal_back_and_frees_the_work(daemon: EchoDaemon, moment: str) -> None:
    with Person() as person:
        if moment == "answer":
            person.child.sendline("slow")
            person.child.expect_exact("w2 ")
        person.child.kill(signal.SIGTERM)
        person.child.expect(pexpect.EOF)
        flags = person.settings()[3]
        assert isinstance(flags, int)
        assert flags & termios.ECHO
        assert flags & termios.ICANON
        person.child.wait()
        assert person.child.exitstatus == 128 + signal.SIGTERM
    if moment == "answer":
        until(lambda: daemon.service.cancelled)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_however_a_chat_ends_its_session_is_forgotten(daemon: EchoDaemon, number: signal.Signals) -> None:
    with Person() as person:
        person.say("hello", "hello ")
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
        assert daemon.service.sessions
        person.child.kill(number)
        person.child.expect(pexpect.EOF)
    until(lambda: daemon.service.cancelled)
    until(lambda: not daemon.service.sessions)


@pytest.mark.parametrize("moment", ["answer", "prompt"])
def test_a_terminal_that_goes_away_frees_the_work(daemon: EchoDaemon, moment: str) -> None:
    with Person() as person:
        if moment == "answer":
            person.child.sendline("slow")
            person.child.expect_exact("w2 ")
        person.child.ptyproc.fileobj.close()  # as a terminal emulator does that is closed; it kills nobody
        assert person.child.ptyproc.wait() == 128 + signal.SIGHUP
    if moment == "answer":
        until(lambda: daemon.service.cancelled)
        assert daemon.service.cancelled[0] < 100
        until(lambda: not daemon.service.sessions)


def test_a_hang_up_keeps_the_conversation(daemon: EchoDaemon) -> None:
    with Person() as person:
        person.say("hello", "hello ")
        person.child.sendline(f"connect {ADDRESS.replace('0.2', '0.98')}")
        until(lambda: daemon.service.connecting)
        person.child.send("\x03")
        person.child.expect_exact("interrupted")
        person.prompt()
        until(lambda: daemon.service.cut)
        person.say("again", "again ")
        (said,) = daemon.service.sessions.values()
        assert len(said) == 4


def test_save_and_load(daemon: EchoDaemon, tmp_path: Path) -> None:
    with Person() as person:
        person.say("one two", "one two ")
        person.say("/save talk.csv", "4 token ids written to talk.csv")
        assert (tmp_path / "talk.csv").read_text() == "100,101,1000,1001\n"
        person.say("clear", "forgotten")
        assert daemon.service.sessions == {}
        person.say("/load talk.csv", "4 token ids read from talk.csv")
        person.say("three", "three ")
        assert list(daemon.service.sessions.values()) == [[100, 101, 1000, 1001, 100, 1000]]
        (tmp_path / "bad.csv").write_text("1,2\n3,x\n")
        person.say("/load bad.csv", "bad.csv:2: 'x' is not a token id")
        person.say("/load nosuch.csv", "can't be read")
        person.say("/save no/such/dir.csv", "can't be written")


def test_connect_is_a_command_only_with_an_address(daemon: EchoDaemon) -> None:
    with Person() as person:
        person.say("connect the dots", "connect the dots ")
        assert [params.prompt for params in daemon.service.seen] == ["connect the dots"]
        person.say(f"connect {ADDRESS}", "connected: attic offers tiny 4-7,head")
        person.say(f"connect {ADDRESS.replace('0.2', '0.99')}", "doesn't list this node")
        person.say("/connect the dots", "takes a peer's address")
        assert len(daemon.service.seen) == 1


def test_ctrl_c_gives_up_a_command_that_hangs(daemon: EchoDaemon) -> None:
    with Person() as person:
        person.child.sendline(f"connect {ADDRESS.replace('0.2', '0.98')}")
        person.child.expect_exact("\n")
        time.sleep(0.3)
        person.child.send("\x03")
        person.child.expect_exact("interrupted")
        person.prompt()
        person.say("still here", "still here ")


def test_the_other_commands(daemon: EchoDaemon) -> None:
    with Person() as person:
        person.say("help", "/save FILE", "Space or Ctrl-C")
        person.say("peers", "attic: connected", ADDRESS.replace("0.2", "0.1"))
        person.say("/nonsense", "no command /nonsense")
        person.say("full", "context is full with 2 tokens; type clear")
        person.say("escape", "a[31mred")
        person.child.send("half a line\x03")
        person.child.expect_exact("to leave")
        person.prompt()
        assert [params.prompt for params in daemon.service.seen] == ["full", "escape"]


def test_the_chat_goes_on_after_errors(daemon: EchoDaemon) -> None:
    with Person("--max-tokens", "7") as person:
        person.say("missing", "dgnctl: tiny: nobody serves blocks 4-7")
        person.say("died", "half ", "dgnctl: the worker of tiny died")
        person.say("crash", "dgnctl: generate: a fault in dgnd")
        person.say("hello", "hello ")
        assert daemon.service.seen[-1].max_tokens == 7


def test_an_empty_line_asks_again_what_found_no_nodes(daemon: EchoDaemon) -> None:
    """dgnd has no answer to go on with: not one token came."""
    with Person("--system", "be brief") as person:
        person.say("missing it", "nobody serves blocks 4-7; an empty line asks again")
        person.say("", "an empty line asks again")
        assert [(seen.prompt, seen.system, seen.resume) for seen in daemon.service.seen] == [
            ("missing it", "be brief", False)
        ] * 2
        person.say("clear")
        person.child.sendline("")  # nothing
        person.say("died", "an empty line goes on with the answer")
        person.child.sendline("")
        until(lambda: len(daemon.service.seen) == 4)
        assert [(seen.prompt, seen.resume) for seen in daemon.service.seen[2:]] == [
            ("died", False),
            (None, True),
        ]


def test_a_daemon_that_was_restarted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.sock"
    monkeypatch.setenv("DGN_SOCKET", str(path))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    person = Person()
    person.child.expect_exact("no dgnd is running")
    person.child.expect(pexpect.EOF)
    person.child.wait()
    assert person.child.exitstatus == 3
    with EchoDaemon(path):
        person = Person().__enter__()
        person.say("hello", "hello ")
    try:
        person.say("are you there", "closed the connection")
        person.say("are you there", "no dgnd is running")
        with EchoDaemon(path):
            person.say("and now", "has forgotten the conversation", "and now ")
            person.child.sendline("exit")
            person.child.expect(pexpect.EOF)
    finally:
        person.__exit__()


def test_a_session_that_was_cleared_is_told_again(daemon: EchoDaemon) -> None:
    """As by `dgnctl cache clear`: what is said next must not be answered without what was said before."""
    with Person() as person:
        person.say("hello", "hello ")
        daemon.service.sessions.clear()
        person.say("again", "has forgotten the conversation", "again ")
        assert list(daemon.service.sessions.values()) == [[100, 1000, 100, 1000]]
        person.say("clear", "forgotten")
        person.say("anew", "anew ")
        assert list(daemon.service.sessions.values()) == [[100, 1000]]


def test_a_daemon_that_dies_in_mid_answer_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.sock"
    monkeypatch.setenv("DGN_SOCKET", str(path))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    with EchoDaemon(path) as first:
        person = Person().__enter__()
        person.say("hello", "hello ")
        person.child.sendline("slow")
        person.child.expect_exact("w2 ")
    try:
        person.child.expect_exact("an empty line asks again")
        person.prompt()
        person.say("/save talk.json", "2 messages written to talk.json")
        person.say("/save talk.csv", "2 token ids written to talk.csv")
        person.say("", "no dgnd is running", "an empty line asks again")
        with EchoDaemon(path) as second:
            name = first.service.seen[0].session
            assert name is not None
            second.service.sessions[name] = []  # a request that failed may have begun one with this name
            person.child.sendline("")
            person.child.expect_exact("has forgotten the conversation")
            person.child.expect_exact("w2 ")
            person.child.send(" ")
            person.prompt()
            (asked,) = second.service.seen
            assert (asked.prompt, asked.resume) == ("slow", False)
            assert second.service.sessions[name][:3] == [100, 1000, 100]
            person.child.sendline("exit")
            person.child.expect(pexpect.EOF)
    finally:
        person.__exit__()


# --- over pipes ---


def piped(said: bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *CHAT, *args], input=said, capture_output=True, timeout=90)


def test_lines_in_answers_out(daemon: EchoDaemon) -> None:
    done = piped("one\n\n  two ünï \nconnect the dots".encode())
    assert done.returncode == 0
    assert done.stdout.decode() == "one \ntwo ünï \nconnect the dots \n"
    assert done.stderr == b""
    assert len({params.session for params in daemon.service.seen}) == 1
    until(lambda: not daemon.service.sessions)


def test_errors_go_to_stderr_and_the_next_line_is_answered(daemon: EchoDaemon) -> None:
    done = piped(b"missing\n\xff\nhello\n")
    assert done.stdout == b"hello \n"
    assert done.stderr.count(b"\n") == 2
    assert done.returncode != 0
    assert piped(b"hello\nexit\nnever said\n").stdout == b"hello \n"


def test_ctrl_c_over_pipes_ends_the_chat(daemon: EchoDaemon) -> None:
    with subprocess.Popen([sys.executable, *CHAT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"slow\nnever said\n")
        process.stdin.flush()
        process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(daemon.service.cancelled) == len(daemon.service.seen) == 1


def test_a_reader_that_left_ends_the_chat(daemon: EchoDaemon) -> None:
    with subprocess.Popen([sys.executable, *CHAT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"slow\n")
        process.stdin.flush()
        process.stdout.read(3)
        process.stdout.close()
        assert process.wait(10) == 141
    until(lambda: daemon.service.cancelled)


# --- the parts ---


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("", None),
        (" \t\n", None),
        ("help\n", chat_line.Plain("help")),
        ("/exit", chat_line.Plain("exit")),
        ("help me", chat_line.Say("help me")),
        ("exit strategy", chat_line.Say("exit strategy")),
        ("connect the dots", chat_line.Say("connect the dots")),
        ("connect", chat_line.Say("connect")),
        (f"connect  {ADDRESS} ", chat_line.WithArgument("connect", ADDRESS)),
        (f"/connect {ADDRESS}", chat_line.WithArgument("connect", ADDRESS)),
        (f"connect {ADDRESS} please", chat_line.Say(f"connect {ADDRESS} please")),
        ("/save a b.csv", chat_line.WithArgument("save", "a b.csv")),
        ("save the whales", chat_line.Say("save the whales")),
        ("/etc holds what?", chat_line.Say("/etc holds what?")),
        ("/etc/passwd", chat_line.Say("/etc/passwd")),
        ("clear", chat_line.Plain("clear")),
        ("Clear", chat_line.Say("Clear")),
    ],
)
def test_what_a_line_means(line: str, meaning: chat_line.Line | None) -> None:
    assert chat_line.parse(line) == meaning


@pytest.mark.parametrize("line", ["/save", "/load ", "/nope", "/connect", "/connect x"])
def test_mistakes_are_not_said_to_the_model(line: str) -> None:
    assert isinstance(chat_line.parse(line), chat_line.Mistake)


@given(st.text())
def test_any_line_means_something(line: str) -> None:
    meaning = chat_line.parse(line)
    assert (meaning is None) == (not line.strip())
    if isinstance(meaning, chat_line.Say):
        assert meaning.text == line.strip()


def test_help_names_every_command() -> None:
    for word in ("help", "exit", "peers", "connect", "clear", "/save", "/load"):
        assert f"\n{word}" in "\n" + chat_line.HELP


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1), st.sampled_from([",", ", ", ",\n", "\n", " ,\r\n"]))
def test_token_files_survive(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], separator: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "ids.csv"
    write_ids(path, ids)
    assert read_ids(path) == ids
    path.write_text(separator.join(map(str, ids)))
    assert read_ids(path) == ids


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"1,,2", b"1;2", b"-1", b"1.5", b"2147483648", b"\xff", "١".encode(), b"1" * 5000],
)
def test_what_is_no_token_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"x\.csv"):
        read_ids(path)


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(BadRequest, match="no file of token ids"):
        read_ids(path)


@given(st.lists(st.binary(max_size=8)))
def test_any_keys_are_text_or_nothing(chunks: list[bytes]) -> None:
    ahead = TypeAhead()
    stopped = [ahead.receive(chunk) for chunk in chunks]
    assert stopped == sorted(stopped)  # once stopped, it stays so until the next answer
    kept = ""
    while (line := ahead.take_line()) is not None:
        kept += line
    kept += ahead.take_rest()
    assert kept.isprintable()
    ahead.begin()
    assert not ahead.receive(b"x")
