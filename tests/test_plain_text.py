"""What peers say in words becomes one bounded, printable line where it comes in."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.peers.offers import COMPLAIN_S, OfferBook
from dgnd.wire.messages import CloseHop, Failure, Goodbye, Hello, HopKey, ModelOffer, Offers, Ping, SpanOffer
from dgnd.wire.plain_text import NAME, TEXT, in_plain_words, line

BAD = "a\n\x1b[2Jb\u202e" + "x" * 8000
OFFER = ModelOffer(
    model=BAD,
    n_blocks=2,
    config_digest="c",
    spans=(SpanOffer(span="0\n1", numerics=BAD, dtype=BAD, quant=BAD),),
)


@given(st.text(max_size=50), st.integers(1, 20))
def test_a_line_is_printable_and_bounded_and_good_ones_stay(text: str, most: int) -> None:
    made = line(text, most)
    assert made.isprintable()
    assert len(made) <= most
    if text.isprintable() and len(text) <= most:
        assert made == text


def texts(value: object) -> list[str]:
    """Every text in a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts(part)]
    if isinstance(value, tuple | list):
        return [text for part in value for text in texts(part)]
    fields = getattr(value, "__struct_fields__", ())
    return [text for name in fields for text in texts(getattr(value, name))]


@pytest.mark.parametrize(
    "message",
    [
        Hello(versions=(1,), software=BAD, name=BAD, offers=(OFFER,)),
        Offers(offers=(OFFER,)),
        Goodbye(reason=BAD),
        CloseHop(key=HopKey("o", "s", 1), reason=BAD),
        Failure(kind="x", message=BAD, data={BAD: BAD, "list": [BAD], "n": 3}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_no_text_breaks_a_line_or_fills_a_screen(message: Any) -> None:
    made = in_plain_words(message)
    assert type(made) is type(message)
    assert all(text.isprintable() and len(text) <= TEXT for text in texts(made))
    if isinstance(made, Hello):
        assert len(made.name) == NAME
    if isinstance(made, Failure):
        assert made.data["n"] == 3


def test_a_long_span_is_not_cut_and_other_messages_are_as_they_came() -> None:
    span = ",".join(str(block) for block in range(0, 2000, 2))
    offer = ModelOffer(
        model="m", n_blocks=2000, config_digest="c", spans=(SpanOffer(span=span, numerics="n", dtype="f32"),)
    )
    assert in_plain_words(Offers(offers=(offer,))) == Offers(offers=(offer,))
    ping = Ping(nonce=1)
    assert in_plain_words(ping) is ping


def test_an_offer_that_cannot_be_read_is_logged_at_a_bounded_rate(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    model = cast(Any, SimpleNamespace(name="m", config=SimpleNamespace(n_blocks=2)))
    book = OfferBook("me", "me", "dgn/0", {}, lambda: now)
    item = SpanOffer(span="0-99999,what", numerics="n", dtype="f32")
    said = (ModelOffer(model="m", n_blocks=2, config_digest="c", spans=(item,)),)
    book.peer_up("p", Hello(versions=(1,), software="s", name="n", offers=said))
    with caplog.at_level(logging.WARNING):
        for _ in range(500):
            assert book._spans("p", model) == []
            book.peer_says("p", Offers(offers=said))
        now += COMPLAIN_S
        assert book._spans("p", model) == []
    assert [record.getMessage().count("is not used") for record in caplog.records] == [1, 1]
