"""Deaths and stops of real processes: typed errors at once, nothing left behind, the next answer right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient

#: Two seconds are promised; a busy machine gets three times as long.
ERROR_WITHIN_S = 6.0
LONG = ("--max-tokens", "4000")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a long context, so that an answer can be interrupted."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=4, max_positions=4096)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("pair"), model) as cluster:
        # Nothing is waited for: what goes on after a failure is tested in test_failover and test_drain.
        rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
        cluster.full_mesh(rows, more="[sessions]\nrecover_s = 0", node={"drain_s": 0.2})
        yield cluster


@pytest.fixture
def pair(running: Cluster) -> Cluster:
    """Two daemons that are up, whatever the test before did to them."""
    for node in running.nodes.values():
        if node.process is None or node.process.poll() is not None:
            node.start()
    for node in running.nodes.values():
        node.wait_ready()
    return running


class Answering:
    """A long answer under way at a node, in a thread; `result` is what dgnctl printed."""

    def __init__(self, node: TestNode, *options: str) -> None:
        self.began = threading.Event()
        command = [
            sys.executable,
            "-m",
            "dgnctl",
            "--socket",
            str(node.socket),
            "run",
            "--raw",
            *LONG,
            *options,
            "x",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.text = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.began.wait(90), "no token came"

    def _read(self) -> None:
        assert self.process.stdout is not None
        while piece := os.read(self.process.stdout.fileno(), 4096):
            self.text += piece.decode(errors="replace")
            self.began.set()

    def end(self, timeout: float) -> tuple[int, str, float]:
        """Exit code, stderr, and how long it took from now."""
        begin = time.monotonic()
        code = self.process.wait(timeout)
        took = time.monotonic() - begin
        self._thread.join()
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        message = self.process.stderr.read()
        self.process.stderr.close()
        self.process.stdout.close()
        return code, message, took


def ids(node: TestNode, prompt: str = "hello there", tokens: int = 20) -> list[int]:
    found: list[int] = node.run(prompt, "--max-tokens", str(tokens))["token_ids"]
    return found


@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_killed_worker_is_a_typed_error_and_comes_back(pair: Cluster, victim: str) -> None:
    origin = pair.nodes["a"]
    right = ids(origin)
    answering = Answering(origin)
    (pid,) = pair.nodes[victim].worker_pids()
    os.kill(pid, signal.SIGKILL)
    code, message, took = answering.end(90)
    assert code != 0
    assert took < ERROR_WITHIN_S
    assert "SIGKILL" in message
    assert "worker" in message
    for node in pair.nodes.values():
        node.wait_ready()
    assert pair.nodes[victim].worker_pids() != [pid]
    assert ids(origin) == right


def test_the_error_of_a_killed_worker_has_a_kind(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    (pid,) = origin.worker_pids()
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    failed = origin.ctl("run", "--raw", "--json", *LONG, "x", check=False)
    killer.join()
    assert failed.returncode != 0
    (line,) = failed.stdout.splitlines()
    assert json.loads(line)["error"]["kind"] == "worker_died"


def is_alive(process: psutil.Process) -> bool:
    """Whether it still does something: how soon an orphan that ended is reaped is the system's matter."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_ten_kills_of_the_peer_leave_nothing_behind_and_need_no_help(pair: Cluster) -> None:
    origin, peer = pair.nodes["a"], pair.nodes["b"]
    right = ids(origin)
    for _ in range(10):
        answering = Answering(origin)
        workers = peer.children()
        assert workers
        peer.kill()
        killed = time.monotonic()
        code, message, took = answering.end(90)
        assert code != 0
        assert "b (" in message
        assert took < ERROR_WITHIN_S
        _, found = psutil.wait_procs(workers, timeout=30)
        alive = [worker for worker in found if is_alive(worker)]
        assert not alive, f"left behind {time.monotonic() - killed:.1f} s after the kill"
        peer.start()
        peer.wait_ready()
        origin.wait_ready()
        assert ids(origin) == right


