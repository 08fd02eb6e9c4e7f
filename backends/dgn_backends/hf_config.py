"""A Hugging Face model directory's configuration, read into a `ModelConfig`, every value checked.

Reads `config.json` and the eos ids of `generation_config.json`, in the spellings of old and new versions of
transformers. Knows nothing of weights, tokenizers or compute.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

from dgn_backends.hf_families import Family, read_family
from dgn_backends.hf_rope import MAX_POSITIONS, context, read_rope
from dgn_backends.json_values import JsonObject, read_json_object
from dgn_backends.model import BlockSpec, ModelConfig
from dgn_backends.tensor import DType

_DTYPES: dict[str, DType] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

# Far above every real model: a larger number is a mistake, and would only fail later with a worse message.
_MAX_WIDTH = 1 << 20
_MAX_BLOCKS = 10_000
_MAX_VOCAB = 1 << 24


def read_config(model_dir: Path) -> ModelConfig:
    """The configuration of the model in `model_dir`.

    Raises ModelError, one line naming file and key, for a missing or broken file, an unsupported
    architecture, and every value that can't be used.
    """
    config = read_json_object(model_dir / "config.json")
    family = read_family(config)
    if config.has("quantization_config"):
        raise config.error("quantization_config", "is set, and quantised weights are not supported")
    trained = config.integer(
        "max_position_embeddings", least=1, most=MAX_POSITIONS, default=family.max_positions
    )
    blocks = _read_blocks(config, family, trained)
    vocab_size = config.integer("vocab_size", least=1, most=_MAX_VOCAB)
    return ModelConfig(
        blocks=blocks,
        vocab_size=vocab_size,
        max_positions=context(blocks[0].rope, trained),
        tied_head=config.boolean("tie_word_embeddings", default=family.tied),
        dtype=_read_dtype(config),
        bos_token_id=_read_bos(config, family, vocab_size),
        eos_token_ids=_read_eos(model_dir, config, family, vocab_size),
    )


def normalised_config_bytes(config: ModelConfig) -> bytes:
    """What two nodes must agree on to compute the same model, as canonical JSON.

    The eos and bos ids are left out: only the origin uses them, and publishers correct them in place.
    """
    fields = dataclasses.asdict(config)
    del fields["bos_token_id"], fields["eos_token_ids"]
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read_blocks(config: JsonObject, family: Family, trained: int) -> tuple[BlockSpec, ...]:
    n_blocks = config.integer("num_hidden_layers", least=1, most=_MAX_BLOCKS)
    shape = _read_block(config, family, trained)
    variants = zip(family.windows(config, n_blocks), family.rotary(config, n_blocks), strict=True)
    return tuple(replace(shape, window=window, rotary=rotary) for window, rotary in variants)


def _read_block(config: JsonObject, family: Family, trained: int) -> BlockSpec:
    """What all blocks have in common."""
    hidden_size = config.integer("hidden_size", least=1, most=_MAX_WIDTH)
    n_heads = config.integer("num_attention_heads", least=1, most=_MAX_WIDTH)
    usual = n_heads if config.is_null("num_key_value_heads") else family.kv_heads or n_heads
    n_kv_heads = config.integer("num_key_value_heads", least=1, most=_MAX_WIDTH, default=usual)
    if n_heads % n_kv_heads:
        raise config.error(
            "num_key_value_heads", f"({n_kv_heads}) does not divide num_attention_heads ({n_heads})"
        )
    if not config.has("head_dim") and family.head_dim is None and hidden_size % n_heads:
        raise config.error("num_attention_heads", f"({n_heads}) does not divide hidden_size ({hidden_size})")
    head_dim = config.integer(
        "head_dim", least=2, most=_MAX_WIDTH, default=family.head_dim or hidden_size // n_heads
    )
    if head_dim < 2 or head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}; rotary embedding needs an even number of at least 2")
    activation = config.string("hidden_act", default="silu")
    if activation != "silu":
        raise config.error("hidden_act", f'is "{activation}"; supported: silu')
    attention_bias = config.boolean("attention_bias", default=False)
    mlp_bias = config.boolean("mlp_bias", default=False)
    return BlockSpec(
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", least=1, most=_MAX_WIDTH),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", above=0.0, default=1e-6),
        rope=read_rope(config, head_dim, trained, family.theta),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
    )


def _read_dtype(config: JsonObject) -> DType:
    key = "dtype" if config.has("dtype") else "torch_dtype"
    name = config.string(key, default="float32")
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise config.error(key, f'is "{name}"; supported: {", ".join(_DTYPES)}')
    return dtype


def _read_bos(config: JsonObject, family: Family, vocab_size: int) -> int | None:
    ids = _special_ids(config, "bos_token_id", family.bos, vocab_size)
    return ids[0] if ids else None


def _read_eos(model_dir: Path, config: JsonObject, family: Family, vocab_size: int) -> tuple[int, ...]:
    generation_path = model_dir / "generation_config.json"
    if generation_path.exists():
        eos = read_json_object(generation_path).token_ids("eos_token_id", vocab_size)
        if eos:
            return eos
    return _special_ids(config, "eos_token_id", family.eos, vocab_size)


def _special_ids(config: JsonObject, key: str, usual: int | None, vocab_size: int) -> tuple[int, ...]:
    """A key that is absent means the family's id, an explicit null none."""
    if config.is_null(key):
        return ()
    given = config.token_ids(key, vocab_size)
    if given or usual is None or usual >= vocab_size:
        return given
    return (usual,)
