"""Tickets: the good one is accepted once; every other is refused with one line, and leaves no trace."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgnd.errors import TicketRefused
from dgnd.identity import Identity
from dgnd.wire.messages import HopKey, OpenHop, Ticket
from dgnd.wire.ticket import MAX_LEASE_S, TicketBook, new_nonce, sign_ticket

ORIGIN, ME, NEXT, STRANGER = (Identity(bytes([n]) * 32) for n in (1, 2, 3, 4))


def _allowed(peer: str) -> bool:
    return peer in (ORIGIN.peer_id, NEXT.peer_id)


def _ticket(**changes: Any) -> Ticket:
    values: dict[str, Any] = {
        "key": HopKey(ORIGIN.peer_id, "s", 1),
        "recipient": ME.peer_id,
        "previous": ORIGIN.peer_id,
        "next": NEXT.peer_id,
        "next_hop": 2,
        "model": "llama",
        "config_digest": "c",
        "manifest_digest": None,
        "span": "0-3",
        "route": 0,
        "branch": 0,
        "max_positions": 100,
        "max_chunk": 32,
        "nonce": new_nonce(),
        "lease_s": 60.0,
    }
    return Ticket(**{**values, **changes})


def _key(hop: int, session: str = "s", origin: Identity = ORIGIN) -> HopKey:
    return HopKey(origin.peer_id, session, hop)


def _refused(book: TicketBook, message: OpenHop, sender: Identity = ORIGIN, now: float = 0.0) -> str:
    with pytest.raises(TicketRefused) as caught:
        book.admit(message, sender.peer_id, _allowed, now)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_good_ticket_is_accepted_once() -> None:
    book = TicketBook(ME.peer_id)
    ticket = _ticket()
    message = sign_ticket(ticket, ORIGIN)
    assert book.admit(message, ORIGIN.peer_id, _allowed, 0.0) == ticket
    assert "used before" in _refused(book, message)
    assert "used before" in _refused(book, message, now=1e9)


def test_it_may_come_by_a_neighbour_but_not_by_another_peer() -> None:
    book = TicketBook(ME.peer_id)
    book.admit(sign_ticket(_ticket(), ORIGIN), NEXT.peer_id, _allowed, 0.0)
    assert "is not the origin" in _refused(book, sign_ticket(_ticket(key=_key(2)), ORIGIN), STRANGER)


def test_a_node_opens_hops_on_itself() -> None:
    book = TicketBook(ME.peer_id)
    me = ME.peer_id
    ticket = _ticket(key=_key(1, origin=ME), previous=me, next=me, next_hop=None)
    assert book.admit(sign_ticket(ticket, ME), me, lambda peer: False, 0.0) == ticket


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another recipient": ({"recipient": NEXT.peer_id}, "the ticket is for"),
    "no peer id": ({"recipient": "me"}, "not the peer id of"),
    "a peer id with blanks": ({"next": f" {NEXT.peer_id}"}, "peer id"),
    "an unknown previous": ({"previous": STRANGER.peer_id}, "the previous peer"),
    "an unknown next": ({"next": STRANGER.peer_id}, "the next peer"),
    "results to another": ({"next_hop": None}, "results of the last hop go to the origin"),
    "no session": ({"key": _key(1, "")}, "names no session"),
    "a long session": ({"key": _key(1, "s" * 1000)}, "session"),
    "a negative hop": ({"key": _key(-1)}, "hop"),
    "no model": ({"model": ""}, "names no session, model or span"),
    "no span": ({"span": ""}, "names no session, model or span"),
    "a negative branch": ({"branch": -1}, "branch"),
    "a negative route": ({"route": -1}, "route"),
    "no positions": ({"max_positions": 0}, "0 positions"),
    "too many positions": ({"max_positions": 2**31}, "max_positions"),
    "no chunk": ({"max_chunk": 0}, "chunks of 0"),
    "a huge chunk": ({"max_chunk": 100_000}, "chunks of 100000"),
    "a short nonce": ({"nonce": b"x" * 15}, "a nonce of 15"),
    "a long nonce": ({"nonce": b"x" * 33}, "a nonce of 33"),
    "no lease": ({"lease_s": 0.0}, "a lease of 0 s"),
    "a negative lease": ({"lease_s": -5.0}, "a lease of -5 s"),
    "results in what nobody knows": ({"wire": "q3"}, "results as 'q3'; this node knows plain and q8"),
    "a long lease": ({"lease_s": MAX_LEASE_S + 1}, "a lease of 3601 s"),
    "an endless lease": ({"lease_s": float("inf")}, "lease_s"),
    "a lease that is no number": ({"lease_s": float("nan")}, "lease_s"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_ticket_is_refused_and_leaves_no_trace(what: str) -> None:
    changes, expected = BAD[what]
    book = TicketBook(ME.peer_id)
    nonce = new_nonce()
    assert expected in _refused(book, sign_ticket(_ticket(**{"nonce": nonce, **changes}), ORIGIN))
    book.admit(sign_ticket(_ticket(nonce=nonce), ORIGIN), ORIGIN.peer_id, _allowed, 0.0)


def test_an_origin_that_is_not_listed_is_refused() -> None:
    message = sign_ticket(_ticket(key=_key(1, origin=STRANGER), previous=STRANGER.peer_id), STRANGER)
    assert "does not serve the origin" in _refused(TicketBook(ME.peer_id), message, STRANGER)


def test_nobody_signs_for_another() -> None:
    raw = sign_ticket(_ticket(), ORIGIN).ticket
    forged = OpenHop(ticket=raw, signature=NEXT.sign(b"dgn/1 ticket\0" + raw))
    assert "not signed by its origin" in _refused(TicketBook(ME.peer_id), forged, NEXT)


def test_a_signature_for_another_purpose_is_no_ticket() -> None:
    raw = sign_ticket(_ticket(), ORIGIN).ticket
    for data in (raw, b"libp2p" + raw):
        message = OpenHop(ticket=raw, signature=ORIGIN.sign(data))
        assert "not signed by its origin" in _refused(TicketBook(ME.peer_id), message)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_the_bytes_is_refused(data: st.DataObject) -> None:
    good = sign_ticket(_ticket(), ORIGIN)
    raw, signature = bytearray(good.ticket), bytearray(good.signature)
    for _ in range(data.draw(st.integers(1, 4))):
        target = raw if data.draw(st.booleans()) else signature
        target[data.draw(st.integers(0, len(target) - 1))] ^= data.draw(st.integers(1, 255))
    changed = OpenHop(ticket=bytes(raw), signature=bytes(signature))
    if changed != good:
        _refused(TicketBook(ME.peer_id), changed)


@given(st.binary(max_size=200), st.binary(max_size=70))
def test_garbage_is_refused(raw: bytes, signature: bytes) -> None:
    _refused(TicketBook(ME.peer_id), OpenHop(ticket=raw, signature=signature))


def test_deep_nesting_and_great_length_are_refused() -> None:
    nested = b"\x81\xa1z" + b"\x91" * 10_000 + b"\xc0"
    for raw in (nested, bytes(20_000)):
        _refused(TicketBook(ME.peer_id), OpenHop(ticket=raw, signature=bytes(64)))


def test_a_newer_origin_may_say_more() -> None:
    fields = {**msgspec.to_builtins(_ticket(), builtin_types=(bytes,)), "colour": "blue"}
    raw = msgspec.msgpack.encode(fields)
    message = OpenHop(ticket=raw, signature=ORIGIN.sign(b"dgn/1 ticket\0" + raw))
    assert TicketBook(ME.peer_id).admit(message, ORIGIN.peer_id, _allowed, 0.0).model == "llama"


def test_hop_ids_of_a_session_rise() -> None:
    book = TicketBook(ME.peer_id)
    for hop in (0, 2, 7):
        book.admit(sign_ticket(_ticket(key=_key(hop)), ORIGIN), ORIGIN.peer_id, _allowed, 0.0)
    for hop in (7, 5, 0):
        assert f"hop {hop} of session s" in _refused(book, sign_ticket(_ticket(key=_key(hop)), ORIGIN))
    book.admit(sign_ticket(_ticket(key=_key(0, "t")), ORIGIN), ORIGIN.peer_id, _allowed, 0.0)
    other = _ticket(key=_key(0, origin=NEXT), next=NEXT.peer_id)
    book.admit(sign_ticket(other, NEXT), NEXT.peer_id, _allowed, 0.0)


def test_memory_is_bounded_and_a_live_ticket_is_never_forgotten() -> None:
    book = TicketBook(ME.peer_id, max_remembered=10)
    messages = [sign_ticket(_ticket(key=_key(n, f"s{n}")), ORIGIN) for n in range(12)]
    for message in messages[:10]:
        book.admit(message, ORIGIN.peer_id, _allowed, 0.0)
    assert "10 tickets" in _refused(book, messages[10], now=59.0)
    assert "used before" in _refused(book, messages[0], now=59.0)
    other = _ticket(key=_key(0, origin=NEXT), next=NEXT.peer_id)
    book.admit(sign_ticket(other, NEXT), NEXT.peer_id, _allowed, 59.0)  # another origin has its own room
    book.admit(messages[10], ORIGIN.peer_id, _allowed, 61.0)
    assert "used before" in _refused(book, messages[10], now=61.0)


def test_a_forgotten_origin_has_its_room_again() -> None:
    book = TicketBook(ME.peer_id, max_remembered=1)
    book.admit(sign_ticket(_ticket(), ORIGIN), ORIGIN.peer_id, _allowed, 0.0)
    second = sign_ticket(_ticket(key=_key(2)), ORIGIN)
    _refused(book, second)
    book.forget(ORIGIN.peer_id)
    book.admit(second, ORIGIN.peer_id, _allowed, 0.0)
