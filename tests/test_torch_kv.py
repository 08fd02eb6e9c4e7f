"""KV in torch: both kinds of storage hold the same, never move, and take memory for what is written alone;
and attention of one position over KV in one piece is that of the tiles."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from dgn_backends.torch_attention import Keys, PageReader, attend, attend_newest  # noqa: E402 - after the skip
from dgn_backends.torch_kv import PAGE_POSITIONS, MappedKV, PagedKV, TorchKV, new_kv  # noqa: E402
from dgn_backends.torch_rows import RowTiles  # noqa: E402

CPU = torch.device("cpu")
BLOCKS, HEADS, HEAD_DIM = 3, 2, 16
SHAPE = (BLOCKS, HEADS, HEAD_DIM)


def rows(count: int, seed: int, heads: int = HEADS) -> torch.Tensor:
    return torch.randn(count, heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def both(dtype: torch.dtype = torch.float32, positions: int = 2000) -> list[TorchKV]:
    return [MappedKV(SHAPE, dtype, positions), PagedKV(SHAPE, dtype, CPU)]


def fill(kv: TorchKV, count: int) -> None:
    """Random keys and values up to position `count`, the same for every storage, in uneven steps."""
    keys, values = rows(count, 1), rows(count, 2)
    start = 0
    while start < count:
        stop = min(count, start + 170)
        kv.reserve(stop)
        for block in range(BLOCKS):
            kv.write(block, start, keys[start:stop] + block, values[start:stop] + block)
        kv.length = start = stop


def contents(kv: TorchKV, block: int) -> torch.Tensor:
    """All of the room, [2, HEADS, room, HEAD_DIM]."""
    pages = [kv.held(block, at, at + PAGE_POSITIONS) for at in range(0, kv.room, PAGE_POSITIONS)]
    return torch.cat(pages, dim=2)


def test_both_storages_hold_the_same_through_growth_and_truncation() -> None:
    mapped, paged = both()
    for kv in (mapped, paged):
        fill(kv, 700)
    wanted = rows(700, 1) + 2
    for length in (700, 699, 513, 512, 100):
        for kv in (mapped, paged):
            kv.truncate(length)
            assert kv.length == length
            assert kv.room == -(-length // PAGE_POSITIONS) * PAGE_POSITIONS
            assert kv.n_bytes() == BLOCKS * 2 * HEADS * HEAD_DIM * 4 * kv.room
        for block in range(BLOCKS):
            held = contents(mapped, block)
            assert torch.equal(held, contents(paged, block))
            assert not held[:, :, length:].any()
        assert torch.equal(contents(mapped, 2)[0].transpose(0, 1)[:length], wanted[:length])
    for kv in (mapped, paged):
        kv.truncate(0)
        assert (kv.length, kv.room, kv.n_bytes()) == (0, 0, 0)
        kv.reserve(700)
        assert not any(contents(kv, block).any() for block in range(BLOCKS))


def test_what_is_there_never_moves() -> None:
    for kv in both():
        fill(kv, 300)
        before = [kv.held(block, 0, 200).data_ptr() for block in range(BLOCKS)]
        kv.reserve(2000)
        assert [kv.held(block, 0, 200).data_ptr() for block in range(BLOCKS)] == before


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count memory")
def test_a_long_context_takes_memory_for_what_is_written_alone() -> None:
    shape = (16, 8, 64)
    kv = MappedKV(shape, torch.bfloat16, 1_000_000)  # 32 GB if it were all there
    before = resident_bytes()
    kv.reserve(512)
    part = torch.ones(512, 8, 64)
    for block in range(16):
        kv.write(block, 0, part, part)
    assert kv.n_bytes() == 16 << 20
    assert kv.n_bytes() * 0.9 < resident_bytes() - before < kv.n_bytes() * 1.3
    kv.length = 512
    kv.truncate(256)
    assert kv.n_bytes() == 8 << 20
    assert resident_bytes() - before < kv.n_bytes() * 1.5
    kv.truncate(0)
    assert resident_bytes() - before < 3 << 20


def test_pages_stand_in_where_one_piece_can_not_be_had() -> None:
    assert isinstance(new_kv(SHAPE, torch.float32, CPU, 5000), MappedKV)
    assert isinstance(new_kv(SHAPE, torch.float32, CPU, 1 << 50), PagedKV)  # no such addresses
    assert isinstance(new_kv((1, 1, 2), torch.bfloat16, CPU, 5000), PagedKV)  # pages of 1 KB
    empty = new_kv((0, HEADS, HEAD_DIM), torch.float32, CPU, 5000)  # a span of the head alone
    empty.reserve(5000)
    assert empty.n_bytes() == 0


@pytest.mark.parametrize("window", [None, 3, 300])
def test_the_newest_position_attends_as_a_tile_of_one_does(window: int | None) -> None:
    """Over the same numbers in bf16, in one piece and in pages; the distance is that of rounding to bf16."""
    query = rows(1, 3, heads=3 * HEADS).bfloat16()
    for length in (1, 2, 256, 257, 600):
        mapped, paged = both(torch.bfloat16)
        for kv in (mapped, paged):
            fill(kv, length)
        over = Keys(mapped, 1, window)
        got = attend_newest(query[0], over, length - 1)
        for kv in (mapped, paged):
            wanted = attend(query.float(), Keys(kv, 1, window), length - 1, RowTiles(), PageReader())[0]
            assert got.shape == wanted.shape
            assert (got.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
