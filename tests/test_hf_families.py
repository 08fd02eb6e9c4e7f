"""Reading the families beside Llama: each one's defaults, as transformers has them, and blocks that differ by
window or rotary embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_cases import CASES
from tiny_llama import TinyLlama, make_tiny_llama

from dgn_backends.errors import ModelError
from dgn_backends.hf_config import normalised_config_bytes, read_config
from dgn_backends.hf_families import FAMILIES
from dgn_backends.model import ModelConfig
from dgn_backends.weights import HEAD, span_tensors, whole_model


def read(directory: Path, family: str, **changes: object) -> ModelConfig:
    """A config of `family` in which each key of `changes` is set, also to null; `...` leaves it out."""
    config = {**TinyLlama(family=family).config_json(), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    return read_config(directory)


def windows(config: ModelConfig) -> list[int | None]:
    return [block.window for block in config.blocks]


def rotary(config: ModelConfig) -> list[bool]:
    return [block.rotary for block in config.blocks]


def transformers_config(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoConfig.from_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_absent_keys_mean_what_they_mean_to_transformers(family: Any, tmp_path: Path) -> None:
    """Only the sizes that no default could guess are there."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 151936,
    }
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **names}))
    ours, theirs = read_config(tmp_path), transformers_config(tmp_path)
    assert type(theirs).model_type == family.model_type
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.block.n_kv_heads == theirs.num_key_value_heads
    assert ours.block.head_dim == getattr(theirs, "head_dim", 128)
    assert ours.block.norm_eps == theirs.rms_norm_eps
    assert ours.block.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    wanted = theirs.sliding_window if family.model_type == "mistral" else None
    assert windows(ours) == [wanted] * 32
    assert [int(each) for each in rotary(ours)] == getattr(theirs, "no_rope_layers", [1] * 32)


@pytest.mark.parametrize("name", [name for name, tiny in CASES.items() if tiny.family != "llama"])
def test_every_case_has_the_windows_of_transformers(name: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, CASES[name])
    ours, theirs = read_config(path), transformers_config(path)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.n_blocks
    assert windows(ours) == [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [int(each) for each in rotary(ours)] == getattr(theirs, "no_rope_layers", [1] * ours.n_blocks)


#: What the config.json of published models says of what is computed.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
    },
    "Mistral-Nemo-Instruct-2407": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 5120, "head_dim": 128, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 131072, "bos_token_id": 1, "eos_token_id": 2,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
        "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "mlp_bias": False,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "mlp_bias": False,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
        "torch_dtype": "bfloat16", "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128012,
        "pad_token_id": 128004,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_tensors_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path)
    assert config.dtype == "bf16"
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers_config(tmp_path))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied_head:
        del theirs[HEAD]
    assert span_tensors(config, whole_model(config)) == theirs
    assert windows(config) == [4096 if name == "Mistral-7B-v0.1" else None] * config.n_blocks
    assert rotary(config).count(False) == (9 if name == "SmolLM3-3B" else 0)


def test_biases_that_a_family_has_whatever_the_config_says(tmp_path: Path) -> None:
    for said in (True, False, ...):
        keys = {"attention_bias": said, "mlp_bias": said}
        mistral = read(tmp_path, "mistral", **keys).block
        assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)
        qwen2 = read(tmp_path, "qwen2", **keys).block
        assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
        qwen3 = read(tmp_path, "qwen3", **keys).block
        assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias) == (said is True, said is True, False)
        assert qwen3.qk_norm
        smollm3 = read(tmp_path, "smollm3", **keys).block
        assert (smollm3.qkv_bias, smollm3.o_bias, smollm3.mlp_bias) == (said is True,) * 3


