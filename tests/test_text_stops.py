"""Stops: held back, released, never shown, whatever the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.errors import BadRequest
from dgnd.text.stops import MAX_STOP_LENGTH, MAX_STOPS, StopMatcher


def run(
    matcher: StopMatcher, pieces: Sequence[str], ids: Sequence[int] | None = None
) -> tuple[str, str | None, int]:
    """The text shown, the kind of stop, and how many tokens were taken."""
    shown = ""
    for count, piece in enumerate(pieces, 1):
        result = matcher.push(ids[count - 1] if ids else 100, piece)
        shown += result.text
        if result.stopped:
            return shown + matcher.flush("TAIL"), result.kind, count
    return shown + matcher.flush(), None, len(pieces)


def cut_of(text: str, stops: Sequence[str]) -> int | None:
    """Where the text is to be cut: before the longest of the stops that end first."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths)
    return None


letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(text=letters, stops=stops, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_split_shows_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    shown, kind, _ = run(StopMatcher(stops), pieces)
    cut = cut_of(text, stops)
    assert kind == (None if cut is None else "text")
    assert shown == text[:cut]


@given(text=letters, stops=stops)
def test_only_what_may_be_the_beginning_of_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        result = matcher.push(100, text[end - 1])
        shown += result.text
        if result.stopped:
            break
        begun = [n for stop in stops for n in range(1, len(stop)) if text[:end].endswith(stop[:n])]
        assert shown == text[: end - max(begun, default=0)]


@given(
    ids=st.lists(st.integers(0, 2), max_size=20),
    sequences=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3),
)
def test_id_sequences_stop_and_their_text_is_not_shown(ids: list[int], sequences: list[list[int]]) -> None:
    pieces = [f"<{token_id}>" for token_id in ids]
    shown, kind, count = run(StopMatcher([], sequences), pieces, ids)
    for end in range(1, len(ids) + 1):
        lengths = [len(seq) for seq in sequences if ids[:end][-len(seq) :] == seq]
        if lengths:
            assert (kind, count) == ("ids", end)
            assert shown == "".join(pieces[: end - max(lengths)])
            return
    assert (shown, kind) == ("".join(pieces), None)


def test_an_eos_id_stops_and_its_own_text_is_not_shown_but_what_was_held_is() -> None:
    matcher = StopMatcher(["STOP"], eos_ids={2, 3})
    assert matcher.push(7, "abST") == ("ab", False, None)
    assert matcher.push(3, "</s>") == ("ST", True, "eos")
    assert matcher.flush("\ufffd") == "\ufffd"
    assert matcher.flush("\ufffd") == ""


def test_a_text_stop_inside_one_piece_hides_the_rest() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push(7, "yes\nUser: no") == ("yes", True, "text")
    assert matcher.flush("tail") == ""


def test_the_tail_can_complete_a_stop() -> None:
    matcher = StopMatcher(["a\ufffd"])
    assert matcher.push(7, "xa").text == "x"
    assert matcher.flush("\ufffd") == ""


def test_of_a_text_and_an_id_stop_that_end_together_the_earlier_beginning_counts() -> None:
    assert StopMatcher(["ab"], [[5]]).push(5, "xab") == ("", True, "ids")
    matcher = StopMatcher(["xab"], [[5]])
    assert matcher.push(4, "xa").text == ""
    assert matcher.push(5, "b") == ("", True, "text")


def test_stops_out_of_bounds_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"stop has length 0; it must lie in \[1, 1024\]"):
        StopMatcher([""])
    with pytest.raises(BadRequest, match="stop_ids has length 0"):
        StopMatcher([], [[]])
    with pytest.raises(BadRequest, match=f"{MAX_STOP_LENGTH + 1}"):
        StopMatcher(["x" * (MAX_STOP_LENGTH + 1)])
    with pytest.raises(BadRequest, match=f"stop has {MAX_STOPS + 1} entries"):
        StopMatcher(["x"] * (MAX_STOPS + 1))
