"""Every family through real daemons: two nodes, one with ONNX Runtime and one with torch, give the ids of
`transformers`, from the words of a chat on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import Cluster, Row
from text_families import FAMILY_TEXTS
from tiny_llama import TinyLlama, make_tiny_llama

PROMPTS = ("How do I connect a peer?", "the quick brown fox jumps over the lazy dog and says hello")
TOKENS = 40
_SHAPE = TinyLlama(vocab_size=760, tokenizer=False, eos=None, max_positions=1024)

#: Windows are shorter than the prompts; `embed` and the head are on the node that has the other blocks.
MODELS: dict[str, tuple[TinyLlama, str, tuple[tuple[str, str], ...]]] = {
    "mistral": (
        replace(_SHAPE, family="mistral", extra={"sliding_window": 7}),
        "mistral-v3",
        (("a", "embed,0"), ("b", "1-3,head")),
    ),
    "qwen2": (
        replace(
            _SHAPE,
            family="qwen2",
            extra={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        ),
        "qwen",
        (("b", "embed,0-1"), ("a", "2-3,head")),
    ),
    "qwen3": (
        replace(_SHAPE, family="qwen3", head_dim=16, theta=1e6),
        "qwen",
        (("a", "embed,0,2,head"), ("b", "1,3")),
    ),
    "smollm3": (
        replace(_SHAPE, family="smollm3", extra={"pad_token_id": 0, "no_rope_layer_interval": 2}),
        "smollm3",
        (("a", "embed,0-2"), ("b", "3,head")),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    paths = {}
    for name, (tiny, texts, _) in MODELS.items():
        paths[name] = FAMILY_TEXTS[texts](make_tiny_llama(directory / name, tiny))
        settings = json.loads((paths[name] / "tokenizer_config.json").read_text())
        vocab = json.loads((paths[name] / "tokenizer.json").read_text())
        (eos,) = (t["id"] for t in vocab["added_tokens"] if t["content"] == settings["eos_token"])
        (paths[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return paths


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with Cluster(tmp_path_factory.mktemp("nodes"), None) as cluster:
        rows = [Row(peer, span, name) for name, (_, _, map_) in MODELS.items() for peer, span in map_]
        for name in ("a", "b"):
            cluster.add(name)
        for name, other, backend in (("a", "b", "onnx"), ("b", "a", "torch")):
            keys = {"backend": backend, "dtype": "f32"}
            here = {model: {"path": str(path), **keys} for model, path in models.items()}
            cluster.configure(name, rows, [other], models=here)
        cluster.start()
        yield cluster


def transformers_ids(path: Path, prompt: str) -> tuple[list[int], list[int]]:
    """The ids of a chat that begins with `prompt`, and the answer's, greedily."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return ids, out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_a_split_chat_has_the_ids_of_transformers(
    name: str, cluster: Cluster, models: dict[str, Path]
) -> None:
    for prompt in PROMPTS:
        prompt_ids, ids = transformers_ids(models[name], prompt)
        assert len(prompt_ids) > 7
        assert len(np.unique(ids)) > 5  # an answer that repeats itself would prove little
        for origin in cluster.nodes.values():
            result: Any = origin.ctl_json("run", "--model", name, "--max-tokens", str(TOKENS), prompt)
            assert result["prompt_token_ids"] == prompt_ids
            assert result["token_ids"] == ids
            assert {hop["name"] for hop in result["route"]} == {"a", "b"}
