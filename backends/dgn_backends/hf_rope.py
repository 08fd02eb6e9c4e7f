"""The rotary embedding of a model, read from its `config.json` in the spellings of old and new versions of
transformers.

Knows nothing of angles; those are in `rope`.
"""

from __future__ import annotations

from dgn_backends.json_values import JsonObject
from dgn_backends.model import RopeKind, RopeSpec

ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")

#: Far above every real model's context.
MAX_POSITIONS = 1 << 28


def read_rope(config: JsonObject, head_dim: int, trained: int, default_theta: float) -> RopeSpec:
    """The rotary kind and only the values that this kind uses, so that equal models read as equal.

    `trained` is the config's window of positions. Raises ModelError, naming the key, for what can't be used.
    """
    # transformers lets a non-empty rope_scaling (old) win over rope_parameters (new).
    rope = (
        config.object("rope_scaling") or config.object("rope_parameters") or config.empty("rope_parameters")
    )
    rope.refuse_nested()
    kind = rope.string("rope_type", default=None) or rope.string("type", default="default")
    theta_at = rope if rope.has("rope_theta") else config
    theta = theta_at.number("rope_theta", above=1.0, default=default_theta)
    for part in (rope, config):
        if part.number("partial_rotary_factor", above=0.0, default=1.0) != 1.0:
            raise part.error("partial_rotary_factor", "other than 1 is not supported")
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


def context(rope: RopeSpec, trained: int) -> int:
    """Positions that the model can use. `max_position_embeddings` is the window before scaling for `dynamic`,
    and in many files of kind `yarn`; elsewhere it is the context itself."""
    if rope.kind in ("dynamic", "yarn"):
        scaled = min(int(rope.original_positions * rope.factor), MAX_POSITIONS)
        return max(trained, scaled)
    return trained


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
    return place.integer(key, least=1, most=MAX_POSITIONS, default=trained)
