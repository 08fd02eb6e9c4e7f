"""Nodes with different backends serve one model together, and their answers are those of one node; with
different quantisations they are not, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster, Row, trained_model
from tiny_llama import make_tiny_llama

PROMPTS = ("Once upon a time", "another prompt", "Lily and Tom went to the park. They")


@pytest.mark.parametrize("which", ["tiny", "babyllama-105"])
def test_torch_and_onnx_nodes_give_the_greedy_ids_of_one_node(tmp_path: Path, which: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = make_tiny_llama(tmp_path / "model") if which == "tiny" else trained_model(which)
    if model is None:
        pytest.skip(f"the trained model {which} is not on this machine")
    backends = {"a": "torch", "b": "onnx"}
    rows = [
        *(Row("a", "embed,0-1", "front-torch"), Row("b", "2-3,head", "front-torch")),
        *(Row("b", "embed,0-1", "front-onnx"), Row("a", "2-3,head", "front-onnx")),
        *(Row("a", "embed,0,2,head", "woven"), Row("b", "1,3", "woven")),
    ]
    if which != "tiny":  # it has five blocks
        for row in rows:
            row.span = row.span.replace("2-3", "2-4").replace("1,3", "1,3-4")
    whole = "embed,0-3,head" if which == "tiny" else "embed,0-4,head"
    names = ("front-torch", "front-onnx", "woven")
    with Cluster(tmp_path / "nodes", None) as cluster:
        for name in backends:
            cluster.add(name)
        for name, backend in backends.items():
            models = {
                each: {"path": str(model), "backend": backend, "dtype": "f32", "threads": 1} for each in names
            }
            models["alone"] = {"path": str(model), "backend": "reference"}
            (peer,) = (other for other in backends if other != name)
            cluster.configure(name, [*rows, Row("a", whole, "alone")], [peer], models=models)
        cluster.start()
        origin = cluster.nodes["a"]
        for prompt in PROMPTS:
            wanted = origin.run(prompt, "--model", "alone", "--max-tokens", "60")["token_ids"]
            for name in names:
                answer = origin.run(prompt, "--model", name, "--max-tokens", "60")
                assert answer["token_ids"] == wanted, name
                assert {hop["name"] for hop in answer["route"]} == {"a", "b"}


def test_nodes_with_different_quantisations_answer_and_do_not_call_it_exact(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    quants = {"mixed": ("int8", "int4"), "alike": ("int8", "int8"), "plain": ("none", "none")}
    rows = [row for name in quants for row in (Row("a", "embed,0-1", name), Row("b", "2-3,head", name))]
    with Cluster(tmp_path / "nodes", None) as cluster:
        for name in ("a", "b"):
            cluster.add(name)
        for index, (name, other) in enumerate((("a", "b"), ("b", "a"))):
            models = {
                each: {"path": str(model), "backend": "reference", "quant": pair[index]}
                for each, pair in quants.items()
            }
            cluster.configure(name, rows, [other], models=models)
        cluster.start()
        a = cluster.nodes["a"]
        for name in quants:
            for origin in cluster.nodes.values():
                answer = origin.run("once", "--model", name, "--max-tokens", "5")
                assert len(answer["token_ids"]) == 5
                assert answer["exact"] is (name != "mixed")
        told = a.ctl("run", "--raw", "--model", "mixed", "--max-tokens", "2", "once").stderr
        assert "the route does not all compute alike" in told
        assert a.ctl("run", "--raw", "--model", "alike", "--max-tokens", "2", "once").stderr == ""
        (peer,) = a.ctl_json("peers")
        numerics = {offer["model"]: offer["numerics"] for offer in peer["offers"]}
        for name, (_, theirs) in quants.items():
            assert f"quant={theirs} " in numerics[name]
