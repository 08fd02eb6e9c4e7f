"""What status says of the daemon's own process, its hops and its journals."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest
import trio
from cluster import Cluster, Row
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.memory.footprint import footprint


def test_it_counts_what_is_opened_and_begun(tmp_path: Path) -> None:
    async def main() -> None:
        before = footprint()
        assert before.resident_bytes > 10 << 20
        go_on = threading.Event()
        thread = threading.Thread(target=go_on.wait)
        thread.start()
        files = [(tmp_path / "x").open("w") for _ in range(5)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            during = footprint()
            nursery.cancel_scope.cancel()
        for file in files:
            file.close()
        go_on.set()
        thread.join()
        found = during.fds - before.fds, during.threads - before.threads, during.tasks - before.tasks
        assert found == (5, 1, 1)
        assert footprint().fds == before.fds

    trio.run(main)


def test_status_says_what_the_daemon_takes(tmp_path: Path) -> None:
    with Cluster(tmp_path, make_tiny_llama(tmp_path / "model", n_blocks=4)) as cluster:
        cluster.full_mesh([Row("a", "embed,0-1"), Row("b", "2-3,head")])
        a = cluster.nodes["a"]
        before = a.status()
        process = psutil.Process(before.pid)
        assert before.process.resident_bytes == pytest.approx(process.memory_info().rss, rel=0.1)
        assert before.process.threads == process.num_threads()
        assert before.process.tasks > 10
        assert (before.hops, before.journal_bytes) == (0, 0)
        with ControlClient(a.socket) as client:
            asked = api.GenerateParams(prompt="hello", raw=True, session="kept", max_tokens=5)
            client.generate(asked, lambda _: None)
        during = a.status()
        assert during.hops == 1
        assert during.journal_bytes > 5 * 4
        a.ctl("cache", "clear")
        a.wait_for(lambda: a.status().hops == 0, what="an end of the hop")
        assert a.status().journal_bytes == 0
        # The connection that asks is among them, each time; the first may hold what a start needs.
        a.wait_for(lambda: a.status().process.fds <= before.process.fds, what="as few open files as before")
