"""Causal grouped-query attention of one sequence over its KV, with scores and softmax in f32.

The running softmax over tiles of keys is that of Milakov and Gimelshein 2018 (arXiv 1805.02867). K and V
are used where they lie, never repeated for the heads that share them, and the mask exists for one tile of
queries and one page at a time. Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dgn_backends.torch_kv import PAGE_POSITIONS, TorchKV
from dgn_backends.torch_rows import RowTiles, pad_rows

#: Positions of queries worked at once where no tiles are prescribed: bounds the scores' memory.
_QUERIES_AT_ONCE = 64
#: Bytes of keys and values in f32 worked at once where they are kept otherwise: about a cache.
_WIDENED_BYTES = 4 << 20
#: At most so many pages, since the scores of a tile of queries grow with them.
_WIDENED_PAGES = 4
#: Stands for the peak of a row without any score: finite, so that differences from it are numbers.
_LEAST = torch.finfo(torch.float32).min


class PageReader:
    """Gives a block's keys and values in f32, some pages at a time.

    f32 pages are used where they lie, one by one and whole, so that the order of sums depends on a position
    alone. Others are widened, several at once, into the same buffer every time: new ones would leave the
    allocator full of holes.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def pages_at_once(self, kv: TorchKV) -> int:
        """How many pages `read` gives in one go."""
        page = kv.held(0, 0, PAGE_POSITIONS)
        if page.dtype == torch.float32:
            return 1
        fitting = _WIDENED_BYTES // (page.numel() * torch.float32.itemsize)
        return min(max(1, fitting), _WIDENED_PAGES)

    def read(self, kv: TorchKV, block: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, f32 [n_kv_heads, n, head_dim], from position `first` on, where a page begins,
        valid until the next call: those up to position `stop`, as far as they are read in one go; in f32 a
        whole page."""
        held = kv.held(block, first, first + PAGE_POSITIONS)
        if held.dtype == torch.float32:
            return held[0], held[1]
        at_once = self.pages_at_once(kv)
        if self._buffer is None:
            shape = (*held.shape[:2], at_once * PAGE_POSITIONS, held.shape[-1])
            self._buffer = torch.empty(shape, dtype=torch.float32, device=held.device)
        count = min(stop - first, at_once * PAGE_POSITIONS)
        wide = self._buffer[:, :, :count]
        step = count if kv.in_one_piece else PAGE_POSITIONS
        for done in range(0, count, step):
            part = wide[:, :, done : done + step]
            part.copy_(kv.held(block, first + done, first + done + part.shape[2]))
        return wide[0], wide[1]


@dataclass(frozen=True, slots=True)
class Keys:
    """What queries attend over: one block of a sequence's KV, of which each sees the keys up to its own
    position, or with a `window` only that many of them."""

    kv: TorchKV
    block: int
    window: int | None = None


def attend_newest(q: torch.Tensor, over: Keys, position: int) -> torch.Tensor:
    """Attention of one query `q` [n_heads, head_dim], rotated and scaled, at `position`, over KV of the same
    dtype that lies in one piece: torch's kernel reads it once, where it is. To it, the heads that share keys
    are so many queries of one head. Returns [n_heads * head_dim]."""
    first = 0 if over.window is None else max(0, position - over.window + 1)
    held = over.kv.held(over.block, first, position + 1)
    grouped = q.view(1, over.kv.n_kv_heads, -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, held[:1], held[1:], scale=1.0).flatten()


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
    n_kv_heads = over.kv.n_kv_heads
    grouped = q.view(count, n_kv_heads, -1, head_dim).transpose(0, 1).reshape(n_kv_heads, -1, head_dim)
    seen = 0 if over.window is None else max(0, first - over.window + 1)
    end = min(first + count, over.kv.room)
    at_once = reader.pages_at_once(over.kv) * PAGE_POSITIONS
    peak = total = mixed = None
    for first_key in range(seen - seen % PAGE_POSITIONS, end, at_once):
        keys, values = reader.read(over.kv, over.block, first_key, end)
        scores = torch.bmm(grouped, keys.transpose(1, 2))  # [n_kv_heads, count * group, n]
        _mask(scores, count, first, first_key, over.window)
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
    """Sets the scores of keys from position `first_key` on that lie after their query, or before its window,
    to minus infinity, in place; nothing is done where there are none."""
    n_keys = scores.shape[-1]
    future = max(0, first + 1 - first_key)  # the first column that not all queries see
    has_past = window is not None and first_key <= first + count - 1 - window
    if future >= n_keys and not has_past:
        return
    column = 0 if has_past else future
    keys = torch.arange(first_key + column, first_key + n_keys, device=scores.device)[None, :]
    queries = torch.arange(first, first + count, device=scores.device)[:, None]
    unseen = keys > queries
    if window is not None:
        unseen |= keys <= queries - window
    by_query = scores.view(scores.shape[0], count, -1, n_keys)[..., column:]
    by_query.masked_fill_(unseen[None, :, None, :], -torch.inf)


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
