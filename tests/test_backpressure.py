"""Who reads slowly makes others wait, and nothing else: a stopped client, a narrow link."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO

import psutil
import pytest
from cluster import Cluster, Row, TestNode
from disturbed import asked
from tiny_llama import SPECIAL_TOKENS, TinyLlama, make_tiny_llama, random_weights, write_weights

from dgnd.control import api
from dgnd.control.client import ControlClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_kit.delayed import DelayedPorts

PROMPT, TOKENS = "hello there", 3000
#: Memory that a daemon may gain by what has nothing to do with what waits.
SLACK_BYTES = 12_000_000
#: A prompt of 600 tokens has 600 KB of hidden states; four of them take 8 s on this link.
NARROW_BYTES_PER_S, PROMPT_TOKENS, SESSIONS = 300_000, 600, 4


def model(directory: Path, **fields: object) -> Path:
    """Its answers have no end but the one asked for: no special token is ever the likeliest."""
    tiny = replace(TinyLlama(n_blocks=2, max_positions=4096), **fields)  # type: ignore[arg-type]
    make_tiny_llama(directory, tiny)
    weights = random_weights(directory, tiny)
    weights["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0
    write_weights(directory, weights, tiny.dtype, tiny.shards)
    return directory


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    directory = tmp_path_factory.mktemp("alone")
    with Cluster(directory / "nodes", model(directory / "tiny")) as cluster:
        cluster.full_mesh([Row("a", "embed,0-1,head")])
        yield cluster.nodes["a"]


def resident(node: TestNode) -> int:
    """Bytes of the daemon's memory."""
    assert node.process is not None
    rss: int = psutil.Process(node.process.pid).memory_info().rss
    return rss


def status(node: TestNode) -> api.Status:
    """Its status, without a process of dgnctl."""
    with ControlClient(node.socket) as client:
        found: api.Status = client.call("status")
        return found


def wait_until_nothing_is_computed(node: TestNode) -> None:
    """Returns when the worker uses no CPU: whoever asked for an answer is waited for."""
    (worker,) = status(node).workers
    assert worker.pid is not None
    process = psutil.Process(worker.pid)
    for _ in range(150):
        before = sum(process.cpu_times()[:2])
        time.sleep(0.5)
        if sum(process.cpu_times()[:2]) - before < 0.02:
            return
    raise AssertionError("the worker never rests: nothing waits")


@cache
def long_text(socket: Path) -> str:
    """The answer that `a_run` asks for."""
    with ControlClient(socket) as client:
        result = client.generate(asked(prompt=PROMPT, max_tokens=TOKENS), lambda _: None)
    assert len(result.token_ids) == TOKENS
    return result.text


@contextlib.contextmanager
def a_run(node: TestNode) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """`dgnctl run` of a long answer, and the pipe it writes to, which holds a page, so that a reader who
    rests is noticed soon."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "dgnctl", "--socket", str(node.socket), "run", "--raw"]
    client = subprocess.Popen([*command, "--max-tokens", str(TOKENS), PROMPT], stdout=write_fd)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as read:
        try:
            yield client, read
        finally:
            client.kill()  # before the pipe is closed, which waits for who reads it
            client.wait()


@pytest.mark.parametrize("who", ["client", "reader of its output"])
def test_an_answer_waits_for_a_client_that_is_stopped_and_goes_on_with_it(node: TestNode, who: str) -> None:
    whole = long_text(node.socket)
    before = resident(node)
    with a_run(node) as (client, read):
        parts: list[bytes] = []
        collector = threading.Thread(target=lambda: parts.append(read.read()))
        if who == "client":
            collector.start()
        node.wait_for(lambda: status(node).sessions)
        if who == "client":
            client.send_signal(signal.SIGSTOP)
        wait_until_nothing_is_computed(node)
        assert len(status(node).sessions) == 1  # it waits, and is there
        assert resident(node) - before < SLACK_BYTES
        other = node.run(PROMPT, "--max-tokens", "20")  # nobody else does
        assert whole.startswith(other["text"].rstrip("\ufffd"))
        assert client.poll() is None
        if who == "client":
            client.send_signal(signal.SIGCONT)
        else:
            collector.start()
        collector.join(60)
        assert client.wait(60) == 0
        assert b"".join(parts).decode().removesuffix("\n") == whole.removesuffix("\n")


def test_a_stopped_client_that_is_killed_leaves_nothing_behind(node: TestNode) -> None:
    with a_run(node) as (client, _):
        node.wait_for(lambda: status(node).sessions)
        client.send_signal(signal.SIGSTOP)
        wait_until_nothing_is_computed(node)
        assert status(node).sessions
        client.kill()
        client.wait()
        node.wait_for(lambda: not status(node).sessions, what="end of the session")


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Cluster]:
    """a and b, with a narrow way between them."""
    directory = model(tmp_path / "tiny", hidden_size=256)
    with DelayedPorts(0.001, NARROW_BYTES_PER_S) as ports, Cluster(tmp_path / "nodes", directory) as cluster:
        rows = [Row("a", "embed,0"), Row("b", "1,head")]
        for name in "ab":
            cluster.add(name)
        b = cluster.nodes["b"]
        b.dialled_at = ports.to(b.port)
        cluster.configure("a", rows, ["b"])
        config = cluster.configure("b", rows, ["a"]).config
        config.write_text(config.read_text().replace(cluster.nodes["a"].address.split("/p2p")[0], ""))
        config.write_text(config.read_text().replace('addrs = [""]', "addrs = []"))  # it waits to be dialled
        cluster.start()
        yield cluster


def answers(node: TestNode, watch: Callable[[], None]) -> list[list[int]]:
    """Of several sessions with long prompts at once; `watch` is called meanwhile."""
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        prompt = [(7 * number + position) % 250 + 5 for position in range(PROMPT_TOKENS)]
        with ControlClient(node.socket) as client:
            params = api.GenerateParams(token_ids=prompt, max_tokens=5)
            found[number] = client.generate(params, lambda _: None).token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(SESSIONS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        watch()
        time.sleep(0.05)
    return [found[number] for number in range(SESSIONS)]


def test_a_narrow_link_takes_time_and_neither_memory_nor_sessions(narrow: Cluster) -> None:
    a, b = narrow.nodes["a"], narrow.nodes["b"]
    before, most = resident(a), 0

    def watch() -> None:
        nonlocal most
        most = max(most, resident(a))

    begun = time.monotonic()
    first = answers(a, watch)
    took = time.monotonic() - begun
    assert took > 0.8 * SESSIONS * PROMPT_TOKENS * 1024 / NARROW_BYTES_PER_S  # the link is what took it
    assert answers(a, watch) == first
    assert most - before < SLACK_BYTES
    for node in (a, b):
        assert "is gone" not in node.log
        assert "goes on after" not in node.log
