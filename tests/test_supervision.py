"""A real daemon under a fake service manager: when it says what, and when it feeds the watchdog."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.lowlevel
from cluster import Cluster, Row, TestNode
from fake_supervisor import FakeSupervisor, activated, listening
from plugin_site import Site
from tiny_llama import make_tiny_llama

from dgnd.control.client import ControlClient
from dgnd.systemd import restarts, sdnotify, supervision
from dgnd.systemd.restarts import Restarts
from dgnd.waiting import wait_while

WATCHDOG_S = 3.0
SPAN = "embed,0-1,head"

#: Loads at once; its first step fails for as long as a file is there.
_PLUGIN = """
import pathlib, time
from dgn_backends.reference import ReferenceBackend

class Late:
    name = "late"
    def devices(self): return ["cpu"]
    def load(self, request, progress):
        runner = ReferenceBackend().load(request, progress)
        forward = runner.forward
        def late(steps):
            if pathlib.Path(@FILE@).exists():
                raise OSError("not yet")
            return forward(steps)
        runner.forward = late
        return runner
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=2)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path, WATCHDOG_S) as found:
        yield found


@pytest.fixture
def node(model: Path, tmp_path: Path, supervisor: FakeSupervisor) -> Iterator[TestNode]:
    """Configured, not started."""
    with Cluster(tmp_path / "nodes", model) as cluster:
        found = cluster.add("a")
        found.extra_env |= supervisor.environment
        cluster.configure("a", [Row("a", SPAN)])
        yield found


def until(condition: object, what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds:.0f} s"
        time.sleep(0.05)


def test_ready_comes_when_it_serves_and_the_status_lines_say_how_it_is(
    node: TestNode, supervisor: FakeSupervisor
) -> None:
    node.start()
    until(lambda: supervisor.first("READY"), "READY")
    status = node.status()
    assert status.state == "ready"
    lines = supervisor.all("STATUS")
    assert any(line.startswith("loading: ") for line in lines)
    assert f"ready: serves m {SPAN}; 0 sessions" in lines
    assert status.why == f"serves m {SPAN}; 0 sessions"
    assert node.terminate() == 0
    assert supervisor.all("STOPPING") == ["1"]
    assert "stopping: its sessions are handed over first" in supervisor.all("STATUS")


def test_a_worker_that_has_loaded_but_can_not_compute_is_not_ready(
    model: Path, tmp_path: Path, supervisor: FakeSupervisor
) -> None:
    flaw = tmp_path / "flaw"
    flaw.touch()
    site = Site(tmp_path / "site")
    source = _PLUGIN.replace("@FILE@", repr(str(flaw)))
    site.add("late-backend", {"late": "late_plugin:Late"}, {"late_plugin": source})
    with Cluster(tmp_path / "nodes", model, backend="late") as cluster:
        node = cluster.add("a")
        node.extra_env |= site.environment | supervisor.environment
        cluster.configure("a", [Row("a", SPAN)])
        node.start()
        node.wait_for(lambda: "self-test of embed,0-1,head" in node.log, what="self-test")
        assert "late-backend 1.5 raised OSError: not yet" in node.log.replace(
            "late-backend 1.0", "late-backend 1.5"
        )
        assert supervisor.first("READY") is None
        assert node.state() in ("loading", "degraded")
        flaw.unlink()
        until(lambda: supervisor.first("READY"), "READY")


def test_the_watchdog_is_fed_and_not_by_a_daemon_that_stands_still(
    node: TestNode, supervisor: FakeSupervisor
) -> None:
    node.start()
    until(lambda: len(supervisor.all("WATCHDOG")) >= 3, "food")
    first = supervisor.first("WATCHDOG")
    ready = supervisor.first("READY")
    assert ready is not None
    assert first is not None
    assert first >= ready
    node.signal(signal.SIGSTOP)
    try:
        time.sleep(0.5)
        before = len(supervisor.all("WATCHDOG"))
        time.sleep(WATCHDOG_S)
        assert len(supervisor.all("WATCHDOG")) == before
    finally:
        node.signal(signal.SIGCONT)
    until(lambda: len(supervisor.all("WATCHDOG")) > before, "food after the pause")


def test_the_watchdog_is_not_fed_where_the_control_socket_does_not_answer(
    node: TestNode, supervisor: FakeSupervisor
) -> None:
    node.start()
    until(lambda: supervisor.all("WATCHDOG"), "food")
    node.socket.rename(node.socket.with_name("elsewhere"))  # the event loop runs as before
    time.sleep(1.0)  # what was under way
    before = len(supervisor.all("WATCHDOG"))
    time.sleep(WATCHDOG_S)
    assert len(supervisor.all("WATCHDOG")) == before
    assert "does not answer" in node.log
    node.socket.with_name("elsewhere").rename(node.socket)
    until(lambda: len(supervisor.all("WATCHDOG")) > before, "food")


def test_a_reload_by_signal_is_told_of_and_a_mistake_in_it_is_named(
    node: TestNode, supervisor: FakeSupervisor
) -> None:
    node.start()
    until(lambda: supervisor.first("READY"), "READY")
    text = node.config.read_text()
    node.config.write_text(text.replace("[control]", "drain_s = 7\n[control]"))
    node.signal(signal.SIGHUP)
    until(lambda: len(supervisor.all("READY")) == 2, "READY after the reload")
    assert len(supervisor.all("RELOADING")) == 1
    assert supervisor.all("MONOTONIC_USEC")
    node.config.write_text(text + "\nwrong = 1\n")
    node.signal(signal.SIGHUP)
    until(lambda: len(supervisor.all("READY")) == 3, "READY after the mistake")
    assert any(line.startswith("the configuration stays as it was: ") for line in supervisor.all("STATUS"))
    assert node.state() == "ready"


