"""The mathematics of a decoder block, in float64. Knows nothing of sequences, steps or files.

Everything is built from `BlockSpec`, one frozen description that every backend builds from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dgn_backends.model import BlockSpec

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

#: Queries are worked in tiles of this many positions, so that scores and masks stay small for any prompt.
QUERIES_AT_ONCE = 64


class Block:
    """One block's weights, by their names in the file without the block's prefix."""

    def __init__(self, spec: BlockSpec, weights: Mapping[str, F64]) -> None:
        self.spec = spec
        self._weights = weights

    def queries_keys_values(self, x: F64, cos: F64, sin: F64) -> tuple[F64, F64, F64]:
        """The first half of attention for hidden states [rows, hidden_size]: heads [rows, n, head_dim], q
        and k normed and rotated where the block does so, q scaled."""
        heads = (len(x), -1, self.spec.head_dim)
        normed = norm(x, self._weights["input_layernorm.weight"], self.spec.norm_eps)
        q, k, v = (self._linear(f"self_attn.{name}_proj", normed).reshape(heads) for name in "qkv")
        if self.spec.qk_norm:
            q = norm(q, self._weights["self_attn.q_norm.weight"], self.spec.norm_eps)
            k = norm(k, self._weights["self_attn.k_norm.weight"], self.spec.norm_eps)
        if self.spec.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q / np.sqrt(self.spec.head_dim), k, v

    def finish(self, x: F64, mixed: F64) -> F64:
        """The rest of the block: attention's output [rows, n_heads * head_dim] is added to `x`, then the
        MLP's."""
        x = x + self._linear("self_attn.o_proj", mixed)
        normed = norm(x, self._weights["post_attention_layernorm.weight"], self.spec.norm_eps)
        gate, up = self._linear("mlp.gate_proj", normed), self._linear("mlp.up_proj", normed)
        return x + self._linear("mlp.down_proj", silu(gate) * up)

    def _linear(self, name: str, x: F64) -> F64:
        y: F64 = x @ self._weights[f"{name}.weight"].T  # stored as [out, in]
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias


def norm(x: F64, weight: F64, eps: float) -> F64:
    """Root-mean-square norm of each row."""
    scaled: F64 = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight
    return scaled


def silu(x: F64) -> F64:
    """x * sigmoid(x), without overflow in exp."""
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


def rotate(x: F64, cos: F64, sin: F64) -> F64:
    """Rotary embedding of heads [rows, n, head_dim]; the two halves of a head hold the coordinates of its
    pairs."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: F64, start: int, pages: Sequence[tuple[F32, F32]], window: int | None) -> F64:
    """Causal attention of queries [rows, n_heads, head_dim] at positions `start` onwards over the pages of
    one sequence's KV, each of K and V [n_kv_heads, page positions, head_dim]. With a `window`, a query sees
    that many positions, its own the last of them. Returns [rows, n_heads * head_dim].

    The query heads that share a KV head are an axis of their own, so K and V are never repeated; pages are
    used where they lie; and the softmax is carried from page to page, so that no row of scores is ever whole.
    """
    tiles = [
        _attend_tile(q[first : first + QUERIES_AT_ONCE], start + first, pages, window)
        for first in range(0, len(q), QUERIES_AT_ONCE)
    ]
    return np.concatenate(tiles)


def _attend_tile(q: F64, start: int, pages: Sequence[tuple[F32, F32]], window: int | None) -> F64:
    rows, n_heads, head_dim = q.shape
    n_kv_heads, page_positions, _ = pages[0][0].shape
    grouped = q.reshape(rows, n_kv_heads, -1, head_dim).swapaxes(0, 1).reshape(n_kv_heads, -1, head_dim)
    # Finite, since a row may see nothing of the first page that its tile looks at.
    peak = np.full((*grouped.shape[:2], 1), np.finfo("f8").min)
    total, mixed = np.zeros_like(peak), np.zeros_like(grouped)
    positions = np.repeat(np.arange(start, start + rows), n_heads // n_kv_heads)[:, None]
    for index, (keys, values) in enumerate(pages):
        first_key = index * page_positions
        if first_key >= start + rows:
            break  # all of this page lies in the future of these queries
        if window is not None and first_key + page_positions <= start - window + 1:
            continue  # all of it lies before the window of the first of them
        scores = grouped @ keys.astype("f8").swapaxes(1, 2)  # [n_kv_heads, rows * heads of a group, page]
        keys_at = np.arange(first_key, first_key + page_positions)
        scores[:, keys_at > positions] = -np.inf
        if window is not None:
            scores[:, keys_at <= positions - window] = -np.inf
        higher = np.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights = np.exp(scores - higher)
        shrink = np.exp(peak - higher)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        mixed = mixed * shrink + weights @ values.astype("f8")
        peak = higher
    out = (mixed / total).reshape(n_kv_heads, rows, -1, head_dim).swapaxes(0, 1)
    return out.reshape(rows, n_heads * head_dim)
