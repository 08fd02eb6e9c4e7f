"""The multiplexer as a state machine: any split of the bytes is the same, garbage is an error, limits are
kept.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.p2p.yamux import (
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    PING,
    RST,
    SYN,
    WINDOW,
    Ended,
    Opened,
    Received,
    WentAway,
    WindowGrew,
    Yamux,
    YamuxError,
    YamuxLimits,
)


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream, length) + body


def data(stream: int, body: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream, len(body), body)


def told(mux: Yamux, raw: bytes) -> list[tuple[object, ...]]:
    """The events as plain values, with pieces of one stream joined."""
    out: list[tuple[object, ...]] = []
    for event in mux.receive(raw):
        match event:
            case Received(stream, piece):
                out.append(("data", stream.id, bytes(piece)))
            case Opened(stream) | WindowGrew(stream):
                out.append((type(event).__name__, stream.id))
            case Ended(stream, reset):
                out.append(("end", stream.id, reset))
            case WentAway(code):
                out.append(("away", code))
    return out


def joined(events: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    out: list[tuple[object, ...]] = []
    for event in events:
        if event[0] == "data" and out and out[-1][:2] == event[:2]:
            out[-1] = (*event[:2], out[-1][2] + event[2])  # type: ignore[operator]
        else:
            out.append(event)
    return out


CONVERSATION = b"".join(
    (
        frame(WINDOW, SYN, 1, 0),
        data(1, b"hello"),
        frame(PING, SYN, 0, 77),
        data(3, b"opened with data", SYN),
        frame(WINDOW, 0, 1, 5000),
        data(3, b"the last of it", FIN),
        data(1, b"more" * 100),
        frame(WINDOW, RST, 1, 0),
        frame(GO_AWAY, 0, 0, 0),
    )
)
EVENTS = [
    ("Opened", 1), ("data", 1, b"hello"), ("Opened", 3), ("data", 3, b"opened with data"),
    ("WindowGrew", 1),
    ("data", 3, b"the last of it"), ("end", 3, False), ("data", 1, b"more" * 100), ("end", 1, True),
    ("away", 0),
]  # fmt: skip


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=20))
def test_any_split_gives_the_same_events(cuts: list[int]) -> None:
    mux = Yamux(dialer=False)
    edges = [0, *sorted(cuts), len(CONVERSATION)]
    events = [event for at, end in pairwise(edges) for event in told(mux, CONVERSATION[at:end])]
    assert joined(events) == EVENTS


@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_an_error_or_events_and_nothing_else(raw: bytes, dialer: bool) -> None:
    mux = Yamux(dialer)
    try:
        list(mux.receive(raw))
    except YamuxError:
        pass
    assert len(mux.data_to_send()) <= 12 * (len(raw) // 12 + 1)


def test_a_frame_over_the_window_is_refused_by_its_header_alone() -> None:
    mux = Yamux(dialer=False)
    told(mux, frame(WINDOW, SYN, 1, 0) + data(1, bytes(INITIAL_WINDOW - 10)))
    assert told(mux, data(1, bytes(10)))
    with pytest.raises(YamuxError, match="1 over the receive window"):
        told(mux, frame(DATA, 0, 1, 1))


def test_a_granted_window_is_told_and_kept() -> None:
    mux = Yamux(dialer=False)
    (opened,) = mux.receive(frame(WINDOW, SYN, 1, 0))
    mux.grant(opened.stream, 1000)
    mux.grant(opened.stream, 500)
    assert mux.data_to_send() == frame(WINDOW, 2, 1, 0) + frame(WINDOW, 0, 1, 1500)
    told(mux, data(1, bytes(INITIAL_WINDOW + 1500)))
    with pytest.raises(YamuxError, match="window"):
        told(mux, data(1, b"x"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (HEADER.pack(1, DATA, 0, 1, 0), "version 1"),
        (frame(9, 0, 1, 0), "type 9"),
        (frame(WINDOW, SYN, 2, 0), "not the peer's to give"),
        (frame(WINDOW, SYN, 0, 0), "not the peer's to give"),
        (frame(WINDOW, SYN, 1, 0) * 2, "opened twice"),
        (data(5, b"x"), "not open"),
        (data(1, b"x", SYN | FIN) + data(1, b"y"), "after its end"),
        (frame(PING, SYN, 0, 0) * 1025, "control frames wait"),
    ],
)  # fmt: skip
def test_what_breaks_the_protocol_is_an_error(raw: bytes, message: str) -> None:
    with pytest.raises(YamuxError, match=message):
        told(Yamux(dialer=False), raw)


def test_streams_over_the_limit_are_reset_and_the_peer_cut_in_the_end() -> None:
    mux = Yamux(dialer=False, limits=YamuxLimits(inbound_streams=3, refused_streams=5))
    for n in range(3):
        assert told(mux, frame(WINDOW, SYN, 2 * n + 1, 0)) == [("Opened", 2 * n + 1)]
    mux.data_to_send()
    assert told(mux, frame(WINDOW, SYN, 7, 0)) == []
    assert mux.data_to_send() == frame(WINDOW, RST, 7, 0)
    assert told(mux, data(7, b"on its way already")) == []
    assert mux.open_streams == 3
    told(mux, b"".join(frame(WINDOW, SYN, 9 + 2 * n, 0) for n in range(4)))
    with pytest.raises(YamuxError, match="streams over the limit"):
        told(mux, frame(WINDOW, SYN, 101, 0))


def test_a_thousand_streams_one_after_the_other_leave_nothing() -> None:
    """py-libp2p blocks at the 257th that is open, and leaks those that one side alone closed."""
    ours, theirs = Yamux(dialer=True), Yamux(dialer=False)
    for n in range(1000):
        stream = ours.open()
        (opened,) = theirs.receive(ours.data_to_send())
        assert opened.stream.id == stream.id == 2 * n + 1
        ours.finish(stream)
        told(theirs, ours.data_to_send())
        theirs.finish(opened.stream)
        assert told(ours, theirs.data_to_send()) == [("end", stream.id, False)]
    assert ours.open_streams == theirs.open_streams == 0


def test_300_outbound_streams_at_once() -> None:
    mux = Yamux(dialer=True)
    assert [mux.open().id for _ in range(300)] == list(range(1, 600, 2))


def test_data_for_a_stream_that_was_reset_here_is_dropped_up_to_its_window() -> None:
    mux = Yamux(dialer=False)
    (opened,) = mux.receive(frame(WINDOW, SYN, 1, 0))
    mux.reset(opened.stream)
    assert told(mux, data(1, bytes(INITIAL_WINDOW))) == []
    with pytest.raises(YamuxError, match="not open"):
        told(mux, data(1, b"x"))


def test_a_stream_reset_in_the_middle_of_a_frame_takes_no_more() -> None:
    mux = Yamux(dialer=False)
    (opened,) = mux.receive(frame(WINDOW, SYN, 1, 0))
    raw = data(1, b"abcdef")
    assert told(mux, raw[:15]) == [("data", 1, b"abc")]
    mux.reset(opened.stream)
    assert told(mux, raw[15:] + frame(WINDOW, SYN, 3, 0)) == [("Opened", 3)]
