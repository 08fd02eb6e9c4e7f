"""Files that a worker has mapped and that are cut under it: the log names the file, and the node recovers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

from dgnd.workers.mapped_files import MappedFiles

ROWS = [Row("a", "embed,0-3,head")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an embedding of many pages: only what is not in use yet can be missed."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", vocab_size=4000, dtype="f32", eos=None)


def started(cluster: Cluster, model: Path, quant: str) -> TestNode:
    cluster.add("a")
    keys = {"path": str(model), "backend": "torch", "dtype": "f32", "quant": quant}
    node = cluster.configure("a", ROWS, models={"m": keys})
    cluster.start()
    return node


def answer(node: TestNode) -> list[int]:
    ids: list[int] = node.run("once upon a time", "--max-tokens", "4", "--wait", "60")["token_ids"]
    return ids


@pytest.mark.parametrize("left", [100, 20_000])  # with and without what says what it was made from
def test_a_cache_of_weights_that_is_cut_is_named_and_made_again(
    model: Path, tmp_path: Path, left: int
) -> None:
    pytest.importorskip("torch")
    with Cluster(tmp_path, model) as cluster:
        node = started(cluster, model, "int8")
        wanted = answer(node)
        assert len(re.findall("INFO dgn_backends.quant_cache: .*: making int8 weights of", node.log)) == 1
        entries = {entry: entry.stat().st_size for entry in (node.directory / "state").rglob("*.q")}
        largest = max(entries, key=lambda entry: entries[entry])
        os.truncate(largest, left)
        assert answer(node) == wanted  # the worker starts again in time
        assert f"{largest} was cut from {entries[largest]:,} to {left:,} bytes while the" in node.log
        assert "crashed" not in node.log
        line = next(line for line in node.log.splitlines() if "this cache of quantised" in line)
        assert re.match(r"[-\d]+ [:,\d]+ WARNING dgn_backends.quant_cache: ", line)
        assert f"{largest}: this cache of quantised weights has " in line
        assert largest.stat().st_size == entries[largest]


def test_a_file_of_the_model_that_is_cut_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = make_tiny_llama(tmp_path / "tiny", vocab_size=4000, dtype="f32", eos=None)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    with Cluster(tmp_path / "nodes", model) as cluster:
        node = started(cluster, model, "none")
        wanted = answer(node)
        os.truncate(weights, 5000)
        failed = node.ctl("run", "--raw", "--max-tokens", "4", "once upon a time", check=False)
        assert failed.returncode == 2
        assert f"{weights}: tensor " in failed.stderr
        assert "truncated" in failed.stderr
        cut = f"{weights} was cut from {len(whole):,} to 5,000 bytes while the worker used it (SIGBUS): put"
        assert cut in node.log
        assert "crashed" not in node.log
        weights.write_bytes(whole)
        node.wait_ready()
        assert answer(node) == wanted


CHILD = """
import mmap, sys
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.readline()
"""


def test_only_what_is_mapped_and_was_changed_is_named(tmp_path: Path) -> None:
    path, other = tmp_path / "a file\nof two lines", tmp_path / "other"
    for each in (path, other):
        each.write_bytes(bytes(10_000))
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"mapped\n"
        files = MappedFiles()
        files.look(child.pid)
        os.truncate(other, 0)
        assert files.changed() is None
        path.chmod(0o400)
        assert files.changed() is None
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.write(b"x")
        assert files.changed() == (path, "was written to")
        os.truncate(path, 4000)
        files.look(child.pid)  # what was seen first counts
        assert files.changed() == (path, "was cut from 10,000 to 4,000 bytes")
        path.unlink()
        path.write_bytes(b"another one")
        assert files.changed() is None
        child.communicate(b"\n")
    MappedFiles().look(child.pid)  # it is gone
