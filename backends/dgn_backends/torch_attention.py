"""Causal grouped-query attention of one sequence over its KV pages, in f32 whatever the KV's dtype.

The running softmax over tiles of keys is that of Milakov and Gimelshein 2018 (arXiv 1805.02867). K and V
are used page by page where they lie, never repeated for the heads that share them, and the mask exists for
one tile of queries and one page at a time. Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dgn_backends.torch_kv import PAGE_POSITIONS, TorchKV
from dgn_backends.torch_rows import RowTiles, pad_rows

#: Positions of queries worked at once where no tiles are prescribed: bounds the scores' memory.
_QUERIES_AT_ONCE = 64


class PageReader:
    """Gives a block's keys and values of a page in f32.

    Where they are kept otherwise they are widened into the same two buffers every time: new ones for every
    page would leave the allocator full of holes.
    """

    def __init__(self) -> None:
        self._buffers: torch.Tensor | None = None

    def read(self, kv: TorchKV, page: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, f32 [n_kv_heads, PAGE_POSITIONS, head_dim]; valid until the next call."""
        held = kv.pages[page][block]
        if held.dtype == torch.float32:
            return held[0], held[1]
        if self._buffers is None:
            self._buffers = torch.empty(held.shape, dtype=torch.float32, device=held.device)
        self._buffers.copy_(held)
        return self._buffers[0], self._buffers[1]


def attend(
    q: torch.Tensor, kv: TorchKV, block: int, start: int, tiles: RowTiles, reader: PageReader
) -> torch.Tensor:
    """Attention of queries `q`, f32 [count, n_heads, head_dim], already rotated and scaled, at the
    positions from `start` on, over the keys and values up to each. Returns f32 [count, n_heads *
    head_dim]."""
    count = q.shape[0]
    outputs: list[torch.Tensor] = []
    done = 0
    for rows in tiles.split(count) if tiles.sizes else _chunks(count):
        here = q[done : done + rows]
        outputs.append(_attend_tile(pad_rows(here, rows), kv, block, start + done, reader)[: here.shape[0]])
        done += rows
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _chunks(count: int) -> list[int]:
    return [min(_QUERIES_AT_ONCE, count - done) for done in range(0, count, _QUERIES_AT_ONCE)]


def _attend_tile(q: torch.Tensor, kv: TorchKV, block: int, first: int, reader: PageReader) -> torch.Tensor:
    """`attend` for one tile of queries at positions `first` onwards. Rows of padding lie after the real
    ones, and see whatever is there; nobody looks at them."""
    count, n_heads, head_dim = q.shape
    n_kv_heads = kv.pages[0].shape[2]
    grouped = q.view(count, n_kv_heads, -1, head_dim).transpose(0, 1).reshape(n_kv_heads, -1, head_dim)
    n_pages = min(-(-(first + count) // PAGE_POSITIONS), len(kv.pages))
    peak = total = mixed = None
    for index in range(n_pages):
        keys, values = reader.read(kv, index, block)
        scores = torch.bmm(grouped, keys.transpose(1, 2))  # [n_kv_heads, count * group, PAGE]
        if (index + 1) * PAGE_POSITIONS > first + 1:
            _mask_future(scores, count, first, index * PAGE_POSITIONS)
        here = scores.amax(-1, keepdim=True)
        if peak is None or total is None or mixed is None:
            peak = here
            weights = scores.sub_(peak).exp_()
            total, mixed = weights.sum(-1, keepdim=True), torch.bmm(weights, values)
            continue
        higher = torch.maximum(peak, here)
        shrink = (peak - higher).exp_()
        weights = scores.sub_(higher).exp_()
        total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        mixed = mixed.mul_(shrink).add_(torch.bmm(weights, values))
        peak = higher
    assert mixed is not None
    assert total is not None
    out = mixed.div_(total).view(n_kv_heads, count, -1, head_dim).transpose(0, 1)
    return out.reshape(count, n_heads * head_dim)


def _mask_future(scores: torch.Tensor, count: int, first: int, first_key: int) -> None:
    """Sets the scores of keys that lie after their query to minus infinity, in place."""
    keys = torch.arange(first_key, first_key + PAGE_POSITIONS, device=scores.device)
    queries = torch.arange(first, first + count, device=scores.device)
    future = keys[None, :] > queries[:, None]
    scores.view(scores.shape[0], count, -1, PAGE_POSITIONS).masked_fill_(future[None, :, None, :], -torch.inf)


def probes(
    n_heads: int, n_kv_heads: int, head_dim: int
) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """The two products of a tile, for `agreeing_tiles`: rows are positions, [64, n_heads, width]."""
    random = torch.Generator().manual_seed(1)
    keys = torch.randn(n_kv_heads, PAGE_POSITIONS, head_dim, generator=random)
    values = torch.randn(n_kv_heads, PAGE_POSITIONS, head_dim, generator=random)

    def grouped(rows: torch.Tensor) -> torch.Tensor:
        return (
            rows.view(rows.shape[0], n_kv_heads, -1, rows.shape[-1])
            .transpose(0, 1)
            .flatten(1, 2)
            .contiguous()
        )

    def back(out: torch.Tensor, count: int) -> torch.Tensor:
        return out.view(n_kv_heads, count, -1, out.shape[-1]).transpose(0, 1)

    def score(rows: torch.Tensor) -> torch.Tensor:
        return back(torch.bmm(grouped(rows), keys.transpose(1, 2)), rows.shape[0])

    def mix(rows: torch.Tensor) -> torch.Tensor:
        return back(torch.bmm(grouped(rows), values), rows.shape[0])

    return [
        (score, torch.randn(64, n_heads, head_dim, generator=random)),
        (mix, torch.rand(64, n_heads, PAGE_POSITIONS, generator=random)),
    ]
