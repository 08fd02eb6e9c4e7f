"""Prefix digests: equal for equal prefixes and keys, for nothing else, and quick."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.wire.digest import KEY_BYTES, PrefixDigests

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=30)
KEY = bytes(range(KEY_BYTES))
PINNED = [15718607915346623414, 168000020283884732, 13286119720604667833, 13556890354276272792]


def _all(digests: PrefixDigests) -> list[int]:
    return [digests.at(p) for p in range(len(digests) + 1)]


def _of(ids: list[int], key: bytes = KEY) -> PrefixDigests:
    digests = PrefixDigests(key)
    digests.extend(ids)
    return digests


@given(IDS, st.integers(0, 30))
def test_any_chunks_give_the_digests_of_one_shot(ids: list[int], cut: int) -> None:
    chunked = _of(ids[:cut])
    chunked.extend(ids[cut:])
    assert _all(chunked) == _all(_of(ids))
    assert list(chunked.ids) == ids
    assert all(0 <= digest < 2**64 for digest in _all(chunked))


@given(IDS, IDS)
def test_digests_agree_exactly_on_the_common_prefix(a: list[int], b: list[int]) -> None:
    first, second = _of(a), _of(b)
    common = first.common_prefix(b)
    assert common == second.common_prefix(a)
    for position in range(min(len(a), len(b)) + 1):
        assert (first.at(position) == second.at(position)) == (position <= common)


@given(IDS, st.integers(0, 30), IDS)
def test_truncating_is_as_if_the_rest_had_never_been(ids: list[int], cut: int, more: list[int]) -> None:
    cut = min(cut, len(ids))
    digests = _of(ids)
    digests.truncate(cut)
    assert len(digests) == cut
    digests.extend(more)
    assert _all(digests) == _all(_of(ids[:cut] + more))


def test_every_position_of_another_key_differs() -> None:
    ids = [1, 2, 3]
    other = _of(ids, b"another key of some length......")
    assert not set(_all(_of(ids))) & set(_all(other))


def test_positions_of_equal_tokens_differ() -> None:
    assert len(set(_all(_of([7] * 1000)))) == 1001


def test_the_digests_are_those_of_the_protocol() -> None:
    """Fixed values: they would change only with the protocol's version."""
    assert _all(_of([0, 1, 2**31 - 1])) == PINNED


def test_a_position_beyond_the_end_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        _of([1]).at(2)
