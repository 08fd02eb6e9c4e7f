"""Causal grouped-query attention of one sequence over its KV pages, in f32 whatever the KV's dtype.

The running softmax over tiles of keys is that of Milakov and Gimelshein 2018 (arXiv 1805.02867). K and V
are used page by page where they lie, never repeated for the heads that share them, and the mask exists for
one tile of queries and one page at a time. Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dgn_backends.torch_kv import PAGE_POSITIONS, TorchKV
from dgn_backends.torch_rows import RowTiles, pad_rows

#: Positions of queries worked at once where no tiles are prescribed: bounds the scores' memory.
_QUERIES_AT_ONCE = 64
#: Stands for the peak of a row without any score: finite, so that differences from it are numbers.
_LEAST = torch.finfo(torch.float32).min


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


@dataclass(frozen=True, slots=True)
class Keys:
    """What queries attend over: one block of a sequence's KV, of which each sees the keys up to its own
    position, or with a `window` only that many of them."""

    kv: TorchKV
    block: int
    window: int | None = None


def attend(q: torch.Tensor, keys: Keys, start: int, tiles: RowTiles, reader: PageReader) -> torch.Tensor:
    """Attention of queries `q`, f32 [count, n_heads, head_dim], already rotated and scaled, at the
    positions from `start` on. Returns f32 [count, n_heads * head_dim]."""
    count = q.shape[0]
    outputs: list[torch.Tensor] = []
    done = 0
    for rows in tiles.split(count) if tiles.sizes else _chunks(count):
        here = q[done : done + rows]
        outputs.append(_attend_tile(pad_rows(here, rows), keys, start + done, reader)[: here.shape[0]])
        done += rows
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _chunks(count: int) -> list[int]:
    return [min(_QUERIES_AT_ONCE, count - done) for done in range(0, count, _QUERIES_AT_ONCE)]


def _attend_tile(q: torch.Tensor, over: Keys, first: int, reader: PageReader) -> torch.Tensor:
    """`attend` for one tile of queries at positions `first` onwards. Rows of padding lie after the real
    ones, and see whatever is there; nobody looks at them.

    Pages before the window of the first query are not read. A row that does not see a page that is read gets
    exact zeros from it, so its bits do not depend on which tile it is in."""
    count, n_heads, head_dim = q.shape
    pages = over.kv.pages
    n_kv_heads = pages[0].shape[2]
    grouped = q.view(count, n_kv_heads, -1, head_dim).transpose(0, 1).reshape(n_kv_heads, -1, head_dim)
    first_page = 0 if over.window is None else max(0, first - over.window + 1) // PAGE_POSITIONS
    end_page = min(-(-(first + count) // PAGE_POSITIONS), len(pages))
    peak = total = mixed = None
    for index in range(first_page, end_page):
        keys, values = reader.read(over.kv, index, over.block)
        scores = torch.bmm(grouped, keys.transpose(1, 2))  # [n_kv_heads, count * group, PAGE]
        _mask(scores, count, first, index * PAGE_POSITIONS, over.window)
        here = scores.amax(-1, keepdim=True)
        if over.window is not None:
            here.clamp_(min=_LEAST)  # a row may see nothing of its tile's first page
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


def _mask(scores: torch.Tensor, count: int, first: int, first_key: int, window: int | None) -> None:
    """Sets the scores of a page's keys that lie after their query, or before its window, to minus infinity,
    in place; nothing is done where there are none."""
    has_future = first_key + PAGE_POSITIONS > first + 1
    has_past = window is not None and first_key <= first + count - 1 - window
    if not has_future and not has_past:
        return
    keys = torch.arange(first_key, first_key + PAGE_POSITIONS, device=scores.device)[None, :]
    queries = torch.arange(first, first + count, device=scores.device)[:, None]
    unseen = keys > queries
    if window is not None:
        unseen |= keys <= queries - window
    scores.view(scores.shape[0], count, -1, PAGE_POSITIONS).masked_fill_(unseen[None, :, None, :], -torch.inf)


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
