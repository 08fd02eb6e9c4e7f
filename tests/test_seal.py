"""Files of a model that are swapped under a running node: what it announced is what it serves, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import ModelError
from dgnd.workers.seal import Seal


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    root = tmp_path_factory.mktemp("seal")
    model = make_tiny_llama(root / "model", seed=1, n_blocks=2)
    shutil.copytree(model, root / "good")
    make_tiny_llama(root / "other", seed=2, n_blocks=2)
    words = make_tiny_llama(root / "words", seed=1, n_blocks=2) / "tokenizer.json"
    words.write_text(words.read_text() + "\n")
    with Cluster(root / "nodes", model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-1,head")])
        yield cluster.nodes["a"]


def files(node: TestNode, name: str) -> Path:
    return node.directory.parents[1] / name


def status(node: TestNode) -> api.Status:
    with ControlClient(node.socket) as client:
        found: api.Status = client.call("status")
        return found


def generate(node: TestNode) -> api.GenerateResult:
    with ControlClient(node.socket) as client:
        params = api.GenerateParams(prompt="hello there", raw=True, max_tokens=8)
        result: api.GenerateResult = client.call("generate", params)
        return result


def kill_worker(node: TestNode) -> int:
    (worker,) = status(node).workers
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    return worker.pid


def wait_for_worker(node: TestNode, state: str, but: int = 0) -> Any:
    def seen() -> bool:
        (worker,) = status(node).workers
        return worker.state == state and worker.pid != but

    node.wait_for(seen, what=f"worker {state}")
    (worker,) = status(node).workers
    return worker


def put(node: TestNode, name: str, whole: bool) -> None:
    """Puts the files of `name` in place: the weights alone, or all."""
    model, source = files(node, "model"), files(node, name)
    if whole:
        shutil.rmtree(model)
        shutil.copytree(source, model)
    else:
        shutil.copyfile(source / "model.safetensors", model / "new")
        (model / "new").rename(model / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "whole", "what"), [("other", False, "differs"), ("words", True, "tokenizer")]
)
def test_a_worker_does_not_start_again_on_other_files(
    node: TestNode, name: str, whole: bool, what: str
) -> None:
    right = generate(node).token_ids
    put(node, name, whole)
    kill_worker(node)
    worker = wait_for_worker(node, "failed")
    assert str(files(node, "model")) in worker.detail
    assert what in worker.detail
    assert "restart dgnd" in worker.detail
    assert status(node).state == "degraded"
    with pytest.raises(ModelError, match="restart dgnd"):
        generate(node)
    put(node, "good", whole)  # the delay between attempts grows, so this is soon found out
    wait_for_worker(node, "ready")
    assert generate(node).token_ids == right


def test_a_missing_directory_is_named(node: TestNode) -> None:
    model = files(node, "model")
    model.rename(model.with_name("away"))
    kill_worker(node)
    assert f"{model}/config.json" in wait_for_worker(node, "failed").detail
    model.with_name("away").rename(model)
    wait_for_worker(node, "ready")


def test_the_same_bytes_in_new_files_are_fine(node: TestNode) -> None:
    right = generate(node).token_ids
    put(node, "good", whole=True)
    killed = kill_worker(node)
    wait_for_worker(node, "ready", but=killed)
    assert generate(node).token_ids == right


def test_text_is_not_read_from_another_models_directory(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", seed=1, n_blocks=2)
    with Cluster(tmp_path / "nodes", model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-1,head")])
        node = cluster.nodes["a"]
        tokenizer = model / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
        with pytest.raises(ModelError, match=r"tokenizer\.json .*restart dgnd"):
            generate(node)
        assert "can't answer prompts given here" in "\n".join(status(node).notes)


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("tokenizer.json", '{"version": "1.0"', "tokenizer.json"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "tokenizer_config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
    ],
    ids=["tokenizer", "template", "missing"],
)
def test_text_that_can_not_be_used_is_shown_before_anybody_asks(
    tmp_path: Path, name: str, broken: str | None, said: str
) -> None:
    model = make_tiny_llama(tmp_path / "model", n_blocks=2)
    if broken is None:
        (model / name).unlink()
    else:
        (model / name).write_text(broken)
    with Cluster(tmp_path / "nodes", model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-1,head")])
        node = cluster.nodes["a"]

        def notes() -> list[str]:
            start = "model m can't answer prompts given here: "
            return [note for note in status(node).notes if note.startswith(start) and said in note]

        node.wait_for(notes, what="a note")
        with pytest.raises(ModelError, match=said):
            generate(node)
        assert len(notes()) == 1


def test_digests_are_made_again_where_the_child_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As by the kernel for lack of memory: the first child ends by SIGKILL."""
    model = make_tiny_llama(tmp_path / "model", n_blocks=1)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nmkdir {tmp_path}/once 2>&- && kill -9 $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("dgnd.children.sys.executable", str(python))
    made = trio.run(Seal(model, tmp_path / "digests").make)
    monkeypatch.undo()
    assert made == trio.run(Seal(model, tmp_path / "digests").make)
    assert "killed by SIGKILL; again in 1 s" in caplog.text