def test_a_socket_that_was_passed_on_is_served_and_left_where_it_is(
    node: TestNode, supervisor: FakeSupervisor, tmp_path: Path
) -> None:
    with listening(node.socket) as listener:
        inode = node.socket.stat().st_ino
        node.before, node.pass_fds = activated(listener), (listener.fileno(),)
        client = ControlClient(node.socket)  # before anybody is there to accept it
        with client:
            node.start()
            assert client.call("status").name == "a"
        node.wait_ready()
        (pid,) = node.worker_pids()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"LISTEN_" not in environment
        assert not [link for link in fds_of(pid) if link == fds_of_self(listener)]
        assert node.terminate() == 0
        assert node.socket.stat().st_ino == inode
        node.start()  # again, with the same socket
        node.wait_ready()
        assert node.terminate() == 0


def fds_of(pid: int) -> list[str]:
    return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115


def fds_of_self(listener: object) -> str:
    assert hasattr(listener, "fileno")
    return os.readlink(f"/proc/self/fd/{listener.fileno()}")  # noqa: PTH115


@pytest.mark.parametrize("kind", ["datagram", "not listening", "two", "a file", "nothing"])
def test_what_is_passed_on_and_is_no_control_socket_is_named(kind: str, tmp_path: Path) -> None:
    script = (
        "import os, socket, sys\n"
        "from dgnd.control.inherited import inherited_socket\n"
        "from dgnd.errors import ConfigError\n"
        f"kind = {kind!r}\n"
        "how = socket.SOCK_DGRAM if kind == 'datagram' else socket.SOCK_STREAM\n"
        "sock = socket.socket(socket.AF_UNIX, how)\n"
        "os.dup2(sock.fileno(), 3)\n"
        "os.dup2(sock.fileno(), 4)\n"
        "if kind == 'a file':\n"
        "    os.dup2(os.open('/dev/null', os.O_RDONLY), 3)\n"
        "if kind == 'nothing':\n"
        "    os.close(3)\n"
        "count = '2' if kind == 'two' else '1'\n"
        "try:\n"
        "    inherited_socket({'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': count})\n"
        "except ConfigError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    begin = "$LISTEN_FDS promises 1 socket, but descriptor 3" if kind == "nothing" else "the service manager"
    assert done.stdout.startswith(begin)
    assert ("one is needed" in done.stdout) == (kind == "two")


def test_ready_is_said_again_where_the_service_manager_was_too_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dgnd")
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr(supervision, "_STEADY_POLL_S", 0.05)
    standing: Any = SimpleNamespace(
        state=lambda: "ready", why=lambda: "serves", serves=lambda: True, started=True, workers=list
    )
    found = supervision.Supervision(standing, tmp_path / "none.sock")
    said: list[bytes] = []

    async def play(manager: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.run)
            with trio.fail_after(60):
                await wait_while(lambda: "serving" not in caplog.text, 60)
                assert not found.ready
                while not found.ready:
                    take(manager, said)
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.setblocking(False)
        fill(address)
        trio.run(play, manager)
        take(manager, said)
    assert said.count(b"READY=1\nSTATUS=ready: serves") == 1
    assert caplog.text.count("serving") == 1


def take(manager: socket.socket, said: list[bytes]) -> None:
    """All that lies in its queue."""
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(manager.recv(4096))


def fill(address: str) -> None:
    """Sends to it until its queue is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sender.sendto(b"x", address)


def test_after_failures_in_a_row_it_waits_longer_and_longer_and_a_good_end_counts(
    node: TestNode, supervisor: FakeSupervisor, tmp_path: Path
) -> None:
    for _ in range(3):
        node.start()
        until(lambda: node.state() is not None, "socket")
        node.kill()
    node.start()
    until(lambda: node.state() == "starting", "start")
    assert node.status().why.startswith("it ended badly 3 times in a row and waits 4 s")
    assert any(line.startswith("starting: it ended badly 3 times") for line in supervisor.all("STATUS"))
    node.wait_ready()
    assert node.terminate() == 0
    assert not (tmp_path / "starts").exists()


def test_the_delay_grows_to_a_bound(tmp_path: Path) -> None:
    counted = Restarts(tmp_path / "starts")
    assert [counted.begin()[1] for _ in range(8)] == [0, 0, 2, 4, 8, 16, 32, 60]
    counted.good()
    assert counted.begin() == (0, 0.0)
    (tmp_path / "starts").write_text("not a number")
    assert counted.begin() == (0, 0.0)
    assert Restarts.of({"RUNTIME_DIRECTORY": str(tmp_path)}) == Restarts(None)  # nobody starts it again
    assert restarts.delay_s(10**6) == restarts.LONGEST_S


@pytest.mark.parametrize("text", ["", "abc", "-5", "0", "²", "9" * 5000])
def test_a_watchdog_of_no_time_is_none(text: str) -> None:
    assert sdnotify.watchdog_s({"WATCHDOG_USEC": text}) is None
    assert sdnotify.watchdog_s({"WATCHDOG_USEC": "1500000"}) == 1.5
