"""sd_notify, and the unit that relies on it."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgnd import sdnotify

UNIT = Path(__file__).resolve().parent.parent / "packaging/systemd/dgnd.service"


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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    # verify wants the command to exist; the place where dgnd is installed is the only thing changed.
    text = UNIT.read_text()
    assert "/usr/bin/dgnd" in text
    unit = tmp_path / "dgnd.service"
    for program in ("dgnd", "dgnctl"):
        text = text.replace(f"/usr/bin/{program} ", f"{Path(sys.executable).parent / program} ")
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_says_what_the_daemon_does() -> None:
    lines = UNIT.read_text().splitlines()
    for line in ("Type=notify", "User=dgn", "StateDirectory=dgn", "RuntimeDirectory=dgn"):
        assert line in lines
