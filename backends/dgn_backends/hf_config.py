"""A Hugging Face model directory's configuration, read into a `ModelConfig`, every value checked.

Reads `config.json` and the eos ids of `generation_config.json`, in the spellings of old and new versions of
transformers. Knows nothing of weights, tokenizers or compute.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dgn_backends.json_values import JsonObject, read_json_object
from dgn_backends.model import BlockSpec, ModelConfig, RopeKind, RopeSpec
from dgn_backends.tensor import DType

ARCHITECTURE = "LlamaForCausalLM"
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
_DTYPES: dict[str, DType] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

# Far above every real model: a larger number is a mistake, and would only fail later with a worse message.
_MAX_WIDTH = 1 << 20
_MAX_BLOCKS = 10_000
_MAX_VOCAB = 1 << 24
_MAX_POSITIONS = 1 << 28


def read_config(model_dir: Path) -> ModelConfig:
    """The configuration of the model in `model_dir`.

    Raises ModelError, one line naming file and key, for a missing or broken file, an unsupported
    architecture, and every value that can't be used.
    """
    config = read_json_object(model_dir / "config.json")
    _check_architecture(config)
    block = _read_block(config)
    trained_positions = _trained_positions(config)
    vocab_size = config.integer("vocab_size", least=1, most=_MAX_VOCAB)
    return ModelConfig(
        blocks=(block,) * config.integer("num_hidden_layers", least=1, most=_MAX_BLOCKS),
        vocab_size=vocab_size,
        max_positions=_context(block.rope, trained_positions),
        tied_head=config.boolean("tie_word_embeddings", default=False),
        dtype=_read_dtype(config),
        bos_token_id=_read_bos(config, vocab_size),
        eos_token_ids=_read_eos(model_dir, config, vocab_size),
    )


def normalised_config_bytes(config: ModelConfig) -> bytes:
    """What two nodes must agree on to compute the same model, as canonical JSON.

    The eos and bos ids are left out: only the origin uses them, and publishers correct them in place.
    """
    fields = dataclasses.asdict(config)
    del fields["bos_token_id"], fields["eos_token_ids"]
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check_architecture(config: JsonObject) -> None:
    names = config.strings("architectures")
    if names is None:
        model_type = config.string("model_type", default=None)
        if model_type != "llama":
            raise config.error("architectures", f"is missing; supported: {ARCHITECTURE}")
    elif ARCHITECTURE not in names:
        raise config.error("architectures", f"is {', '.join(names) or 'empty'}; supported: {ARCHITECTURE}")
    if config.has("quantization_config"):
        raise config.error("quantization_config", "is set, and quantised weights are not supported")


def _read_block(config: JsonObject) -> BlockSpec:
    hidden_size = config.integer("hidden_size", least=1, most=_MAX_WIDTH)
    n_heads = config.integer("num_attention_heads", least=1, most=_MAX_WIDTH)
    n_kv_heads = config.integer("num_key_value_heads", least=1, most=_MAX_WIDTH, default=n_heads)
    if n_heads % n_kv_heads:
        raise config.error(
            "num_key_value_heads", f"({n_kv_heads}) does not divide num_attention_heads ({n_heads})"
        )
    if not config.has("head_dim") and hidden_size % n_heads:
        raise config.error("num_attention_heads", f"({n_heads}) does not divide hidden_size ({hidden_size})")
    head_dim = config.integer("head_dim", least=2, most=_MAX_WIDTH, default=hidden_size // n_heads)
    if head_dim < 2 or head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}; rotary embedding needs an even number of at least 2")
    activation = config.string("hidden_act", default="silu")
    if activation != "silu":
        raise config.error("hidden_act", f'is "{activation}"; supported: silu')
    bias = config.boolean("attention_bias", default=False)
    return BlockSpec(
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", least=1, most=_MAX_WIDTH),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", above=0.0, default=1e-6),
        rope=_read_rope(config, head_dim),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", default=False),
    )


def _trained_positions(config: JsonObject) -> int:
    return config.integer("max_position_embeddings", least=1, most=_MAX_POSITIONS, default=2048)


def _read_rope(config: JsonObject, head_dim: int) -> RopeSpec:
    """The rotary kind and only the values that this kind uses, so that equal models read as equal."""
    # transformers lets a non-empty rope_scaling (old) win over rope_parameters (new).
    rope = (
        config.object("rope_scaling") or config.object("rope_parameters") or config.empty("rope_parameters")
    )
    rope.refuse_nested()
    kind = rope.string("rope_type", default=None) or rope.string("type", default="default")
    theta_at = rope if rope.has("rope_theta") else config
    theta = theta_at.number("rope_theta", above=1.0, default=10000.0)
    for part in (rope, config):
        if part.number("partial_rotary_factor", above=0.0, default=1.0) != 1.0:
            raise part.error("partial_rotary_factor", "other than 1 is not supported")
    trained = _trained_positions(config)
    match kind:
        case "default":
            return RopeSpec(theta=theta)
        case "linear":
            return RopeSpec(kind="linear", theta=theta, factor=rope.number("factor", above=0.0))
        case "dynamic":
            if head_dim < 4:
                raise config.error("head_dim", f"is {head_dim}; the rotary kind dynamic needs at least 4")
            return RopeSpec(
                kind="dynamic",
                theta=theta,
                factor=rope.number("factor", above=0.0),
                original_positions=trained,
            )
        case "llama3":
            low = rope.number("low_freq_factor", above=0.0)
            high = rope.number("high_freq_factor", above=0.0)
            if high <= low:
                raise rope.error(
                    "high_freq_factor", f"({high:g}) must be greater than low_freq_factor ({low:g})"
                )
            return RopeSpec(
                kind="llama3",
                theta=theta,
                factor=rope.number("factor", above=0.0),
                original_positions=_original_positions(config, rope, trained),
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case "yarn":
            return _read_yarn(config, rope, theta, trained)
    raise rope.error("rope_type", f'is "{kind}"; supported: {", ".join(ROPE_KINDS)}')


def _read_yarn(config: JsonObject, rope: JsonObject, theta: float, trained: int) -> RopeSpec:
    original = _original_positions(config, rope, trained)
    return RopeSpec(
        kind="yarn",
        theta=theta,
        factor=rope.number("factor", above=0.0, default=trained / original),
        original_positions=original,
        beta_fast=rope.number("beta_fast", least=0.0, default=0.0) or 32.0,
        beta_slow=rope.number("beta_slow", least=0.0, default=0.0) or 1.0,
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", default=True),
    )


def _original_positions(config: JsonObject, rope: JsonObject, trained: int) -> int:
    key = "original_max_position_embeddings"
    place = config if config.has(key) else rope
    return place.integer(key, least=1, most=_MAX_POSITIONS, default=trained)


def _context(rope: RopeSpec, trained_positions: int) -> int:
    """Positions that the model can use. `max_position_embeddings` is the window before scaling for `dynamic`,
    and in many files of kind `yarn`; elsewhere it is the context itself."""
    if rope.kind in ("dynamic", "yarn"):
        scaled = min(int(rope.original_positions * rope.factor), _MAX_POSITIONS)
        return max(trained_positions, scaled)
    return trained_positions


def _read_dtype(config: JsonObject) -> DType:
    key = "dtype" if config.has("dtype") else "torch_dtype"
    name = config.string(key, default="float32")
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise config.error(key, f'is "{name}"; supported: {", ".join(_DTYPES)}')
    return dtype


def _read_bos(config: JsonObject, vocab_size: int) -> int | None:
    # A key that is absent means transformers' default for Llama (1), an explicit null means none.
    if config.is_null("bos_token_id"):
        return None
    bos = config.token_ids("bos_token_id", vocab_size) or ((1,) if vocab_size > 1 else ())
    return bos[0] if bos else None


def _read_eos(model_dir: Path, config: JsonObject, vocab_size: int) -> tuple[int, ...]:
    generation_path = model_dir / "generation_config.json"
    if generation_path.exists():
        eos = read_json_object(generation_path).token_ids("eos_token_id", vocab_size)
        if eos:
            return eos
    if config.is_null("eos_token_id"):
        return ()
    return config.token_ids("eos_token_id", vocab_size) or ((2,) if vocab_size > 2 else ())
