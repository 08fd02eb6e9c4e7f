"""Routes: against brute force on small models; what is missing; which edges the origin relays; how sessions
spread, and when they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgn_backends.span import Span, parse_spans, span_of_units
from dgnd.errors import BlocksMissing
from dgnd.routing import search as routing
from dgnd.routing.links import UNKNOWN_MS, Links
from dgnd.routing.search import (
    BESIDE,
    CURIOUS,
    HOP_MS,
    Asked,
    Edge,
    Hop,
    Offer,
    edges,
    find_part,
    find_route,
    missing_units,
    predicted_ms,
    worth_moving,
)

N = 4  # blocks; 6 units
ALL = range(N + 2)
PEERS = ("me", "p", "q", "r")
ASKED = Asked("m", N, Links("me"))


def offers(**spans: str) -> list[Offer]:
    return [Offer(peer, span) for peer, text in spans.items() for span in parse_spans(text, N)]


def named(hops: tuple[Hop, ...]) -> list[tuple[str, str]]:
    return [(hop.peer, str(hop.span)) for hop in hops]


def route(**spans: str) -> list[tuple[str, str]]:
    return named(find_route(ASKED, offers(**spans)))


# --- the cheapest, by brute force

FIGURE = st.integers(0, 40).map(lambda tenth: tenth / 10)


@st.composite
def random_offers(draw: st.DrawFn, figures: bool = True) -> list[Offer]:
    found = []
    for peer in PEERS:
        for _ in range(draw(st.integers(0, 3))):
            first = draw(st.integers(0, N + 1))
            last = draw(st.integers(first, N + 1))
            offer = Offer(peer, span_of_units(range(first, last + 1), N))
            if figures:
                offer = replace(offer, step_ms=draw(FIGURE), queue=draw(st.sampled_from([0.0, 0.5, 3.0])))
            found.append(offer)
    return found


@st.composite
def random_links(draw: st.DrawFn) -> Links:
    mine = {peer: draw(FIGURE) for peer in PEERS[1:]}
    said = {a: {b: draw(FIGURE) for b in PEERS[1:] if b != a} for a in PEERS[1:]}
    live = {a: draw(st.sets(st.sampled_from(PEERS))) for a in PEERS[1:]}
    return Links("me", mine, said, live)


WEIGHTS = st.lists(st.integers(1, 9).map(float), min_size=N + 2, max_size=N + 2)


def link_ms(links: Links, a: str, b: str) -> float:
    """As the protocol says, written once more."""
    if a == b:
        return 0.0
    if a == "me" or b == "me":
        return links.mine[b if a == "me" else a] / 2
    if a in links.live[b] and b in links.live[a]:
        return max(links.said[a][b], links.said[b][a]) / 2
    return (links.mine[a] + links.mine[b]) / 2


def every_route(
    found: list[Offer], asked: Asked, units: range, at: str, end: str
) -> Iterator[tuple[float, int]]:
    """Cost and number of hops of every way to cut the units into hops."""
    if not units:
        yield link_ms(asked.links, at, end), 0
        return
    for offer in found:
        weights = [asked.weights[unit] for unit in offer.span.units()]
        assert offer.step_ms is not None
        for stop in range(units.start + 1, units.stop + 1):
            if not set(range(units.start, stop)) <= set(offer.span.units()):
                continue
            part = sum(asked.weights[unit] for unit in range(units.start, stop)) / sum(weights)
            ms = HOP_MS + offer.step_ms * (part + BESIDE * offer.queue) + link_ms(asked.links, at, offer.peer)
            for rest, hops in every_route(found, asked, range(stop, units.stop), offer.peer, end):
                yield ms + rest, hops + 1


@settings(max_examples=150, deadline=None)
@given(random_offers(), random_links(), WEIGHTS, st.sampled_from(["", "s", "t"]))
def test_no_route_is_cheaper_than_the_one_found_by_more_than_a_tie(
    found: list[Offer], links: Links, weights: list[float], session: str
) -> None:
    asked = Asked("m", N, links, session, weights=weights)
    missing = missing_units(found, N)
    if missing:
        with pytest.raises(BlocksMissing):
            find_route(asked, found)
        return
    hops = find_route(asked, found)
    assert [unit for hop in hops for unit in hop.span.units()] == list(ALL)
    for hop in hops:
        assert any(offer.peer == hop.peer and offer.span.contains(hop.span) for offer in found)
    ms = predicted_ms(asked, found, hops)
    assert ms is not None
    best = min(every_route(found, asked, ALL, "me", "me"))
    assert best[0] - 1e-3 <= ms <= best[0] * (1 + routing.TIE) + 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "TIE", 0.0)
        assert predicted_ms(asked, found, find_route(asked, found)) == pytest.approx(best[0], abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(random_offers(), random_links(), WEIGHTS, st.integers(0, N + 1), st.integers(0, N + 1), st.data())
def test_a_part_is_the_cheapest_between_its_ends(
    found: list[Offer], links: Links, weights: list[float], first: int, last: int, data: st.DataObject
) -> None:
    units = range(min(first, last), max(first, last) + 1)
    ends = data.draw(st.sampled_from(PEERS)), data.draw(st.sampled_from(PEERS))
    asked = Asked("m", N, links, weights=weights)
    lacking = set(units) & missing_units(found, N)
    if lacking:
        with pytest.raises(BlocksMissing, match="nobody reachable serves"):
            find_part(asked, found, units, ends)
        return
    hops = find_part(asked, found, units, ends)
    assert [unit for hop in hops for unit in hop.span.units()] == list(units)
    ms, at = 0.0, ends[0]
    for hop in hops:
        size = sum(weights[unit] for unit in hop.span.units())
        ms += link_ms(links, at, hop.peer) + min(
            HOP_MS + (o.step_ms or 0.0) * (size / sum(weights[u] for u in o.span.units()) + BESIDE * o.queue)
            for o in found
            if o.peer == hop.peer and o.span.contains(hop.span)
        )
        at = hop.peer
    ms += link_ms(links, at, ends[1])
    best = min(every_route(found, asked, units, *ends))
    assert best[0] - 1e-3 <= ms <= best[0] * (1 + routing.TIE) + 1e-3


@settings(max_examples=100, deadline=None)
@given(random_offers(), random_links(), st.randoms())
def test_the_order_in_which_peers_connected_does_not_matter(
    found: list[Offer], links: Links, random: object
) -> None:
    asked = Asked("m", N, links, "s")
    if not missing_units(found, N):
        shuffled = sorted(found, key=lambda _: random.random())  # type: ignore[attr-defined]
        assert find_route(asked, shuffled) == find_route(asked, found)


# --- without figures


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
        # This node before others.
        ({"p": "embed,0-3,head", "me": "embed,0-3,head"}, [("me", "embed,0-3,head")]),
        # Fewer hops go before one's own blocks.
        ({"me": "embed,0", "p": "embed,0-3,head"}, [("p", "embed,0-3,head")]),
        ({"me": "embed,0,3,head", "p": "embed,0-3,head"}, [("p", "embed,0-3,head")]),
        ({"p": "embed,0-1", "q": "2-3,head", "me": "0,1", "r": "2"}, [("p", "embed,0-1"), ("q", "2-3,head")]),
    ],
)
def test_routes_where_nothing_was_measured(spans: dict[str, str], expected: list[tuple[str, str]]) -> None:
    assert route(**spans) == expected


@settings(max_examples=100, deadline=None)
@given(random_offers(figures=False))
def test_without_figures_a_route_has_the_fewest_hops_for_its_trips(found: list[Offer]) -> None:
    """Every hop and every change of node costs the same, so no other route has fewer of both."""
    if missing_units(found, N):
        return
    mine = Links("me", dict.fromkeys(PEERS, 2 * UNKNOWN_MS), live=dict.fromkeys(PEERS, PEERS))
    said = replace(mine, said={a: dict.fromkeys(PEERS, 2 * UNKNOWN_MS) for a in PEERS})
    asked = Asked("m", N, said)
    measured = [replace(offer, step_ms=0.0) for offer in found]
    best = min(every_route(measured, replace(asked, weights=[1.0] * (N + 2)), ALL, "me", "me"))
    hops = find_route(asked, found)
    found_ms = predicted_ms(asked, found, hops)
    assert found_ms is not None
    assert found_ms == pytest.approx(best[0], rel=routing.TIE, abs=1e-3)
    assert find_route(asked, [replace(offer, step_ms=None, prefill_ms=None) for offer in measured]) == hops


def test_one_figure_among_many_unknown_moves_nothing() -> None:
    spans = {"me": "embed,0-3,head", "p": "embed,0-3,head"}
    for known in (0, 1):
        found = offers(**spans)
        found[known] = replace(found[known], step_ms=30.0)
        asked = replace(ASKED, links=Links("me", {"p": 4.0}))
        assert named(find_route(asked, found)) == [("me", "embed,0-3,head")]


# --- with figures


def test_the_faster_replica_is_taken_also_where_it_is_away() -> None:
    found = offers(me="embed,0-3,head", p="embed,0-3,head", q="embed,0-3,head")
    slow, fast, usual = (replace(o, step_ms=ms) for o, ms in zip(found, (60.0, 10.0, 20.0), strict=True))
    near = replace(ASKED, links=Links("me", {"p": 2.0, "q": 2.0}))
    assert named(find_route(near, [slow, fast, usual])) == [("p", "embed,0-3,head")]
    far = replace(ASKED, links=Links("me", {"p": 200.0, "q": 2.0}))
    assert named(find_route(far, [slow, fast, usual])) == [("q", "embed,0-3,head")]
    busy = replace(fast, queue=8.0)
    assert named(find_route(near, [slow, busy, usual])) == [("q", "embed,0-3,head")]


def test_a_slow_link_between_two_peers_is_gone_around() -> None:
    found = offers(p="embed,0-1", q="2-3,head", r="2-3,head")
    live = dict.fromkeys(PEERS, PEERS)
    links = Links("me", {"p": 2.0, "q": 2.0, "r": 2.0}, {"p": {"q": 80.0, "r": 2.0}, "q": {"p": 1.0}}, live)
    assert named(find_route(replace(ASKED, links=links), found)) == [("p", "embed,0-1"), ("r", "2-3,head")]


def test_an_edge_that_the_origin_relays_takes_both_ways() -> None:
    found = offers(p="embed,0-1", q="2-3,head", r="2-3,head")
    said = {"p": {"q": 2.0, "r": 2.0}}
    links = Links("me", {"p": 20.0, "q": 20.0, "r": 20.0}, said, {"p": ("q",), "q": (), "r": ("p",)})
    assert links.one_way_ms("p", "q") == 20.0
    known = replace(links, live={"p": ("q", "r"), "q": (), "r": ("p",)})
    assert known.one_way_ms("p", "r") == 1.0
    assert named(find_route(replace(ASKED, links=known), found)) == [("p", "embed,0-1"), ("r", "2-3,head")]


def test_a_part_of_a_span_takes_its_share_of_the_time() -> None:
    asked = replace(ASKED, weights=(0.0, 1.0, 1.0, 1.0, 1.0, 4.0))
    whole = Offer("me", Span(0, N, embed=True, head=True), step_ms=80.0)
    part = Hop("me", Span(1, 3))
    assert predicted_ms(asked, [whole], [part]) == pytest.approx(HOP_MS + 20.0)
    head = Hop("me", Span(N, N, head=True))
    assert predicted_ms(asked, [whole], [head]) == pytest.approx(HOP_MS + 40.0)
    assert predicted_ms(asked, [whole], [Hop("p", Span(1, 3))]) is None


def test_who_lacks_room_gets_only_what_nobody_else_has() -> None:
    found = offers(me="embed,0-3,head", p="1-3,head", q="2")
    full, roomy, other = (replace(o, free_kv=n) for o, n in zip(found, (99, 100, 0), strict=True))
    asked = replace(ASKED, positions=100)
    expected = [("me", "embed,0"), ("p", "1-3,head")]
    assert named(find_route(asked, [full, roomy, other])) == expected
    assert named(find_route(replace(asked, positions=99), [full, roomy, other])) == [("me", "embed,0-3,head")]
    assert named(find_route(asked, [full, other])) == [("me", "embed,0-3,head")]  # all that there is


# --- nodes without figures


def test_who_was_not_measured_counts_as_its_fastest_replica_and_shares_with_it() -> None:
    found = offers(p="embed,0-3,head", q="embed,0-3,head", r="embed,0-3,head")
    slow, fast, new = (replace(o, step_ms=ms) for o, ms in zip(found, (60.0, 20.0, None), strict=True))
    links = Links("me", {"p": 2.0, "q": 2.0, "r": 2.0})
    taken = sessions([slow, fast, new], links)
    assert taken["p"] == 0
    assert 0.4 < taken["r"] / 2000 < 0.7  # half, and those that are curious


def test_a_faster_stage_elsewhere_says_nothing_of_who_was_not_measured() -> None:
    found = offers(p="embed,0-1", q="2-3,head", r="2-3,head")
    gpu, slow, new = (replace(o, step_ms=ms) for o, ms in zip(found, (1.0, 60.0, None), strict=True))
    links = Links("me", dict.fromkeys("pqr", 2.0), live=dict.fromkeys(PEERS, PEERS))
    asked = replace(ASKED, links=links)
    assert predicted_ms(asked, [gpu, slow, new], [Hop("r", Span(2, N, head=True))]) == predicted_ms(
        asked, [gpu, slow, new], [Hop("q", Span(2, N, head=True))]
    )


def test_who_was_not_measured_and_is_further_away_is_tried_by_a_few() -> None:
    found = offers(me="embed,0-3,head", p="embed,0-3,head")
    mine, new = replace(found[0], step_ms=100.0), found[1]
    taken = sessions([mine, new], Links("me", {"p": 40.0}))
    assert abs(taken["p"] / 2000 - 1 / CURIOUS) < 0.03
    assert sessions([mine, replace(new, step_ms=100.0)], Links("me", {"p": 40.0}))["p"] == 0


def test_nobody_moves_a_running_session_to_who_was_not_measured() -> None:
    found = [Offer("p", WHOLE, 100.0), Offer("q", WHOLE), Offer("r", WHOLE, 5.0)]
    for i in range(50):
        asked = replace(ASKED, session=str(i), links=Links("me", {"p": 0.0, "q": 0.0, "r": 0.0}))
        assert not worth_moving(asked, found, [Hop("p", WHOLE)], [Hop("q", WHOLE)], 0)
        assert worth_moving(asked, found, [Hop("p", WHOLE)], [Hop("r", WHOLE)], 0)


# --- spreading


def sessions(found: list[Offer], links: Links, count: int = 2000) -> Counter[str]:
    return Counter(
        find_route(replace(ASKED, links=links, session=f"session {i}"), found)[0].peer for i in range(count)
    )


def test_sessions_spread_over_equal_replicas_by_speed() -> None:
    """2000 draws: the standard deviation of a share of a half is 1.1 %. Links make up for the speed, so the
    routes are equal while the replicas are not."""
    found = offers(p="embed,0-3,head", q="embed,0-3,head")
    same = sessions([replace(o, step_ms=20.0) for o in found], Links("me", {"p": 2.0, "q": 2.0}))
    assert same["p"] + same["q"] == 2000
    assert abs(same["p"] / 2000 - 1 / 2) < 0.05
    uneven = [replace(o, step_ms=ms) for o, ms in zip(found, (30.0, 10.0), strict=True)]
    by_speed = sessions(uneven, Links("me", {"p": 2.0, "q": 22.0}))
    assert abs(by_speed["q"] / 2000 - 3 / 4) < 0.05


def test_a_replica_that_comes_takes_sessions_and_moves_no_other() -> None:
    links = Links("me", {"p": 2.0, "q": 2.0, "r": 2.0})
    two = [replace(o, step_ms=20.0) for o in offers(p="embed,0-3,head", q="embed,0-3,head")]
    three = [*two, replace(two[0], peer="r")]
    taken = 0
    for i in range(500):
        asked = replace(ASKED, links=links, session=str(i))
        before, after = find_route(asked, two), find_route(asked, three)
        assert before == find_route(asked, two)
        assert after[0].peer in (before[0].peer, "r")
        taken += after[0].peer == "r"
    assert abs(taken / 500 - 1 / 3) < 0.1


def test_a_session_goes_to_the_idle_one_of_two_replicas() -> None:
    idle = [replace(o, step_ms=20.0) for o in offers(p="embed,0-3,head", q="embed,0-3,head")]
    busy = [replace(idle[0], queue=1.0), idle[1]]
    assert set(sessions(busy, Links("me", {"p": 2.0, "q": 2.0}), 100)) == {"q"}


def test_spreading_adds_no_hops() -> None:
    """Two hops that take as long as one are no replica of it: there is more that can fail."""
    found = offers(p="embed,0-3,head", q="embed,0-1", r="2-3,head")
    live = dict.fromkeys(PEERS, PEERS)
    links = Links("me", {"p": 2.0, "q": 2.0, "r": 2.0}, {"q": {"r": 2.0}}, live)
    alike = [replace(o, step_ms=ms) for o, ms in zip(found, (100.0, 50.0, 50.0), strict=True)]
    assert set(sessions(alike, links, 200)) == {"p"}


# --- moving a session

WHOLE = Span(0, N, embed=True, head=True)


def moves(old_ms: float, new_ms: float, positions: int = 0, prefill_ms: float | None = None) -> bool:
    found = [Offer("p", WHOLE, old_ms), Offer("q", WHOLE, new_ms, prefill_ms)]
    asked = replace(ASKED, links=Links("me", {"p": 0.0, "q": 0.0}))
    return worth_moving(asked, found, [Hop("p", WHOLE)], [Hop("q", WHOLE)], positions)


def test_a_session_moves_for_a_much_better_route_alone() -> None:
    assert moves(100, 60)
    assert not moves(100, 80)
    assert not moves(60, 100)
    assert not moves(2.0, 1.2)  # nobody notices
    assert moves(100, 60, positions=5000, prefill_ms=1.0)  # 5.1 s are won, 5 s lost
    assert not moves(100, 60, positions=5200, prefill_ms=1.0)
    assert not moves(100, 60, positions=5000)  # not measured: as slow as decoding


def test_a_session_leaves_hops_that_are_not_offered_any_more() -> None:
    found = [Offer("q", WHOLE, 50.0)]
    assert worth_moving(ASKED, found, [Hop("p", WHOLE)], [Hop("q", WHOLE)], 10**6)
    assert not worth_moving(ASKED, found, [Hop("q", WHOLE)], [Hop("p", WHOLE)], 0)


# --- what is missing, and edges


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


def test_what_is_missing_of_a_part_is_named_for_the_part_alone() -> None:
    found = offers(me="embed,0", p="1-2")
    assert named(find_part(ASKED, found, range(1, 3))) == [("me", "0"), ("p", "1")]
    with pytest.raises(BlocksMissing) as caught:
        find_part(ASKED, found, range(2, 5))
    assert caught.value.data == {"missing": "3", "model": "m"}


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
