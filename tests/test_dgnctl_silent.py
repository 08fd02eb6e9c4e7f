"""A dgnd that is stopped, or hangs: dgnctl says so in one line and ends, whatever it waits for."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import echo_service
import pytest
from echo_service import PEER, EchoDaemon

from dgnctl.cli import run_command
from dgnctl.follow import follow, interrupts
from dgnd.control import api, client, connecting
from dgnd.control.client import ControlClient
from dgnd.errors import DaemonSilent, NotReady

FAR = f"/ip4/10.0.0.98/tcp/4001/p2p/{PEER}"  # the echo service dials it for ever
COMMANDS = [
    ["status"], ["peers"], ["map"], ["models"], ["cache", "list"], ["cache", "clear"], ["drain"],
    ["connect", FAR], ["run", "hello"], ["run", "--wait", "60", "hello"], ["run", "x" * 3_000_000],
]  # fmt: skip


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DGN_SOCKET", str(tmp_path / "s"))
    monkeypatch.setattr(client, "PROBE_AFTER_S", 0.05)
    monkeypatch.setattr(client, "PROBE_S", 1.0)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, echo_service.__file__, str(tmp_path / "s")]) as process:
        end = time.monotonic() + 30
        while not (tmp_path / "s").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        with ControlClient(tmp_path / "s") as first:
            first.call("status")
        yield process
        process.kill()  # also where it is stopped


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words)[:20])
def test_a_stopped_daemon_is_given_up(
    daemon: subprocess.Popen[bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    daemon.send_signal(signal.SIGSTOP)
    assert run_command(command) == 3
    text = f"dgnd at {tmp_path / 's'} does not answer: it is stopped, hung or overloaded"
    assert capfd.readouterr() == ("", f"dgnctl: {text}; see its log, or restart it\n")


def test_an_answer_that_stands_still_is_given_up(daemon: subprocess.Popen[bytes], tmp_path: Path) -> None:
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 5:
            daemon.send_signal(signal.SIGSTOP)

    with ControlClient(tmp_path / "s") as asking, interrupts() as noted:
        stream = asking.start_generate(api.GenerateParams(prompt="slow"))
        with pytest.raises(DaemonSilent):
            follow(stream, show, noted)
    assert "".join(shown).startswith("w0 w1 w2 w3 w4 ")


def test_who_takes_long_but_lives_is_waited_for(tmp_path: Path) -> None:
    with EchoDaemon(tmp_path / "s"), ControlClient(tmp_path / "s") as waiting:
        with pytest.raises(NotReady, match="did not answer in time"):
            waiting.call("peers.connect", api.ConnectParams(addr=FAR), timeout_s=3.0)
        assert waiting.call("status").name == "desk"


def test_the_kind_in_json(daemon: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    daemon.send_signal(signal.SIGSTOP)
    assert run_command(["status", "--json"]) == 3
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["kind"], error["data"]["retryable"]) == ("daemon_silent", True)


def test_a_full_queue_of_connections_is_given_up(
    daemon: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "CONNECT_TIMEOUT_S", 0.2)
    daemon.send_signal(signal.SIGSTOP)
    with contextlib.ExitStack() as held:

        def fill() -> None:
            while True:
                held.enter_context(ControlClient(tmp_path / "s"))

        with pytest.raises(DaemonSilent):
            fill()
