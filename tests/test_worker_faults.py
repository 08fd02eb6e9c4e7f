"""Faults of loading that no waiting mends, and the end of a whole process group, with real daemons."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

ROWS = [Row("a", "embed,0-3,head")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def worker(node: TestNode) -> Any:
    (found,) = node.status().workers
    return msgspec.to_builtins(found)


@pytest.mark.parametrize(("key", "value"), [("device", "cuda:1"), ("dtype", "f16")])
def test_what_the_backend_can_not_do_is_a_fault_not_a_matter_of_waiting(
    model: Path, tmp_path: Path, key: str, value: str
) -> None:
    with Cluster(tmp_path, model) as cluster:
        node = cluster.add("a")
        cluster.configure("a", ROWS, models={"m": {"path": str(model), "backend": "reference", key: value}})
        node.start()
        node.wait_for(lambda: node.state() == "degraded", what="degraded")
        node.wait_for(lambda: worker(node)["state"] == "failed", what="failed")
        assert value in worker(node)["detail"]
        failed = node.ctl("run", "--json", "--wait", "50", "x", check=False)
        error = json.loads(failed.stdout)["error"]
        assert (failed.returncode, error["kind"]) == (2, "backend_unavailable")
        assert error["data"]["retryable"] is False
        assert value in error["message"]
        assert node.terminate() == 0
        assert node.log.count("ERROR") == 1  # the same fault is logged once, however often it is tried again


def test_the_end_of_the_whole_process_group_is_no_error(model: Path, tmp_path: Path) -> None:
    """As a service manager or a closing terminal ends it: every process gets the signal at once."""
    with Cluster(tmp_path, model) as cluster:
        cluster.full_mesh(ROWS)
        node = cluster.nodes["a"]
        assert node.process is not None
        for pid in [*(child.pid for child in node.children()), node.process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert node.process.wait(15) == 0
        assert "ERROR" not in node.log
