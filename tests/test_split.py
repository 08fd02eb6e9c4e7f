"""A split model gives the token ids of the unsplit one, and those of `transformers` (real daemons, trained
models)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Row, trained_model

MODELS = ("babyllama-105", "llama2xs")
PROMPTS = (
    "Once upon a time",
    "The little dog was very",
    "Lily and Tom went to the park. They",
    "One day, a big red ball",
    "Mom said, ",
)
TOKENS = 100

#: The rows of each map, by node of the cluster. Every map is a model of its own name on the same nodes.
MAPS = {
    "unsplit": [("a", "embed,0-4,head")],
    "two": [("a", "embed,0-1"), ("b", "2-4,head")],
    "three": [("a", "embed,0"), ("b", "1-2"), ("c", "3-4,head")],
    "interleaved": [("a", "embed,0,2,4,head"), ("b", "1,3")],
    "remote-head": [("a", "embed,0-4"), ("b", "head")],
    "elsewhere": [("b", "embed,0-2"), ("c", "3-4,head")],
    "remote-embed": [("b", "embed"), ("a", "0-4,head")],
}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[list[int], list[int]]]]:
    """By model: prompt ids and greedy ids of `transformers`, for each prompt."""
    found = {}
    for name in MODELS:
        path = trained_model(name)
        if path is None:
            pytest.skip(f"the trained model {name} is not on this machine")
        found[name] = [_transformers_ids(path, prompt) for prompt in PROMPTS]
    return found


def _transformers_ids(path: Path, prompt: str) -> tuple[list[int], list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own advice about generation settings
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


def _models(backend: str) -> dict[str, dict[str, Any]]:
    return {
        f"{model}-{name}": {"path": str(trained_model(model)), "backend": backend}
        for model in MODELS
        for name in MAPS
    }


@pytest.fixture(scope="module")
def cluster(expected: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("split"), None) as cluster:
        names = ("a", "b", "c", "empty")
        for name in names:
            cluster.add(name)
        rows = [
            Row(peer, span, f"{model}-{name}")
            for model in MODELS
            for name, spans in MAPS.items()
            for peer, span in spans
        ]
        for name in names:
            peers = [other for other in names if other != name]
            cluster.configure(name, rows, peers, models=_models("reference"))
        cluster.start()
        yield cluster


def _spans(result: Any) -> list[tuple[str, str]]:
    return [(hop["name"], hop["span"]) for hop in result["route"]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", list(MAPS))
def test_greedy_ids_equal_transformers(
    cluster: Cluster, expected: dict[str, list[tuple[list[int], list[int]]]], model: str, name: str
) -> None:
    origin = cluster.nodes["a"]
    for prompt, (prompt_ids, ids) in zip(PROMPTS, expected[model], strict=True):
        result = origin.run(prompt, "--model", f"{model}-{name}", "--max-tokens", str(TOKENS))
        assert result["prompt_token_ids"] == prompt_ids
        assert result["token_ids"] == ids
        assert result["exact"] is True
    if name == "interleaved":
        assert _spans(result) == [("a", "embed,0"), ("b", "1"), ("a", "2"), ("b", "3"), ("a", "4,head")]


@pytest.mark.parametrize("model", MODELS)
def test_a_node_that_holds_nothing_gets_the_same(
    cluster: Cluster, expected: dict[str, list[tuple[list[int], list[int]]]], model: str
) -> None:
    origin = cluster.nodes["empty"]
    assert origin.ctl_json("status")["workers"] == []
    for prompt, (_, ids) in zip(PROMPTS, expected[model], strict=True):
        result = origin.run(prompt, "--model", f"{model}-three", "--max-tokens", str(TOKENS))
        assert result["token_ids"] == ids
        assert [hop[0] for hop in _spans(result)] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["two", "three", "interleaved"])
def test_seeded_sampling_is_the_same_split_and_unsplit(cluster: Cluster, name: str) -> None:
    options = ["--temperature", "1.2", "--top-p", "0.95", "--seed", "7", "--max-tokens", "60"]
    penalties = ["--repetition-penalty", "1.3", "--presence-penalty", "0.5", "--frequency-penalty", "0.2"]
    origin = cluster.nodes["a"]
    for more in ([], penalties):
        alone = origin.run(PROMPTS[0], "--model", "llama2xs-unsplit", *options, *more)
        split = origin.run(PROMPTS[0], "--model", f"llama2xs-{name}", *options, *more)
        assert split["token_ids"] == alone["token_ids"]
        other_seed = origin.run(PROMPTS[0], "--model", f"llama2xs-{name}", *options, *more, "--seed", "8")
        assert other_seed["token_ids"] != alone["token_ids"]


@pytest.mark.parametrize("model", MODELS)
def test_a_relayed_edge_gives_the_same(
    expected: dict[str, list[tuple[list[int], list[int]]]], tmp_path: Path, model: str
) -> None:
    """b and c don't list each other, so the origin relays between them and says so."""
    with Cluster(tmp_path, trained_model(model)) as cluster:
        rows = [Row("b", "embed,0-2"), Row("c", "3-4,head")]
        for name in ("o", "b", "c"):
            cluster.add(name)
        cluster.configure("o", rows, ["b", "c"])
        cluster.configure("b", rows[:1], ["o"])
        cluster.configure("c", [Row("c", "3-4,head")], ["o"])
        for node in cluster.nodes.values():
            node.start()
        origin = cluster.nodes["o"]
        origin.wait_ready()
        for prompt, (_, ids) in zip(PROMPTS, expected[model], strict=True):
            result = origin.run(prompt, "--max-tokens", str(TOKENS))
            assert result["token_ids"] == ids
            assert _spans(result) == [("b", "embed,0-2"), ("c", "3-4,head")]
        lower = cluster.nodes["b"].ctl("status", check=False)
        assert "3-4,head" in lower.stdout  # b alone can't reach the other half, and says what is missing
