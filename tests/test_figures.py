"""When figures are said again, and what of them is heard: seldom, bounded, and not for ever."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from dgnd.errors import ProtocolError
from dgnd.peers.offers import OfferBook
from dgnd.routing.bookings import SPREAD_S, Bookings
from dgnd.routing.figures import AGAIN_S, EXPIRY_S, LOOK_S, Saying, told_trips
from dgnd.wire.checks import TRIPS_MAX, validate
from dgnd.wire.codec import encode_bytes
from dgnd.wire.messages import Frame, Hello, ModelOffer, SpanOffer

SPAN = SpanOffer(span="0-3", numerics="n", dtype="f32", free_kv_positions=10_000)


def hello(trips: dict[str, float] | None = None, **figures: float | None) -> Hello:
    span = structs.replace(SPAN, **figures)
    offer = ModelOffer(model="m", n_blocks=4, config_digest="", spans=(span,))
    return Hello(versions=(1,), software="", name="", offers=(offer,), trips=trips or {})


@pytest.fixture
def saying() -> Saying:
    found = Saying()
    assert found.is_due(hello({"p": 2.0}, step_ms=20.0), 100.0)
    return found


@pytest.mark.parametrize(
    ("now", "due"),
    [
        (hello({"p": 2.0}, step_ms=20.0), False),
        (hello({"p": 2.3}, step_ms=22.0), False),
        (hello({"p": 2.0}, step_ms=26.0), True),
        (hello({"p": 2.0}, step_ms=15.0), True),
        (hello({"p": 2.0}, step_ms=None), True),
        (hello({"p": 2.0}, step_ms=20.0, prefill_ms=1.0), True),
        (hello({"p": 3.0}, step_ms=20.0), True),
        (hello({"p": 2.0, "q": 1.0}, step_ms=20.0), True),
        (hello({}, step_ms=20.0), True),
        (hello({"p": 2.0}, step_ms=20.0, queue=0.4), False),
        (hello({"p": 2.0}, step_ms=20.0, queue=1.0), True),
        (hello({"p": 2.0}, step_ms=20.0, free_kv_positions=9_000), False),
        (hello({"p": 2.0}, step_ms=20.0, free_kv_positions=7_000), True),
    ],
)
def test_what_changed_much_is_said(saying: Saying, now: Hello, due: bool) -> None:
    assert saying.is_due(now, 102.0) is due
    assert not saying.is_due(now, 104.0)


def test_what_creeps_is_said_in_steps(saying: Saying) -> None:
    said = sum(saying.is_due(hello({"p": 2.0}, step_ms=20.0 + i), 100.0 + i / 100) for i in range(180))
    assert said == 10  # 1.25 ** 10 is 9.3: from 20 to 200


def test_what_stays_is_said_again_before_it_expires(saying: Saying) -> None:
    now, said = 100.0, []
    while now < 400.0:
        now += LOOK_S
        if saying.is_due(hello({"p": 2.0}, step_ms=20.0), now):
            said.append(now)
    assert said[0] >= 100.0 + AGAIN_S
    assert all(b - a + LOOK_S < EXPIRY_S / 2 for a, b in itertools.pairwise(said))


def test_who_offers_nothing_and_knows_nobody_says_nothing() -> None:
    found = Saying()
    assert not any(found.is_due(Hello(versions=(1,), software="", name=""), now) for now in (1.0, 100.0, 1e6))


@given(st.dictionaries(st.text(max_size=60), st.floats(0.0, 1e5), max_size=3 * TRIPS_MAX))
def test_of_many_links_the_shortest_are_told(trips: dict[str, float]) -> None:
    told = told_trips(trips)
    assert len(told) == min(len(trips), TRIPS_MAX)
    left = [trip for peer, trip in trips.items() if peer not in told]
    assert max(told.values(), default=0.0) <= min(left, default=1e5) + 1e-3
    validate(Frame(hello(told)))


@pytest.mark.parametrize(
    "bad",
    [
        hello(step_ms=-1.0),
        hello(step_ms=float("nan")),
        hello(step_ms=float("inf")),
        hello(step_ms=1e12),
        hello(prefill_ms=-0.1),
        hello(queue=-1.0),
        hello(queue=1e9),
        hello(queue=float("nan")),
        hello({"p": -1.0}),
        hello({"p": float("inf")}),
        hello({"p": float("nan")}),
        hello({"p": 1e12}),
        hello({str(i): 1.0 for i in range(TRIPS_MAX + 1)}),
        hello({"p" * 1000: 1.0}),
    ],
)
def test_figures_that_are_none_are_refused(bad: Hello) -> None:
    for message in (bad, bad.update):
        with pytest.raises(ProtocolError):
            encode_bytes(Frame(message))


# --- what is heard


def test_what_a_peer_said_long_ago_counts_no_more() -> None:
    now = [1000.0]
    book = OfferBook("me", "me", "", {}, lambda: now[0])
    book.peer_up("p", structs.replace(hello({"q": 30.0}), peers=("q",)))
    book.peer_up("q", structs.replace(hello({"p": 20.0}), peers=("p",)))
    book.round_trips = lambda: {"p": 4.0, "q": 6.0}
    assert book.links().one_way_ms("p", "q") == 15.0
    now[0] += EXPIRY_S - 1
    book.peer_says("q", book.heard["q"].update)
    assert book.links().one_way_ms("p", "q") == 15.0
    now[0] += 2
    assert book.links().one_way_ms("p", "q") == 10.0  # what q said last
    now[0] += EXPIRY_S
    assert book.links().one_way_ms("p", "q") == 5.0  # nobody says: as if by way of this node
    assert book.links().one_way_ms("me", "q") == 3.0


def test_answers_that_began_just_now_count_until_figures_have_them() -> None:
    now = [100.0]
    bookings = Bookings(lambda: now[0])
    bookings.begin("a", "m", ["p", "q"])
    bookings.begin("b", "m", ["p"])
    assert bookings.beside("c", "m", "p") == 2.0
    assert bookings.beside("a", "m", "p") == 1.0  # not beside itself
    assert bookings.beside("c", "other", "p") == 0.0
    assert bookings.beside("c", "m", "r") == 0.0
    now[0] += SPREAD_S / 2
    bookings.begin("b", "m", ["q"])  # it has moved
    assert bookings.beside("c", "m", "p") == 0.5
    assert bookings.beside("c", "m", "q") == 1.5
    bookings.end("a")
    bookings.end("a")
    assert bookings.beside("c", "m", "p") == 0.0
    now[0] += SPREAD_S
    assert bookings.beside("c", "m", "q") == 0.0
