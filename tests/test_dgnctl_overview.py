"""`dgnctl` without a command: the state, and the command that is useful next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from echo_service import PEER, EchoDaemon, EchoService

from dgnctl import overview
from dgnctl.cli import run_command
from dgnd.control import api
from dgnd.errors import NoDaemon


def shown(capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run_command([])
    out, err = capfd.readouterr()
    assert err == ""
    assert all(len(line) <= 80 or "/" in line for line in out.splitlines())  # a path is one word
    assert out.split()[-4:] == ["dgnctl", "--help", "all", "commands"]
    return code, out


@pytest.mark.parametrize(
    ("there", "next_one"),
    [("nothing", "dgnctl setup"), ("config", "dgnd --config "), ("unit", "systemctl start dgnd")],
)
def test_without_a_daemon_it_says_how_to_start_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    there: str,
    next_one: str,
) -> None:
    monkeypatch.setenv("DGN_SOCKET", str(tmp_path / "none.sock"))
    monkeypatch.setattr(overview, "SYSTEM_CONFIG", tmp_path / "dgn.toml")
    monkeypatch.setattr(overview, "_UNITS", (tmp_path,))
    if there != "nothing":
        (tmp_path / "dgn.toml").touch()
    if there == "unit":
        (tmp_path / "dgnd.service").touch()
    code, out = shown(capfd)
    assert code == NoDaemon.exit_code
    assert "no dgnd is running" in out
    assert next_one in out


def test_with_a_daemon_the_state_and_what_is_wrong(
    daemon: EchoDaemon, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out = shown(capfd)
    assert code == 0
    assert out.startswith("desk: degraded")
    assert "dgnctl map" in out
    assert "4-7,head of tiny" in out
    assert "dgnctl peers --refused" in out
    assert "dgnctl chat" not in out  # blocks are missing


STATES: list[tuple[dict[str, Any], str]] = [
    ({"state": "ready"}, "dgnctl chat "),
    ({"state": "loading"}, "dgnctl chat --wait 120"),
    ({"state": "paused", "why": "paused by hand"}, "dgnctl resume"),
    ({"state": "drained"}, "dgnctl drain --undo"),
    ({"state": "ready", "workers": [api.WorkerStatus("m", "0-3", None, "failed", "onnx", 0, 0)]}, "backends"),
]


@pytest.mark.parametrize(("changes", "says"), STATES)
def test_each_state_has_its_next_command(
    daemon: EchoDaemon,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    says: str,
) -> None:
    whole = trio.run(EchoService().status)
    status = msgspec.structs.replace(whole, missing={}, **changes)

    async def changed(_: EchoService) -> api.Status:
        return status

    monkeypatch.setattr(EchoService, "status", changed)
    assert says in shown(capfd)[1]


def test_a_node_without_models_is_told_how_to_get_one(
    daemon: EchoDaemon, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def none(_: EchoService) -> list[api.ModelInfo]:
        return []

    monkeypatch.setattr(EchoService, "models_list", none)
    out = shown(capfd)[1]
    assert "dgnctl reload" in out
    assert "[models.NAME]" in out
    assert PEER not in out
