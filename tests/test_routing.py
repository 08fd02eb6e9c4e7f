"""Routes: against brute force on small models; what is missing; which edges the origin relays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgn_backends.span import Span, parse_spans, span_of_units
from dgnd.errors import BlocksMissing
from dgnd.routing import Edge, Hop, Offer, edges, find_route, missing_units

N = 4  # blocks; 6 units
PEERS = ("me", "p", "q", "r")


def offers(**spans: str) -> list[Offer]:
    return [Offer(peer, span) for peer, text in spans.items() for span in parse_spans(text, N)]


def route(**spans: str) -> list[tuple[str, str]]:
    return [(hop.peer, str(hop.span)) for hop in find_route("m", offers(**spans), N, "me")]


@st.composite
def random_offers(draw: st.DrawFn) -> list[Offer]:
    found = []
    for peer in PEERS:
        for _ in range(draw(st.integers(0, 3))):
            first = draw(st.integers(0, N + 1))
            last = draw(st.integers(first, N + 1))
            found.append(Offer(peer, span_of_units(range(first, last + 1), N)))
    return found


def fewest_hops(found: list[Offer]) -> int | None:
    """Brute force over all subsets of the offers, which together have to cover every unit."""
    units = [set(offer.span.units()) for offer in found]
    for size in range(1, len(found) + 1):
        for chosen in itertools.combinations(units, size):
            if set().union(*chosen) == set(range(N + 2)):
                return size
    return None


@given(random_offers(), st.randoms())
def test_the_route_covers_every_unit_once_with_the_fewest_hops(found: list[Offer], random: object) -> None:
    fewest = fewest_hops(found)
    missing = missing_units(found, N)
    if fewest is None:
        assert missing
        with pytest.raises(BlocksMissing):
            find_route("m", found, N, "me")
        return
    assert not missing
    hops = find_route("m", found, N, "me")
    assert [unit for hop in hops for unit in hop.span.units()] == list(range(N + 2))
    assert len(hops) == fewest
    for hop in hops:
        assert any(offer.peer == hop.peer and offer.span.contains(hop.span) for offer in found)
    shuffled = sorted(found, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert find_route("m", shuffled, N, "me") == hops  # the order in which peers connected does not matter


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ({"me": "embed,0-3,head"}, [("me", "embed,0-3,head")]),
        ({"me": "embed,0-1", "p": "2-3,head"}, [("me", "embed,0-1"), ("p", "2-3,head")]),
        (
            {"me": "embed,0,2,head", "p": "1,3"},
            [("me", "embed,0"), ("p", "1"), ("me", "2"), ("p", "3"), ("me", "head")],
        ),
        ({"p": "embed", "me": "0-3", "q": "head"}, [("p", "embed"), ("me", "0-3"), ("q", "head")]),
        # Replicas: this node first, then the smaller id.
        ({"p": "embed,0-3,head", "me": "embed,0-3,head"}, [("me", "embed,0-3,head")]),
        ({"q": "embed,0-3,head", "p": "embed,0-3,head"}, [("p", "embed,0-3,head")]),
        # An overlap is computed once, by the one that was begun with.
        ({"me": "embed,0-2", "p": "1-3,head"}, [("me", "embed,0-2"), ("p", "3,head")]),
        # Fewer hops go before one's own blocks.
        ({"me": "embed,0", "p": "embed,0-3,head"}, [("p", "embed,0-3,head")]),
    ],
)
def test_routes(spans: dict[str, str], expected: list[tuple[str, str]]) -> None:
    assert route(**spans) == expected


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        ({}, "embed,0-3,head"),
        ({"me": "embed,0-3"}, "head"),
        ({"me": "0-3,head"}, "embed"),
        ({"me": "embed,0", "p": "3,head"}, "1-2"),
        ({"me": "embed,0,2,head"}, "1,3"),
    ],
)
def test_what_is_missing_is_named(spans: dict[str, str], missing: str) -> None:
    with pytest.raises(BlocksMissing, match=f"nobody reachable serves {missing} of model m") as caught:
        route(**spans)
    assert caught.value.data == {"missing": missing, "model": "m"}


HOPS = [Hop("p", Span(0, 1, embed=True)), Hop("q", Span(1, 3)), Hop("r", Span(3, 4, head=True))]


@pytest.mark.parametrize(
    ("live", "relayed"),
    [
        ({"p": ("me", "q"), "q": ("me", "p", "r"), "r": ("me", "q")}, [False, False]),
        ({"p": ("q",), "q": ("p",), "r": ()}, [False, True]),
        ({"p": ("q",), "q": ("r",), "r": ("q",)}, [True, False]),  # q does not say that it has p
        ({"p": (), "q": ("p", "r"), "r": ("q",)}, [True, False]),
        ({}, [True, True]),
    ],
)
def test_an_edge_is_direct_where_both_ends_say_so(
    live: dict[str, tuple[str, ...]], relayed: list[bool]
) -> None:
    assert edges(HOPS, live, "me") == tuple(map(Edge, relayed))


def test_edges_of_this_node_and_within_one_peer_are_direct() -> None:
    mine = [Hop("me", HOPS[0].span), Hop("q", HOPS[1].span), Hop("me", HOPS[2].span)]
    assert edges(mine, {}, "me") == (Edge(False), Edge(False))
    same = [Hop("q", HOPS[0].span), Hop("q", HOPS[1].span), Hop("r", HOPS[2].span)]
    assert edges(same, {}, "me") == (Edge(False), Edge(True))
    assert edges(same[:1], {}, "me") == ()