def test_sigterm_ends_a_busy_daemon_and_tells_its_client(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    answering = Answering(origin)
    begin = time.monotonic()
    assert origin.terminate() == 0
    assert time.monotonic() - begin < 5.0
    code, message, _ = answering.end(10)
    assert code != 0
    assert "the node is leaving" in message
    assert pair.nodes["b"].ctl_json("status")["sessions"] == []
    assert not origin.socket.exists()


def test_sigterm_of_a_peer_is_told_to_the_origin(pair: Cluster) -> None:
    origin, peer = pair.nodes["a"], pair.nodes["b"]
    answering = Answering(origin)
    assert peer.terminate() == 0
    code, message, took = answering.end(90)
    assert code != 0
    assert took < ERROR_WITHIN_S
    assert "b (" in message
    assert origin.ctl_json("status")["missing"] == {"m": "2-3,head"}


def test_a_second_daemon_on_the_same_state_or_socket_is_refused(pair: Cluster, tmp_path: Path) -> None:
    first = pair.nodes["a"]
    assert first.process is not None
    again = subprocess.run(
        [sys.executable, "-m", "dgnd", "--config", str(first.config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode != 0
    assert f"pid {first.process.pid}" in again.stderr
    assert "Traceback" not in again.stderr
    other = first.config.read_text().replace(str(first.directory / "state"), str(tmp_path / "other-state"))
    config = tmp_path / "other.toml"
    config.write_text(other)
    again = subprocess.run(
        [sys.executable, "-m", "dgnd", "--config", str(config)], capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert f"pid {first.process.pid}" in again.stderr
    assert "Traceback" not in again.stderr
    assert first.ctl_json("status")["state"] == "ready"


def test_ones_own_id_as_a_peer_is_named_by_its_place_in_the_file(pair: Cluster, tmp_path: Path) -> None:
    node = pair.nodes["a"]
    config = tmp_path / "self.toml"
    config.write_text(f'[node]\nstate_dir = "{tmp_path}"\n[peers.me]\nid = "{node.peer_id}"\n')
    (tmp_path / "identity.key").write_bytes((node.directory / "state" / "identity.key").read_bytes())
    (tmp_path / "identity.key").chmod(0o600)
    refused = subprocess.run(
        [sys.executable, "-m", "dgnd", "--config", str(config), "--socket", str(tmp_path / "s")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert f"{config}:4:1: " in refused.stderr
    assert "own id" in refused.stderr


def test_a_client_that_hangs_up_frees_the_work_everywhere(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    answering = Answering(origin)
    answering.process.kill()
    answering.end(10)
    for node in pair.nodes.values():
        node.wait_for(lambda node=node: node.status().sessions == [], 10, "end of the session")


def test_interrupting_run_cancels_and_keeps_what_came(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    answering = Answering(origin)
    answering.process.send_signal(signal.SIGINT)
    code, _, took = answering.end(10)
    assert code == 130
    assert took < ERROR_WITHIN_S
    assert answering.text
    for node in pair.nodes.values():
        node.wait_for(lambda node=node: node.status().sessions == [], 10, "end of the session")


def test_chats_interleaved_token_by_token_do_not_touch_each_other(pair: Cluster) -> None:
    """Two from one node and one from the other at once; each gives what it gives alone."""
    jobs = [("a", "one"), ("a", "two, longer"), ("b", "three")]
    alone = {job: ids(pair.nodes[job[0]], job[1], 150) for job in jobs}
    found: dict[tuple[str, str], list[int]] = {}

    def ask(job: tuple[str, str]) -> None:
        found[job] = ids(pair.nodes[job[0]], job[1], 150)

    threads = [threading.Thread(target=ask, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_cache_clear_of_one_session_never_touches_another(pair: Cluster) -> None:
    origin = pair.nodes["a"]
    with ControlClient(origin.socket) as client:
        _clear_one_of_two(pair, client)


def _clear_one_of_two(pair: Cluster, client: ControlClient) -> None:
    origin = pair.nodes["a"]

    def turn(session: str, prompt: str) -> list[int]:
        params = api.GenerateParams(prompt=prompt, raw=True, session=session, max_tokens=20)
        return client.generate(params, lambda _: None).token_ids

    alone = [turn("alone", text) for text in ("first", "second")]
    one = [turn("one", "first")]
    turn("two", "something else")
    before = {entry["session"] for entry in origin.ctl_json("cache", "list")}
    assert {"alone", "one", "two"} <= before
    origin.ctl("cache", "clear", "two")
    assert {entry["session"] for entry in origin.ctl_json("cache", "list")} == before - {"two"}
    hops = {entry["session"] for entry in pair.nodes["b"].ctl_json("cache", "list")}
    assert hops == {"alone", "one"}
    one.append(turn("one", "second"))
    assert one == alone
    origin.ctl("cache", "clear")
    assert origin.ctl_json("cache", "list") == []
    pair.nodes["b"].wait_for(lambda: pair.nodes["b"].ctl_json("cache", "list") == [], 10, "empty cache")
