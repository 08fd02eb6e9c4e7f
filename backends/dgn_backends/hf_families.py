"""The model families that can be read: what their blocks have, and what an absent key of `config.json` means
in each.

All are one decoder block with parts that a family has or lacks; defaults are those of transformers. Knows
nothing of weights or of compute. A new family of that kind is one more entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dgn_backends.hf_rope import MAX_POSITIONS
from dgn_backends.json_values import JsonObject

FULL, SLIDING = "full_attention", "sliding_attention"


def _no_windows(config: JsonObject, n_blocks: int) -> tuple[int | None, ...]:
    return (None,) * n_blocks


def _all_rotary(config: JsonObject, n_blocks: int) -> tuple[bool, ...]:
    return (True,) * n_blocks


def _mistral_windows(config: JsonObject, n_blocks: int) -> tuple[int | None, ...]:
    """In every block, unless `layer_types` says in which."""
    window = _window(config, default=4096)
    return _by_layer_types(config, window, n_blocks) or (window,) * n_blocks


def _qwen_windows(config: JsonObject, n_blocks: int) -> tuple[int | None, ...]:
    """Only with `use_sliding_window`, and then from block `max_window_layers` on."""
    window = None
    if config.boolean("use_sliding_window", default=False):
        window = _window(config, default=4096)
    first = config.integer("max_window_layers", least=0, most=MAX_POSITIONS, default=28)
    return _by_layer_types(config, window, n_blocks) or tuple(
        window if block >= first else None for block in range(n_blocks)
    )


def _smollm3_windows(config: JsonObject, n_blocks: int) -> tuple[int | None, ...]:
    """Only with `use_sliding_window`, and then in the blocks without rotary embedding."""
    window = _window(config, default=None)
    listed = _by_layer_types(config, window, n_blocks)
    if listed or not config.boolean("use_sliding_window", default=False):
        return listed or (None,) * n_blocks
    return tuple(None if rotary else window for rotary in _smollm3_rotary(config, n_blocks))


def _smollm3_rotary(config: JsonObject, n_blocks: int) -> tuple[bool, ...]:
    """`no_rope_layers` lists 1 for a block with rotary embedding, 0 for one without (its name says the
    opposite); in its absence every fourth block, or every `no_rope_layer_interval`th, is without."""
    listed = config.zeros_and_ones("no_rope_layers")
    if listed is None:
        interval = config.integer("no_rope_layer_interval", least=1, most=MAX_POSITIONS, default=4)
        return tuple((block + 1) % interval != 0 for block in range(n_blocks))
    if len(listed) < n_blocks:
        raise config.error("no_rope_layers", f"has {len(listed)} entries for {n_blocks} blocks")
    return tuple(listed[:n_blocks])


def _window(config: JsonObject, default: int | None) -> int | None:
    """An explicit null means no window, an absent key the family's default."""
    if config.is_null("sliding_window") or (default is None and not config.has("sliding_window")):
        return None
    return config.integer("sliding_window", least=1, most=MAX_POSITIONS, default=default)


def _by_layer_types(config: JsonObject, window: int | None, n_blocks: int) -> tuple[int | None, ...]:
    """The windows that `layer_types` asks for; empty where the key is absent."""
    kinds = config.strings("layer_types")
    if kinds is None:
        return ()
    if len(kinds) != n_blocks:
        raise config.error("layer_types", f"has {len(kinds)} entries for {n_blocks} blocks")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise config.error("layer_types", f'has "{kind}"; supported: {FULL}, {SLIDING}')
    if SLIDING in kinds and window is None:
        raise config.error("layer_types", f"has {SLIDING}, but no sliding_window is set or in use")
    return tuple(window if kind == SLIDING else None for kind in kinds)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. Where a bias is None, `attention_bias` or `mlp_bias` of the config decides; a fixed
    one stands whatever the config says, as in transformers."""

    architecture: str
    model_type: str
    max_positions: int
    kv_heads: int | None = None  #: None: as many as there are heads
    head_dim: int | None = None  #: None: hidden_size / heads
    theta: float = 10000.0
    tied: bool = False
    bos: int | None = None
    eos: int | None = None
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    windows: Callable[[JsonObject, int], tuple[int | None, ...]] = _no_windows  #: of each block
    rotary: Callable[[JsonObject, int], tuple[bool, ...]] = _all_rotary  #: of each block


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", max_positions=2048, bos=1, eos=2),
        Family(
            "MistralForCausalLM",
            "mistral",
            max_positions=131072,
            kv_heads=8,
            bos=1,
            eos=2,
            qkv_bias=False,
            o_bias=False,
            mlp_bias=False,
            windows=_mistral_windows,
        ),
        Family(
            "Qwen2ForCausalLM",
            "qwen2",
            max_positions=32768,
            kv_heads=32,
            qkv_bias=True,
            o_bias=False,
            mlp_bias=False,
            windows=_qwen_windows,
        ),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            max_positions=32768,
            kv_heads=32,
            head_dim=128,
            mlp_bias=False,
            qk_norm=True,
            windows=_qwen_windows,
        ),
        Family(
            "SmolLM3ForCausalLM",
            "smollm3",
            max_positions=32768,
            kv_heads=4,
            theta=2000000.0,
            tied=True,
            bos=128000,
            eos=128001,
            windows=_smollm3_windows,
            rotary=_smollm3_rotary,
        ),
    )
}


def read_family(config: JsonObject) -> Family:
    """The family that the config names, by `architectures` or, in its absence, by `model_type`.

    Raises ModelError, with what is supported, for any other, and where the two keys disagree.
    """
    supported = ", ".join(FAMILIES)
    names = config.strings("architectures")
    model_type = config.string("model_type", default=None)
    if names is None:
        for family in FAMILIES.values():
            if family.model_type == model_type:
                return family
        raise config.error(
            "architectures", f'is missing, and model_type is "{model_type or ""}"; supported: {supported}'
        )
    known = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if known is None:
        raise config.error("architectures", f"is {', '.join(names) or 'empty'}; supported: {supported}")
    if model_type not in (None, known.model_type):
        raise config.error(
            "model_type",
            f'is "{model_type}", but architectures names {known.architecture}, whose model_type is '
            f'"{known.model_type}"',
        )
    return known
