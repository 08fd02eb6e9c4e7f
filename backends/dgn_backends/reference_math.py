"""The arithmetic of a decoder block for the reference backend: f32 NumPy, in fixed tiles.

A matrix product may round differently when its number of rows changes. So rows always go through in tiles of
TILE_ROWS, a row's tile and its place in it are given by its absolute position alone (`position // TILE_ROWS`,
`position % TILE_ROWS`), and keys are taken by fixed pages in their order. Every product then has the same
shape, however a prompt is cut and whatever else is in the batch, and each row's bits depend on its own input
and KV only.

Knows nothing of sequences, spans or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dgn_backends.kv import PAGE_POSITIONS

F32 = npt.NDArray[np.float32]

TILE_ROWS = 16
assert PAGE_POSITIONS % TILE_ROWS == 0  # so that a tile never straddles two pages

_SCORE_BYTES = 8 << 20  # bound on the scores that are held at once


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x @ weight.T + bias; weight [out, in], bias [out]."""

    weight: F32
    bias: F32 | None = None

    def __call__(self, x: F32) -> F32:
        """[tiles, TILE_ROWS, in] to [tiles, TILE_ROWS, out]."""
        y: F32 = np.matmul(x, self.weight.T)
        if self.bias is not None:
            y += self.bias
        return y


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467); weight [hidden_size]."""

    weight: F32
    eps: float

    def __call__(self, x: F32) -> F32:
        """[..., hidden_size], each row alone."""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        y: F32 = x / np.sqrt(mean + np.float32(self.eps))
        y *= self.weight
        return y


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeights:
    """The weights of one decoder block."""

    input_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    post_norm: Norm
    gate: Linear
    up: Linear
    down: Linear

    def mlp(self, x: F32) -> F32:
        """down(silu(gate(x)) * up(x)), without the norm."""
        gate = self.gate(x)
        with np.errstate(over="ignore"):  # exp of a large number is infinity, and silu is then rightly -0
            gate /= 1.0 + np.exp(-gate)
        gate *= self.up(x)
        return self.down(gate)


def tile_count(start: int, count: int) -> int:
    """The number of tiles that the positions `[start, start + count)` touch."""
    return (start + count - 1) // TILE_ROWS - start // TILE_ROWS + 1


def attention(queries: F32, first_tile: int, pages: Sequence[tuple[F32, F32]]) -> F32:
    """Causal attention with grouped key heads; scores and softmax in f32.

    `queries` [tiles, TILE_ROWS, n_heads, head_dim] stand at the positions from `first_tile * TILE_ROWS` on;
    `pages` hold the keys and values [n_kv_heads, PAGE_POSITIONS, head_dim] from position 0 on, up to the last
    real query. Returns [tiles, TILE_ROWS, n_heads * head_dim]. Query heads that share a key head are rows of
    one product, so keys and values are never repeated.
    """
    tiles, rows, n_heads, head_dim = queries.shape
    n_kv_heads = pages[0][0].shape[0]
    group = n_heads // n_kv_heads
    grouped = queries.reshape(tiles, rows, n_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = (grouped * np.float32(head_dim**-0.5)).reshape(tiles, n_kv_heads, group * rows, head_dim)
    out = np.empty((tiles, rows, n_kv_heads, group, head_dim), dtype=np.float32)
    at_once = max(1, _SCORE_BYTES // (4 * n_heads * rows * PAGE_POSITIONS * len(pages)))
    for begin in range(0, tiles, at_once):
        part = grouped[begin : begin + at_once]
        mixed = _attend(part, group, first_tile + begin, pages)
        shape = (part.shape[0], n_kv_heads, group, rows, head_dim)
        out[begin : begin + at_once] = mixed.reshape(shape).transpose(0, 3, 1, 2, 4)
    return out.reshape(tiles, rows, n_heads * head_dim)


def _attend(queries: F32, group: int, first_tile: int, pages: Sequence[tuple[F32, F32]]) -> F32:
    """`queries` [tiles, n_kv_heads, group * TILE_ROWS, head_dim], scaled; the same shape comes back."""
    tiles, n_kv_heads, rows, _ = queries.shape
    last = (first_tile + tiles) * TILE_ROWS - 1
    pages = pages[: last // PAGE_POSITIONS + 1]
    scores = np.empty((len(pages), tiles, n_kv_heads, rows, PAGE_POSITIONS), dtype=np.float32)
    for index, (keys, _values) in enumerate(pages):
        np.matmul(queries, keys.swapaxes(-1, -2), out=scores[index])
    _mask(scores, group, first_tile)
    scores -= scores.max(axis=(0, 4))[None, ..., None]  # a maximum is exact, in whatever order it is taken
    np.exp(scores, out=scores)
    page_sums = scores.sum(axis=-1)
    mixed: F32 = np.matmul(scores[0], pages[0][1])
    total = page_sums[0]
    for index in range(1, len(pages)):
        mixed += np.matmul(scores[index], pages[index][1])
        total += page_sums[index]
    mixed /= total[..., None]
    return mixed


def _mask(scores: F32, group: int, first_tile: int) -> None:
    """Sets to -inf the scores of keys after their query: only where a page reaches beyond the first query."""
    n_pages, tiles = scores.shape[:2]
    first = first_tile * TILE_ROWS
    positions = np.arange(first, first + tiles * TILE_ROWS).reshape(tiles, 1, 1, TILE_ROWS, 1)
    for index in range(first // PAGE_POSITIONS, n_pages):
        key_positions = np.arange(index * PAGE_POSITIONS, (index + 1) * PAGE_POSITIONS)
        by_head = scores[index].reshape(tiles, scores.shape[2], group, TILE_ROWS, PAGE_POSITIONS)
        np.copyto(by_head, np.float32(-np.inf), where=key_positions > positions)
