"""Conversations that are kept, for their user alone: resumed, listed, removed, exported."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from echo_service import EchoDaemon
from seat import Seat

from dgnctl.chat_file import SavedChat
from dgnctl.chat_store import ChatStore, history_file, state_dir
from dgnctl.cli import run_command
from dgnctl.token_file import read_ids
from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest, NotFound


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def ctl(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = run_command(list(arguments))
    out, err = capfd.readouterr()
    return code, out, err


def chat(*said: str, model: str = "tiny") -> SavedChat:
    messages = [ChatMessage(role, text) for text in said for role in ("user", "assistant")]
    return SavedChat(messages, model=model, token_ids=[1, 2], saved="2026-01-01T00:00:00Z")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_a_chat_is_kept_and_resumed(daemon: EchoDaemon, tmp_path: Path, terminal: str) -> None:
    env = {"TERM": terminal}
    before = os.umask(0)
    try:
        with Seat("chat", "--system", "be brief", env=env) as seat:
            seat.prompt()
            seat.say("hello there")
            seat.say("/set temperature 0.5")
            seat.say("and again")
            seat.keys("exit\r")
            assert seat.ends() == 0
    finally:
        os.umask(before)
    (path,) = (tmp_path / "state/dgn/chats").iterdir()
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    ids = json.loads(path.read_text())["token_ids"]
    assert len(ids) == 8
    assert not daemon.service.sessions
    with Seat("chat", "--resume", env=env) as seat:
        seat.shows("the conversation goes on")
        seat.shows("^> and again$")
        seat.shows("^and again")
        seat.prompt()
        seat.say("third")
        request = daemon.service.seen[-1]
        assert (request.prompt, request.temperature, request.system) == ("third", 0.5, None)
        assert [*ids, 100, 1000] in daemon.service.sessions.values()
        assert "chats rm" in " ".join(seat.say("clear").split())
        seat.say("another one")
    assert len(list((tmp_path / "state/dgn/chats").iterdir())) == 2
    saved = json.loads(path.read_text())
    assert [message["content"] for message in saved["messages"][1::2]] == [
        "hello there",
        "and again",
        "third",
    ]


def test_options_go_before_what_was_kept(daemon: EchoDaemon) -> None:
    ChatStore().write("20260101-000000-0000", chat("one"))
    with Seat("chat", "--resume", "2026", "--temperature", "0", "--system", "new") as seat:
        seat.prompt()
        seat.say("two")
    request = daemon.service.seen[-1]
    assert request.temperature == 0
    assert request.messages is not None  # read again, under the new system message
    assert [message.content for message in request.messages] == ["new", "one", "one", "two"]


def test_nothing_is_kept_where_it_should_not_be(daemon: EchoDaemon, tmp_path: Path) -> None:
    with Seat("chat", "--no-keep") as seat:
        seat.prompt()
        seat.say("a secret")
    done = subprocess.run([sys.executable, "-m", "dgnctl", "chat"], input=b"hello\n", capture_output=True)
    assert done.stdout == b"hello \n"
    assert not (tmp_path / "state").exists()


def test_a_state_that_can_not_be_written_is_said_once(daemon: EchoDaemon, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    with Seat("chat") as seat:
        seat.shows("what is typed is not kept")
        seat.prompt()
        assert "is not kept" in seat.say("hello")
        assert "is not kept" not in seat.say("again")


def test_a_state_that_can_not_be_written_any_more(daemon: EchoDaemon, tmp_path: Path) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        history, chats = tmp_path / "state/dgn/chat_history", tmp_path / "state/dgn/chats"
        history.unlink()
        history.mkdir()
        chats.write_text("in the way")
        shown = seat.say("hello")
        assert "what is typed is not kept" in shown
        assert "conversation is not kept" in shown
        assert "not kept" not in seat.say("again")
        chats.unlink()
        seat.say("once more")
        assert len(list(chats.iterdir())) == 1


def test_what_was_typed_is_found_by_the_next_chat(daemon: EchoDaemon, tmp_path: Path) -> None:
    with Seat("chat") as seat:
        seat.prompt()
        seat.say("remember me")
    with Seat("chat") as seat:
        seat.prompt()
        seat.keys("\x1b[A")
        seat.shows("^> remember me$")
    assert mode(tmp_path / "state/dgn/chat_history") == 0o600


def test_list_show_rm_export(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no conversation is kept" in ctl(capfd, "chats", "list")[1]
    store = ChatStore()
    store.write("20260101-000000-0000", chat("older"))
    store.write("20260102-000000-0000", chat("newer\nwith a line", "more"))
    (store.directory / "other.txt").write_text("not ours")
    (store.directory / "20260103-000000-0000.json").write_text("{")
    code, out, _ = ctl(capfd, "chats", "list")
    assert code == 0
    rows = out.splitlines()[1:]
    assert [row.split()[0][:8] for row in rows if row[0] == "2"] == ["20260103", "20260102", "20260101"]
    assert "newer with a line" in out
    assert "no saved conversation" in " ".join(out.split())
    entries: Any = json.loads(ctl(capfd, "chats", "list", "--json")[1])
    assert entries[1]["begins"] == "newer with a line"
    assert ctl(capfd, "chats", "show", "20260101")[1] == "user: older\n\nassistant: older\n\n"
    assert json.loads(ctl(capfd, "chats", "show", "20260101", "--json")[1])["token_ids"] == [1, 2]
    assert ctl(capfd, "chats", "export", "20260102", "x.csv")[0] == 0
    assert read_ids(Path("x.csv")) == [1, 2]
    assert ctl(capfd, "chats", "export", "20260102", "x.json")[0] == 0
    assert Path("x.json").read_bytes() == store.path("20260102-000000-0000").read_bytes()
    assert json.loads(ctl(capfd, "chats", "export", "20260102", "-")[1])["model"] == "tiny"
    code, _, err = ctl(capfd, "chats", "rm", "20260101", "nosuch")
    assert (code, "no conversation 'nosuch'" in err) == (2, True)
    assert len(store.ids()) == 3  # none went before all were found
    os.mkfifo(store.path("20260104-000000-0000"))  # no conversation, and nothing to wait for
    assert len(store.ids()) == 3
    assert "is the begin of 3" in ctl(capfd, "chats", "show", "2026")[2]
    assert ctl(capfd, "chats", "rm", "20260101", "20260103")[0] == 0
    assert store.ids() == ["20260102-000000-0000"]
    assert ctl(capfd, "chats", "show", "last")[1].startswith("user: newer")


def test_the_last_one_is_the_one_held_last() -> None:
    store = ChatStore()
    with pytest.raises(NotFound):
        store.last()
    for name in ("20260101-000000-0000", "20260102-000000-0000"):
        store.write(name, chat("x"))
    os.utime(store.path("20260102-000000-0000"), (1, 1))
    assert store.find("last") == "20260101-000000-0000"
    with pytest.raises(NotFound):
        store.find("")
    with pytest.raises(NotFound):
        store.find("../../etc")


def test_where_the_state_is() -> None:
    assert state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/dgn")
    assert state_dir({"XDG_STATE_HOME": "relative"}) == Path.home() / ".local/state/dgn"


def test_a_long_history_is_shortened(tmp_path: Path) -> None:
    path = history_file(tmp_path)
    path.write_text("".join(f"\n# 2026-01-01\n+line {i}\n" for i in range(100_000)))
    history_file(tmp_path)
    kept = path.read_text()
    assert len(kept) < 1 << 20
    assert kept.startswith("\n# 2026-01-01\n+line ")
    assert kept.endswith("+line 99999\n")
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest):
        history_file(tmp_path / "file")
