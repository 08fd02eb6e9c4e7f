"""Reading config.json and generation_config.json: every spelling, and one clear line for everything
unusable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_cases import CASES
from tiny_llama import TinyLlama, make_tiny_llama

from dgn_backends import bundled
from dgn_backends.errors import ModelError
from dgn_backends.hf_config import normalised_config_bytes, read_config
from dgn_backends.model import ModelConfig, RopeSpec

BASE: dict[str, object] = TinyLlama().config_json()


def write(directory: Path, changes: dict[str, object] | None = None, drop: tuple[str, ...] = ()) -> Path:
    config = {**BASE, **(changes or {})}
    for key in drop:
        config.pop(key, None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read(
    directory: Path, changes: dict[str, object] | None = None, drop: tuple[str, ...] = ()
) -> ModelConfig:
    return read_config(write(directory, changes, drop))


def rope_of(directory: Path, rope: dict[str, object], **changes: object) -> RopeSpec:
    return read(directory, {"rope_parameters": rope, **changes}).block.rope


def test_a_whole_config(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.n_blocks, config.vocab_size, config.max_positions) == (4, 261, 512)
    assert (config.block.hidden_size, config.block.intermediate_size) == (32, 48)
    assert (config.block.n_heads, config.block.n_kv_heads, config.block.head_dim) == (4, 2, 8)
    assert config.block.norm_eps == 1e-5
    assert config.block.rope == RopeSpec()
    assert not config.tied_head
    assert config.dtype == "f32"
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_old_and_new_spellings_read_alike(tmp_path: Path) -> None:
    for index, rope in enumerate([None, {"rope_type": "linear", "factor": 2.0}]):
        old_rope = rope and {"type": rope["rope_type"], "factor": 2.0}
        old = TinyLlama(spelling="old", rope=old_rope, theta=5000.0, dtype="bf16")
        new = TinyLlama(spelling="new", rope=rope, theta=5000.0, dtype="bf16")
        read_old = read_config(make_tiny_llama(tmp_path / f"old{index}", old))
        assert read_old == read_config(make_tiny_llama(tmp_path / f"new{index}", new))
        assert read_old.block.rope.theta == 5000.0
        assert read_old.dtype == "bf16"


def test_every_case_agrees_with_transformers_on_sizes(tmp_path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    for name, tiny in CASES.items():
        path = make_tiny_llama(tmp_path / name, tiny)
        ours, theirs = read_config(path), transformers.AutoConfig.from_pretrained(path)
        assert ours.block.n_kv_heads == theirs.num_key_value_heads
        derived = theirs.hidden_size // theirs.num_attention_heads
        assert ours.block.head_dim == getattr(theirs, "head_dim", derived)
        assert ours.block.rope.kind == theirs.rope_parameters["rope_type"]
        assert ours.block.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_head == theirs.tie_word_embeddings


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    absent = (
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
        "dtype",
        "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act",
    )  # fmt: skip
    config = read(tmp_path, drop=absent)
    assert config.block.n_kv_heads == 4
    assert config.block.norm_eps == 1e-6
    assert config.max_positions == 2048
    assert config.block.rope == RopeSpec()
    assert config.dtype == "f32"
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    # null counts as absent, except for the ids, where it says that there is none
    nulls = read(tmp_path, dict.fromkeys(absent, None))
    assert nulls.block == config.block
    assert (nulls.bos_token_id, nulls.eos_token_ids) == (None, ())


def test_model_type_stands_for_a_missing_architecture(tmp_path: Path) -> None:
    assert read(tmp_path, drop=("architectures",)).n_blocks == 4


def test_eos_of_the_generation_config_wins(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": [7, 8]})
    generation = tmp_path / "generation_config.json"
    assert read_config(tmp_path).eos_token_ids == (7, 8)
    for value, expected in ((5, (5,)), ([6, 5, 6], (6, 5)), (None, (7, 8)), ([], (7, 8)), (0, (0,))):
        generation.write_text(json.dumps({"eos_token_id": value}))
        assert read_config(tmp_path).eos_token_ids == expected
    generation.write_text("{}")
    assert read_config(tmp_path).eos_token_ids == (7, 8)


def test_rope_kinds_keep_only_what_they_use(tmp_path: Path) -> None:
    noise = {"beta_fast": 99, "low_freq_factor": 0.5, "high_freq_factor": 9.0, "factor": 3.0}
    assert rope_of(tmp_path, {"rope_type": "default", **noise}) == RopeSpec()
    assert rope_of(tmp_path, {"rope_type": "linear", **noise}) == RopeSpec(kind="linear", factor=3.0)
    dynamic = rope_of(tmp_path, {"rope_type": "dynamic", **noise}, max_position_embeddings=100)
    assert dynamic == RopeSpec(kind="dynamic", factor=3.0, original_positions=100)
    llama3 = rope_of(tmp_path, {"rope_type": "llama3", **noise, "original_max_position_embeddings": 64})
    assert llama3 == RopeSpec(
        kind="llama3", factor=3.0, original_positions=64, low_freq_factor=0.5, high_freq_factor=9.0
    )
    yarn = rope_of(tmp_path, {"rope_type": "yarn", **noise, "original_max_position_embeddings": 64})
    assert yarn == RopeSpec(kind="yarn", factor=3.0, original_positions=64, beta_fast=99.0)


def test_where_theta_and_the_original_window_may_stand(tmp_path: Path) -> None:
    assert rope_of(tmp_path, {"rope_theta": 7000.0}, rope_theta=9.0).theta == 7000.0
    assert rope_of(tmp_path, {"rope_type": "linear", "factor": 2}, rope_theta=900.0).theta == 900.0
    both = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    assert rope_of(tmp_path, both, original_max_position_embeddings=32).original_positions == 32
    assert rope_of(tmp_path, {"rope_type": "yarn", "factor": 2.0}).original_positions == 512
    # rope_scaling that is set wins over rope_parameters, as in transformers
    linear = {"type": "linear", "factor": 2.0}
    assert rope_of(tmp_path, {"rope_type": "default"}, rope_scaling=linear).kind == "linear"
    assert rope_of(tmp_path, {"rope_type": "linear", "factor": 4.0}, rope_scaling=None).factor == 4.0


def test_the_context_of_scaled_models(tmp_path: Path) -> None:
    def context(rope: dict[str, object], window: int) -> int:
        return read(tmp_path, {"rope_parameters": rope, "max_position_embeddings": window}).max_positions

    assert context({"rope_type": "default"}, 100) == 100
    assert context({"rope_type": "linear", "factor": 4.0}, 400) == 400
    assert context({"rope_type": "dynamic", "factor": 4.0}, 100) == 400
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert context({"rope_type": "llama3", "factor": 8.0, **llama3}, 512) == 512
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert context(yarn, 100) == 400
    assert context(yarn, 400) == 400


def test_yarn_infers_the_factor_from_the_windows(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    assert rope_of(tmp_path, {**rope, "factor": None}).factor == 8.0


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

UNUSABLE: list[tuple[dict[str, object], str]] = [
    (
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        "architectures is MixtralForCausalLM; supported: LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM$",
    ),
    (
        {"architectures": ["MistralForCausalLM"]},
        'model_type is "llama", but architectures names MistralForCausalLM, whose model_type is "mistral"',
    ),
    ({"architectures": []}, "architectures is empty; supported: LlamaForCausalLM"),
    (
        {"architectures": "LlamaForCausalLM"},
        'architectures must be a list of strings, not "LlamaForCausalLM"',
    ),
    (
        {"architectures": None, "model_type": "gpt2"},
        'architectures is missing, and model_type is "gpt2"; supported: LlamaForCausalLM',
    ),
    (
        {"quantization_config": {"bits": 4}},
        "quantization_config is set, and quantised weights are not supported",
    ),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "32"}, 'hidden_size must be a whole number, not "32"'),
    ({"hidden_size": 32.0}, "hidden_size must be a whole number, not 32.0"),
    ({"hidden_size": True}, "hidden_size must be a whole number, not true"),
    ({"hidden_size": -32}, "hidden_size is -32; it must be between 1 and"),
    ({"hidden_size": 10**30}, "hidden_size is 1000000000000000000000000000000; it must be between 1 and"),
    ({"intermediate_size": 0}, "intermediate_size is 0; it must be between 1 and"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be between 1 and"),
    ({"num_hidden_layers": [4]}, r"num_hidden_layers must be a whole number, not \[4\]"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    (
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        r"num_attention_heads \(3\) does not divide hidden_size \(32\)",
    ),
    ({"num_attention_heads": 64}, r"num_attention_heads \(64\) does not divide hidden_size \(32\)"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) does not divide num_attention_heads \(4\)"),
    ({"num_key_value_heads": 8}, r"num_key_value_heads \(8\) does not divide num_attention_heads \(4\)"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even number"),
    ({"num_attention_heads": 32, "num_key_value_heads": 32}, "head_dim is 1; rotary embedding needs an even"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; supported: silu'),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be greater than 0"),
    ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps must be a number, not "1e-5"'),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, which is not a usable number"),
    ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
    ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings must be true or false, not "yes"'),
    ({"dtype": "float64"}, 'dtype is "float64"; supported: float32, bfloat16, float16'),
    ({"dtype": None, "torch_dtype": "int8"}, 'torch_dtype is "int8"; supported'),
    ({"eos_token_id": "2"}, 'eos_token_id must be a token id or a list of token ids, not "2"'),
    ({"eos_token_id": [2, 1.5]}, r"eos_token_id must be a token id or a list of token ids, not \[2, 1.5\]"),
    ({"eos_token_id": 261}, "eos_token_id names token 261; the vocabulary is 0 to 260"),
    ({"bos_token_id": -1}, "bos_token_id names token -1; the vocabulary is 0 to 260"),
    ({"rope_scaling": "linear"}, 'rope_scaling must be an object, not "linear"'),
    (
        {"rope_scaling": {"type": "longrope", "factor": 2}},
        'rope_scaling.rope_type is "longrope"; supported: default, linear, dynamic, llama3, yarn',
    ),
    ({"rope_parameters": {"rope_type": "mrope"}}, 'rope_parameters.rope_type is "mrope"; supported: default'),
    ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type must be a string, not 3"),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
        "rope_parameters.full_attention is an object, and values nested in it are not supported",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "rope_parameters.factor is 0; it must be greater",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
        'rope_parameters.factor must be a number, not "2"',
    ),
    (
        {"rope_parameters": {"rope_theta": 0.5}},
        "rope_parameters.rope_theta is 0.5; it must be greater than 1",
    ),
    ({"rope_parameters": None, "rope_theta": -1}, "json: rope_theta is -1; it must be greater than 1"),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor other than 1 is not supported",
    ),
    ({"partial_rotary_factor": 0.25}, "json: partial_rotary_factor other than 1 is not supported"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, "rope_parameters.low_freq_factor is missing"),
    (
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        r"rope_parameters.high_freq_factor \(4\) must be greater than low_freq_factor \(4\)",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": -1}},
        "rope_parameters.beta_fast is -1",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": "no"}},
        "rope_parameters.truncate must be",
    ),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2},
        "head_dim is 2; the rotary kind dynamic needs at least 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNUSABLE, ids=[message[:40] for _, message in UNUSABLE])
def test_unusable_values_are_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, changes)
    assert caught.value.message.startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in caught.value.message
    assert caught.value.data["file"] == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "hidden_size": 32,\n}', r"config\.json:3:1: broken JSON"),
        (b"", r"config\.json:1:1: broken JSON"),
        (b"[1, 2]", r"config\.json: must hold a JSON object, not \[1, 2\]"),
        (b'{"a": "\xff"}', r"config\.json: is not UTF-8 text \(byte 7\)"),
        (b'{"a":' * 100_000, r"config\.json: unusable JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", r"config\.json: unusable JSON"),
        (b" " * ((16 << 20) + 1), r"config\.json: is larger than 16777216 bytes"),
    ],
    ids=["comma", "empty", "list", "not utf-8", "deep", "long number", "huge"],
)
def test_broken_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in caught.value.message


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json: is no regular file"):
        read_config(tmp_path)


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    generation = tmp_path / "generation_config.json"
    generation.write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json:1:2: broken JSON"):
        read_config(tmp_path)
    generation.write_text('{"eos_token_id": {}}')
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id must be a token id"):
        read_config(tmp_path)


def test_normalised_config_is_what_shapes_the_computation(tmp_path: Path) -> None:
    normal = normalised_config_bytes(read(tmp_path))
    same: list[dict[str, object]] = [
        {"eos_token_id": [5, 6], "bos_token_id": None},
        {"rope_parameters": None, "rope_theta": 10000},
        {"head_dim": 8, "use_cache": False, "transformers_version": "1"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "beta_fast": 3}},
    ]
    for changes in same:
        assert normalised_config_bytes(read(tmp_path, changes)) == normal
    other: list[dict[str, object]] = [
        {"rms_norm_eps": 1e-6},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 5},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_theta": 10001}},
        {"dtype": "bfloat16"},
        {"attention_bias": True},
    ]
    seen = {normal}
    for changes in other:
        seen.add(normalised_config_bytes(read(tmp_path, changes)))
    assert len(seen) == 1 + len(other)


def test_bundled_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "MODELS_DIR", tmp_path / "models")
    model = make_tiny_llama(tmp_path / "models" / "dgn-test")
    make_tiny_llama(tmp_path / "outside")
    (tmp_path / "models" / "empty").mkdir()
    assert bundled.bundled_model("dgn-test") == model
    for name in ("other", "empty", "", ".", "..", "../outside", "dgn-test/", "/dgn-test", str(model)):
        assert bundled.bundled_model(name) is None