def test_null_is_not_absent_where_transformers_tells_them_apart(tmp_path: Path) -> None:
    assert windows(read(tmp_path, "mistral", sliding_window=None)) == [None] * 4
    assert windows(read(tmp_path, "mistral", sliding_window=...)) == [4096] * 4
    used = {"use_sliding_window": True, "max_window_layers": 0}
    assert windows(read(tmp_path, "qwen2", **used, sliding_window=None)) == [None] * 4
    assert windows(read(tmp_path, "qwen2", **used, sliding_window=...)) == [4096] * 4
    assert read(tmp_path, "mistral", num_attention_heads=8, num_key_value_heads=None).block.n_kv_heads == 8
    assert read(tmp_path, "mistral", num_attention_heads=16, num_key_value_heads=...).block.n_kv_heads == 8


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_uses_its_window_only_where_it_says_so(family: str, tmp_path: Path) -> None:
    window = {"sliding_window": 64, "max_window_layers": 1}
    assert windows(read(tmp_path, family, **window)) == [None] * 4
    assert windows(read(tmp_path, family, **window, use_sliding_window=False)) == [None] * 4
    used = {**window, "use_sliding_window": True}
    assert windows(read(tmp_path, family, **used)) == [None, 64, 64, 64]
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(read(tmp_path, family, **used, layer_types=kinds)) == [64, None, None, 64]
    assert windows(read(tmp_path, family, **window, layer_types=["full_attention"] * 4)) == [None] * 4


def test_smollm3_leaves_out_the_rotation_of_some_blocks(tmp_path: Path) -> None:
    assert rotary(read(tmp_path, "smollm3")) == [True, True, True, False]
    assert rotary(read(tmp_path, "smollm3", no_rope_layer_interval=3)) == [True, True, False, True]
    listed = {"no_rope_layers": [0, 1, 1, 0, 1], "no_rope_layer_interval": 2}
    assert rotary(read(tmp_path, "smollm3", **listed)) == [False, True, True, False]
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(read(tmp_path, "smollm3", **listed, **window)) == [8, None, None, 8]
    assert windows(read(tmp_path, "smollm3", **listed, sliding_window=8)) == [None] * 4
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    assert windows(read(tmp_path, "smollm3", **listed, **window, layer_types=kinds)) == [8, None, None, None]


def test_model_type_names_the_family_in_old_files(tmp_path: Path) -> None:
    assert read(tmp_path, "qwen3", architectures=...).block.qk_norm
    assert read(tmp_path, "qwen3", model_type=...).block.qk_norm
    several = read(tmp_path, "qwen3", architectures=["OtherForCausalLM", "Qwen3ForCausalLM"])
    assert several.block.qk_norm


def test_windows_and_rotations_belong_to_a_models_identity(tmp_path: Path) -> None:
    seen = {
        normalised_config_bytes(read(tmp_path, family, **changes))
        for family, changes in (
            ("llama", {}),
            ("mistral", {"sliding_window": 8}),
            ("mistral", {"sliding_window": 9}),
            ("qwen2", {}),
            ("qwen3", {}),
            ("smollm3", {}),
            ("smollm3", {"no_rope_layer_interval": 2}),
        )
    }
    assert len(seen) == 7
    # A Mistral without a window is a Llama, by whatever name.
    assert normalised_config_bytes(read(tmp_path, "mistral", sliding_window=None)) in seen


UNUSABLE: list[tuple[str, dict[str, object], str]] = [
    ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be between 1 and"),
    ("mistral", {"sliding_window": "4096"}, 'sliding_window must be a whole number, not "4096"'),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 blocks"),
    (
        "mistral",
        {"layer_types": ["chunked_attention"] * 4},
        'layer_types has "chunked_attention"; supported: full_attention, sliding_attention',
    ),
    (
        "mistral",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
        "layer_types has sliding_attention, but no sliding_window is set or in use",
    ),
    (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8},
        "layer_types has sliding_attention, but no sliding_window is set or in use",
    ),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window must be true or false, not 1"),
    ("qwen3", {"max_window_layers": -1}, "max_window_layers is -1; it must be between 0 and"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 blocks"),
    ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, r"no_rope_layers must be a list of 0 and 1, not \[1, 0, 2"),
    ("smollm3", {"no_rope_layers": "1010"}, 'no_rope_layers must be a list of 0 and 1, not "1010"'),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0; it must be between 1 and"),
    (
        "qwen2",
        {"model_type": "qwen2_moe"},
        'model_type is "qwen2_moe", but architectures names Qwen2ForCausalLM',
    ),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), UNUSABLE, ids=[f"{family}-{text[:40]}" for family, _, text in UNUSABLE]
)
def test_unusable_values_are_named(
    family: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, family, **changes)
    assert caught.value.message.startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in caught.value.message
