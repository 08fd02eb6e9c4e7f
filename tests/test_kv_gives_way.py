"""A budget of KV for one session, and two of them: what a user sees is answers."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

from dgn_backends.hf_config import read_config
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.worker.kv_budget import PAGE_POSITIONS

TURNS = ("once upon a time", " and then", " in the end")


def test_idle_sessions_give_way_in_turn_and_go_on_as_if_they_had_not(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", eos=None)
    block = read_config(model).block
    page = PAGE_POSITIONS * 2 * 2 * block.n_kv_heads * block.head_dim * 4  # of two blocks, in f32
    models = {
        "narrow": {"path": str(model), "backend": "reference", "kv_bytes": page * 3 // 2},
        "wide": {"path": str(model), "backend": "reference"},
    }
    rows = [row for name in models for row in (Row("a", "embed,0-1", name), Row("b", "2-3,head", name))]
    with Cluster(tmp_path / "nodes", None) as cluster:
        cluster.full_mesh(rows, models=models)

        def say(client: ControlClient, name: str, session: str, prompt: str) -> list[int]:
            params = api.GenerateParams(
                model=name, session=f"{name}-{session}", prompt=prompt, raw=True, max_tokens=12
            )
            return client.generate(params, lambda _: None).token_ids

        with ControlClient(cluster.nodes["a"].socket) as client:
            for turn in TURNS:
                for session in ("one", "two"):
                    wanted = say(client, "wide", session, turn)
                    assert say(client, "narrow", session, turn) == wanted
        for node in cluster.nodes.values():
            node.wait_for(lambda node=node: holds_half(node), 20, "KV of one session of two")


def holds_half(node: TestNode) -> bool:
    """Whether the worker with the small budget holds half of what the other does, as they last said."""
    with ControlClient(node.socket) as client:
        held = {worker.model: worker.kv_bytes for worker in client.call("status").workers}
    return 0 < 2 * held["narrow"] == held["wide"]
