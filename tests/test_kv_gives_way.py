"""A budget of KV for one session, and two of them: what a user sees is answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from tiny_llama import TinyLlama, make_tiny_llama

from dgn_backends.hf_config import read_config
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import LimitError
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


def test_what_can_never_fit_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    """Each hop says when it opens what its budget can hold; the smaller one counts."""
    tiny = TinyLlama(eos=None, max_positions=1024)
    model = make_tiny_llama(tmp_path / "model", tiny)
    block = read_config(model).block
    page = PAGE_POSITIONS * 2 * 2 * block.n_kv_heads * block.head_dim * 4  # of two blocks, in f32
    with Cluster(tmp_path / "nodes", model) as cluster:
        rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
        for name in ("a", "b"):
            cluster.add(name)
        for name, other, budget in (("a", "b", 8 * page), ("b", "a", page * 3 // 2)):
            keys = {"path": str(model), "backend": "reference", "kv_bytes": budget}
            cluster.configure(name, rows, [other], models={"m": keys})
        cluster.start()
        with ControlClient(cluster.nodes["a"].socket) as client:

            def say(count: int) -> api.GenerateResult:
                params = api.GenerateParams(session="s", token_ids=[7] * count, max_tokens=20)
                return client.generate(params, lambda _: None)

            whole = say(PAGE_POSITIONS - 30)
            assert (len(whole.token_ids), whole.finish_reason) == (20, "length")
            cut = say(PAGE_POSITIONS - 5)  # the last token of an answer needs no KV
            assert (len(cut.token_ids), cut.finish_reason) == (6, "length")
            assert len(say(PAGE_POSITIONS).token_ids) == 1
            with pytest.raises(LimitError, match=r"has 257 tokens; .* of b \(2-3,head\) holds 256 in") as no:
                say(PAGE_POSITIONS + 1)
            assert not no.value.retryable
            assert no.value.data["budget"] == page * 3 // 2
            assert say(PAGE_POSITIONS).token_ids  # the session goes on
