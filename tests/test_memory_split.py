"""A model that no single node can hold, in three of them, each in a control group of its own: every one
refuses the whole with the numbers, together they answer as one without limits does, and nothing is killed.

The small model runs with every suite, the one of 2.4 GB with `make test-memory`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from large_llama import make_large_llama
from memory_groups import Group, memory_group
from tiny_llama import TinyLlama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError

MIB = 1 << 20
READY_S = 400.0


@dataclass(frozen=True)
class Case:
    """A model, and the groups that it is to fit into only together."""

    model: TinyLlama
    backend: dict[str, object]
    limit: int
    tokens: int

    @property
    def spans(self) -> dict[str, str]:
        """A third of the blocks for each node."""
        third = self.model.n_blocks // 3
        return {
            "a": f"embed,0-{third - 1}",
            "b": f"{third}-{2 * third - 1}",
            "c": f"{2 * third}-{self.model.n_blocks - 1},head",
        }


SMALL = Case(
    TinyLlama(hidden_size=512, intermediate_size=1408, n_blocks=18, n_heads=8, n_kv_heads=2, dtype="bf16"),
    {"backend": "reference"},
    280 * MIB,
    tokens=8,
)
LARGE = Case(
    TinyLlama(
        hidden_size=2048, intermediate_size=5632, n_blocks=27, n_heads=32, n_kv_heads=4, dtype="bf16",
        max_positions=2048,
    ),
    {"backend": "torch", "dtype": "bf16", "map_weights": False},
    int(1.2 * (1 << 30)),
    tokens=12,
)  # fmt: skip


@pytest.fixture(
    params=[
        pytest.param(SMALL, id="small"),
        pytest.param(
            LARGE,
            id="2.4GB",
            marks=[
                pytest.mark.skipif(not os.environ.get("DGN_TEST_MEMORY"), reason="2.4 GB: make test-memory"),
                pytest.mark.timeout(1800),
            ],
        ),
    ]
)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@contextmanager
def capped(directory: Path, model: Path, limit: int) -> Iterator[tuple[Cluster, dict[str, Group]]]:
    """Three nodes that are not configured yet, each in its group."""
    with ExitStack() as stack:
        groups = {name: stack.enter_context(memory_group(name, limit)) for name in "abc"}
        cluster = stack.enter_context(Cluster(directory, model))
        for name, group in groups.items():
            cluster.add(name).before = group.before
        yield cluster, groups


def answer(cluster: Cluster, tokens: int) -> api.GenerateResult:
    with ControlClient(cluster.nodes["a"].socket) as client:
        params = api.GenerateParams(token_ids=list(range(5, 29)), max_tokens=tokens)
        return client.generate(params, lambda _: None)


def anonymous(pid: int) -> int:
    """Bytes of a process that are in no file."""
    (kib,) = re.findall(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(kib) * 1024


def test_three_nodes_hold_what_none_can(case: Case, tmp_path: Path) -> None:
    model = make_large_llama(tmp_path / "model", case.model)
    whole = f"embed,0-{case.model.n_blocks - 1},head"
    models = {"m": {"path": str(model), **case.backend}}
    with capped(tmp_path / "nodes", model, case.limit) as (cluster, groups):
        for name, node in cluster.nodes.items():
            cluster.configure(name, [Row(name, whole)], models=models)
            node.start()
        for name, node in cluster.nodes.items():
            node.wait_for(lambda node=node: refused(node), READY_S, "refusal")
            said = [worker.detail for worker in node.status().workers]
            print(f"{name}: {said[0]}")
            assert node.worker_pids() == []
        if case is SMALL:  # the digests of a large one take their time
            asked = cluster.nodes["a"].ctl("run", "--raw", "--wait", "60", "x", check=False)
            assert asked.returncode == 6
            assert re.search(r"m can't be loaded here: needs .* free: embed,0-\d+ fit", asked.stderr)
        for node in cluster.nodes.values():
            assert node.terminate(30) == 0
        rows = [Row(name, span) for name, span in case.spans.items()]
        for name in cluster.nodes:
            cluster.configure(name, rows, [other for other in "abc" if other != name], models=models)
        for node in cluster.nodes.values():
            node.start()
        for node in cluster.nodes.values():
            node.wait_ready(timeout=READY_S)
        found = answer(cluster, case.tokens)
        assert [hop.name for hop in found.route] == ["a", "b", "c"]
        for name, node in cluster.nodes.items():
            (worker,), (pid,) = node.status().workers, node.worker_pids()
            print(f"{name}: {worker.weights_bytes:,} bytes of weights, {anonymous(pid):,} anonymous")
            assert anonymous(pid) >= worker.weights_bytes
            memory = node.status().memory
            assert memory.used <= memory.budget < case.limit
            assert memory.weights_mapped < worker.weights_bytes // 20
            assert groups[name].oom_kills == 0
    with Cluster(tmp_path / "uncapped", model) as cluster:
        cluster.add("a")
        cluster.configure("a", [Row("a", whole)], models=models)
        cluster.nodes["a"].start()
        cluster.nodes["a"].wait_ready(timeout=READY_S)
        wanted = answer(cluster, case.tokens)
    print(f"capped {found.token_ids}, uncapped {wanted.token_ids}")
    assert found.token_ids == wanted.token_ids


def refused(node: TestNode) -> bool:
    """Whether its one worker was refused, with what it needs, what is free and what would fit."""
    try:
        (worker,) = node.status().workers
    except DgnError:
        return False
    form = r"needs [\d.]+ [MG]iB, [\d.]+ MiB free: embed,0-\d+ fit"
    return worker.state == "failed" and bool(re.match(form, worker.detail))
