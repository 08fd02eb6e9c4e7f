"""The arithmetic of a decoder block for the reference backend: f32 NumPy, in fixed tiles.

A matrix product may round differently when its number of rows changes. So rows always go through in tiles of
TILE_ROWS, a row's tile and its place in it are given by its absolute position alone (`position // TILE_ROWS`,
`position % TILE_ROWS`), and keys are taken by fixed pages in their order. Every product then has the same
shape, however a prompt is cut and whatever else is in the batch, and each row's bits depend on its own input
and KV only.

BLAS may also divide a product among threads, and then rounds by their number. So a product is taken in parts
that are too small to be divided (and whose sums are too short to be cut): TILE_COLUMNS by SUM_LENGTH of a
weight.

Knows nothing of sequences, spans or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dgn_backends.kv import PAGE_POSITIONS
from dgn_backends.model import BlockSpec
from dgn_backends.rope import rotate

F32 = npt.NDArray[np.float32]

TILE_ROWS = 4  # small, because a decode step computes a whole tile for its one row
TILE_COLUMNS = 64
SUM_LENGTH = 256
assert PAGE_POSITIONS % TILE_ROWS == 0  # so that a tile never straddles two pages

_SCORE_BYTES = 8 << 20  # bound on the scores that are held at once


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x @ weight.T + bias; weight [out, in], bias [out]."""

    weight: F32
    bias: F32 | None = None

    def __call__(self, x: F32) -> F32:
        """[tiles, TILE_ROWS, in] to [tiles, TILE_ROWS, out]."""
        y = product(x, self.weight)
        if self.bias is not None:
            y += self.bias
        return y


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467); weight [width]."""

    weight: F32
    eps: float

    def __call__(self, x: F32) -> F32:
        """[..., width], each row alone."""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        y: F32 = x / np.sqrt(mean + np.float32(self.eps))
        y *= self.weight
        return y


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeights:
    """What `spec` describes: one decoder block's weights."""

    spec: BlockSpec
    input_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    post_norm: Norm
    gate: Linear
    up: Linear
    down: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def heads(self, x: F32, cos: F32, sin: F32) -> tuple[F32, F32, F32]:
        """Queries, keys and values of the normed `x`, each [tiles, TILE_ROWS, heads, head_dim], the first two
        normed and rotated where the block does so."""
        shape = (*x.shape[:2], -1, self.spec.head_dim)
        q, k, v = (layer(x).reshape(shape) for layer in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

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


def product(x: F32, weight: F32) -> F32:
    """x @ weight.T in fixed parts: [tiles, TILE_ROWS, in] and [out, in] to [tiles, TILE_ROWS, out]."""
    tiles, rows, n_in = x.shape
    n_out = weight.shape[0]
    n_parts = n_out // TILE_COLUMNS
    whole = n_parts * TILE_COLUMNS  # the rest of the columns is a part of its own
    y = np.empty((tiles, rows, n_out), dtype=np.float32)
    columns = y[..., :whole].reshape(tiles, rows, n_parts, TILE_COLUMNS).swapaxes(1, 2)  # a view of y
    for begin in range(0, n_in, SUM_LENGTH):
        summed = slice(begin, begin + SUM_LENGTH)
        length = min(SUM_LENGTH, n_in - begin)
        parts = weight[:whole, summed].reshape(n_parts, TILE_COLUMNS, length).swapaxes(1, 2)
        if begin == 0:
            np.matmul(x[:, None, :, summed], parts, out=columns)
            np.matmul(x[..., summed], weight[whole:, summed].T, out=y[..., whole:])
        else:
            columns += np.matmul(x[:, None, :, summed], parts)
            y[..., whole:] += np.matmul(x[..., summed], weight[whole:, summed].T)
    return y


def attention(
    queries: F32, first_tile: int, pages: Sequence[tuple[F32, F32]], window: int | None = None
) -> F32:
    """Causal attention with grouped key heads; scores and softmax in f32.

    `queries` [tiles, TILE_ROWS, n_heads, head_dim] stand at the positions from `first_tile * TILE_ROWS` on;
    `pages` hold the keys and values [n_kv_heads, PAGE_POSITIONS, head_dim] from position 0 on, up to the last
    real query. With a `window`, each query sees that many positions, its own the last of them. Returns
    [tiles, TILE_ROWS, n_heads * head_dim]. Keys and values are broadcast to the query heads that share them,
    never repeated.
    """
    tiles, rows, n_heads, head_dim = queries.shape
    n_kv_heads = pages[0][0].shape[0]
    grouped = queries.reshape(tiles, rows, n_kv_heads, n_heads // n_kv_heads, head_dim).transpose(
        0, 2, 3, 1, 4
    )
    grouped = np.ascontiguousarray(grouped) * np.float32(head_dim**-0.5)
    out = np.empty((tiles, rows, n_heads * head_dim), dtype=np.float32)
    by_head = out.reshape(tiles, rows, n_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)  # a view of out
    at_once = max(1, _SCORE_BYTES // (4 * n_heads * rows * PAGE_POSITIONS * len(pages)))
    for begin in range(0, tiles, at_once):
        some = slice(begin, begin + at_once)
        by_head[some] = _attend(grouped[some], first_tile + begin, pages, window)
    return out


def _attend(queries: F32, first_tile: int, pages: Sequence[tuple[F32, F32]], window: int | None) -> F32:
    """`queries` [tiles, n_kv_heads, group, TILE_ROWS, head_dim], scaled; the same shape comes back.

    Pages that no query here sees are left out. That changes no bits: what a page adds to the sums of a query
    that does not see it is zero.
    """
    tiles = queries.shape[0]
    first, last = first_tile * TILE_ROWS, (first_tile + tiles) * TILE_ROWS - 1
    first_page = 0 if window is None else max(0, first - window + 1) // PAGE_POSITIONS
    pages = pages[first_page : last // PAGE_POSITIONS + 1]
    scores = np.empty((len(pages), *queries.shape[:4], PAGE_POSITIONS), dtype=np.float32)
    for index, (keys, _values) in enumerate(pages):
        np.matmul(queries, keys[:, None].swapaxes(-1, -2), out=scores[index])
        _mask(scores[index], first, (first_page + index) * PAGE_POSITIONS, window)
    scores -= scores.max(axis=(0, -1))[None, ..., None]  # a maximum is exact, in whatever order it is taken
    np.exp(scores, out=scores)
    page_sums = scores.sum(axis=-1)
    mixed: F32 = np.matmul(scores[0], pages[0][1][:, None])
    total = page_sums[0]
    for index in range(1, len(pages)):
        mixed += np.matmul(scores[index], pages[index][1][:, None])
        total += page_sums[index]
    mixed /= total[..., None]
    return mixed


def _mask(scores: F32, first: int, first_key: int, window: int | None) -> None:
    """Sets to -inf the scores [tiles, n_kv_heads, group, TILE_ROWS, PAGE_POSITIONS] of a page's keys that lie
    after their query or before its window; nothing is done where there are none."""
    tiles = scores.shape[0]
    last = first + tiles * TILE_ROWS - 1
    positions = np.arange(first, last + 1).reshape(tiles, 1, 1, TILE_ROWS, 1)
    keys = np.arange(first_key, first_key + PAGE_POSITIONS)
    if first_key + PAGE_POSITIONS - 1 > first:
        np.copyto(scores, np.float32(-np.inf), where=keys > positions)
    if window is not None and first_key <= last - window:
        np.copyto(scores, np.float32(-np.inf), where=keys <= positions - window)
