"""Who may use the control socket, beyond what the mode of its file says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from echo_service import EchoDaemon

from dgnd.control.peer_credentials import PeerCredentials, peer_credentials

#: Asks for the status as another user; prints the kind of the error, or the name of the node.
_ASK = """
import grp, os, sys
sys.path[:0] = {path!r}
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError
from pathlib import Path
os.setgroups({groups!r})
os.setgid({gid})
os.setuid(4242)
try:
    with ControlClient(Path({socket!r})) as client:
        print(client.call("status").name)
except DgnError as error:
    print(error.kind, error.message)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="changing users needs root")


@pytest.fixture
def daemon() -> Iterator[EchoDaemon]:
    # Not below tmp_path, which is for its owner alone: only the socket's own mode is to stop anybody.
    with tempfile.TemporaryDirectory(prefix="dgn-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with EchoDaemon(directory / "s") as running:
            os.chown(running.path, 0, 4343)
            yield running


def ask(daemon: EchoDaemon, gid: int, groups: list[int]) -> str:
    script = _ASK.format(path=sys.path, groups=groups, gid=gid, socket=str(daemon.path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("gid", "groups"), [(4343, []), (4242, [4343])], ids=["own", "supplementary"])
def test_members_of_the_group_are_served(daemon: EchoDaemon, gid: int, groups: list[int]) -> None:
    assert not ask(daemon, gid, groups).startswith("permission_denied")


@pytest.mark.parametrize("mode", [0o660, 0o666], ids=["as it is", "loosened"])
def test_nobody_else_is_served_whatever_the_mode(daemon: EchoDaemon, mode: int) -> None:
    daemon.path.chmod(mode)
    said = ask(daemon, 4242, [])
    assert said.startswith("permission_denied")
    if mode == 0o666:
        assert (
            "may not use dgnd's control socket: it is for root, the user of dgnd and members of group 4343"
            in said
        )


def test_what_the_kernel_says_of_a_client() -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = peer_credentials(ours)
    assert found == PeerCredentials(os.getpid(), os.getuid(), frozenset((os.getgid(), *os.getgroups())))
