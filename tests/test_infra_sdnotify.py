"""sd_notify: what the service manager receives."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgnd.systemd import sdnotify


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's socket, and its name as it stands in $NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@dgn-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0", 1))
        receiver.settimeout(5)
        yield name, receiver


def test_what_the_manager_receives(
    manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, receiver = manager
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert sdnotify.ready("two\nblocks ")
    assert receiver.recv(1000) == b"READY=1\nSTATUS=two blocks"
    assert sdnotify.status("loading")
    assert receiver.recv(1000) == b"STATUS=loading"
    assert sdnotify.stopping(2.5)
    assert receiver.recv(1000) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=2500000"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_nobody_asked(environ: dict[str, str]) -> None:
    assert not sdnotify.notify("READY=1", environ)


def test_the_manager_is_gone(tmp_path: Path) -> None:
    assert not sdnotify.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_long_the_watchdog_waits(environ: dict[str, str], found: float | None) -> None:
    assert sdnotify.watchdog_s(environ) == found
