"""The hop server with values: who may open, feed and steer a hop, and what becomes of it when others go."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from dgn_backends.span import Span, parse_spans
from dgn_backends.tensor import Tensor
from dgnd.errors import JournalGone
from dgnd.hosting.admission import HopHost
from dgnd.hosting.journal import ENTRY_BYTES, JournalBook
from dgnd.hosting.server import HopServer
from dgnd.identity import Identity
from dgnd.wire import q8
from dgnd.wire.codec import encode_bytes
from dgnd.wire.digest import PrefixDigests
from dgnd.wire.messages import (
    Alive,
    Cancel,
    CloseHop,
    Credit,
    EndTurn,
    Failure,
    Frame,
    History,
    HopKey,
    HopLength,
    HopOpened,
    OpenHop,
    OpenSequence,
    Probe,
    Replay,
    Sampling,
    StepFrame,
    Ticket,
    TokenFrame,
)
from dgnd.wire.ticket import TicketBook, sign_ticket

ORIGIN, OTHER, BEFORE, AFTER, STRANGER, ME = (Identity.generate() for _ in range(6))
KNOWN = {ORIGIN.peer_id, OTHER.peer_id, BEFORE.peer_id, AFTER.peer_id, ME.peer_id}
N_BLOCKS, CONTEXT, HIDDEN, LEASE_S = 4, 256, 8, 60.0
KEY = HopKey(ORIGIN.peer_id, "s", 7)
PENALTIES = Sampling(presence_penalty=0.5)
DIGESTS = PrefixDigests(b"the key of this session")
DIGESTS.extend(range(CONTEXT))


@dataclass
class Node:
    """A hop server and all that it did."""

    max_sessions: int = 3
    loaded: str = "embed,0-3,head"
    worker_up: bool = True
    time: float = 100.0
    down: set[str] = field(default_factory=set)
    full: set[str] = field(default_factory=set)
    slow: bool = False  #: what is posted does not leave until the test says so
    leaving: list[Callable[[], None]] = field(default_factory=list)
    other_model: str | None = None
    posted: list[tuple[str, Frame]] = field(default_factory=list)
    work: list[Frame] = field(default_factory=list)
    nudged: list[str] = field(default_factory=list)
    looked_after: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        host = HopHost(
            me=ME.peer_id,
            now=lambda: self.time,
            post=self._post,
            is_up=lambda peer: peer not in self.down,
            is_allowed=KNOWN.__contains__,
            refuses_model=lambda *_: self.other_model,
            loaded_spans=lambda model: self._spans(),
            nudge=self.nudged.append,
            look_after=self.looked_after.append,
            to_worker=self._to_worker,
            n_blocks=lambda model: N_BLOCKS,
            context=lambda model: CONTEXT,
        )
        self.server = HopServer(host, TicketBook(ME.peer_id), self.max_sessions, 1 << 20)

    def _post(self, peer: str, frame: Frame, left: Callable[[], None] | None = None, /) -> bool:
        encode_bytes(frame)  # whatever is said can be sent
        if peer not in self.full:
            self.posted.append((peer, frame))
            if left is not None and self.slow:
                self.leaving.append(left)
            elif left is not None:
                left()
        return peer not in self.full

    def _spans(self) -> tuple[Span, ...]:
        return parse_spans(self.loaded, N_BLOCKS) if self.worker_up else ()

    def _to_worker(self, model: str, frame: Frame) -> bool:
        if self.worker_up:
            encode_bytes(frame)
            self.work.append(frame)
        return self.worker_up

    def hears(self, sender: Identity, message: Any, payload: Tensor | None = None) -> list[tuple[str, Any]]:
        """What is posted because of a frame."""
        return self.posts(lambda: self.server.on_frame(sender.peer_id, Frame(message, payload)))

    def computed(self, message: Any, payload: Tensor | None = None) -> list[tuple[str, Any]]:
        """What is posted because of the worker's answer."""
        return self.posts(lambda: self.server.on_worker_frame("m", Frame(message, payload)))

    def posts(self, do: Any) -> list[tuple[str, Any]]:
        count = len(self.posted)
        do()
        return [(peer, frame.message) for peer, frame in self.posted[count:]]

    def opened(self, identity: Identity = ORIGIN, credits: int = 4, **fields: Any) -> HopKey:
        """Opens a hop; its key."""
        ticket = a_ticket(identity, **fields)
        assert self.hears(identity, sign_ticket(ticket, identity)) == []
        told = HopOpened(key=ticket.key, credits=credits, route=ticket.route)
        assert self.computed(HopOpened(key=ticket.key, credits=credits)) == [(identity.peer_id, told)]
        self.work.clear()
        return ticket.key


def a_ticket(identity: Identity = ORIGIN, **fields: Any) -> Ticket:
    key = HopKey(identity.peer_id, fields.pop("session", "s"), fields.pop("hop", 7))
    values: dict[str, Any] = {
        "key": key,
        "recipient": ME.peer_id,
        "previous": BEFORE.peer_id,
        "next": AFTER.peer_id,
        "next_hop": 8,
        "model": "m",
        "config_digest": "c",
        "manifest_digest": None,
        "span": "1-2",
        "route": 1,
        "branch": 0,
        "max_positions": CONTEXT,
        "max_chunk": 16,
        "nonce": secrets.token_bytes(16),
        "lease_s": LEASE_S,
    }
    return Ticket(**(values | fields))


def hidden(count: int) -> Tensor:
    return Tensor.from_f32(np.arange(count * HIDDEN, dtype="f4").reshape(count, HIDDEN), "f32")


def a_step(key: HopKey, start: int = 0, count: int = 2, **fields: Any) -> StepFrame:
    values: dict[str, Any] = {
        "branch": 0,
        "route": 1,
        "digest_start": DIGESTS.at(start),
        "digest_end": DIGESTS.at(start + count),
    }
    return StepFrame(key=key, start=start, count=count, **(values | fields))


def only_failure(news: Sequence[tuple[str, Any]], to: Identity, kind: str, *words: str) -> Failure:
    ((peer, message),) = news
    assert peer == to.peer_id
    assert isinstance(message, Failure), message
    assert message.kind == kind
    for word in words:
        assert word in message.message
    assert "\n" not in message.message
    return message


# --- opening ------------------------------------------------------------------------------------------


def test_a_good_ticket_opens_a_hop_once_the_worker_has() -> None:
    node = Node()
    ticket = a_ticket()
    assert node.hears(ORIGIN, sign_ticket(ticket, ORIGIN)) == []
    assert [frame.message for frame in node.work] == [
        OpenSequence(key=KEY, span="1-2", max_positions=CONTEXT)
    ]
    assert not node.server.hops[KEY].opened
    step = a_step(KEY)
    only_failure(node.hears(BEFORE, step, hidden(2)), BEFORE, "protocol", "credits")  # too early
    told = HopOpened(key=KEY, credits=4, route=1)
    assert node.computed(HopOpened(key=KEY, credits=4)) == [(ORIGIN.peer_id, told)]
    assert node.hears(BEFORE, step, hidden(2)) == []
    assert node.work[-1].message == step


def tampered(ticket: Ticket) -> OpenHop:
    """The span is another, the signature the old one."""
    good = sign_ticket(ticket, ORIGIN)
    return OpenHop(ticket=good.ticket.replace(b"1-2", b"0-3"), signature=good.signature)


def unsigned(raw: bytes) -> OpenHop:
    return OpenHop(ticket=raw, signature=bytes(64))


def encoded(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(a_ticket(**fields))


FOREIGN = Identity.generate()
REFUSED: dict[str, tuple[Identity, OpenHop, str]] = {
    "garbage": (OTHER, unsigned(b"\xc1garbage"), "can't be read"),
    "bad text": (
        OTHER,
        unsigned(encoded(model="mmmm").replace(b"mmmm", b"\xff\xfe\xfd\xfc")),
        "can't be read",
    ),
    "nested lists": (OTHER, unsigned(b"\x91" * 16000), "can't be read"),
    "a session's name of 9000 letters": (ORIGIN, sign_ticket(a_ticket(session="s" * 9000), ORIGIN), "9000"),
    "a span of 9000 letters": (ORIGIN, sign_ticket(a_ticket(span="1" * 9000), ORIGIN), "9000"),
    "a negative hop": (ORIGIN, sign_ticket(a_ticket(hop=-1), ORIGIN), "can't be used"),
    "a hop beyond 64 bits": (ORIGIN, sign_ticket(a_ticket(hop=2**64 - 1), ORIGIN), "can't be used"),
    "signed by another peer": (OTHER, OpenHop(ticket=encoded(), signature=OTHER.sign(encoded())), "Refused"),
    "no signature": (OTHER, unsigned(encoded(previous=OTHER.peer_id)), "not signed"),
    "tampered with": (ORIGIN, tampered(a_ticket()), "not signed"),
    "for another node": (ORIGIN, sign_ticket(a_ticket(recipient=AFTER.peer_id), ORIGIN), "the ticket is for"),
    "brought by a third": (OTHER, sign_ticket(a_ticket(), ORIGIN), "not the origin"),
    "of a stranger": (STRANGER, sign_ticket(a_ticket(STRANGER), STRANGER), "does not serve the origin"),
    "to a stranger": (ORIGIN, sign_ticket(a_ticket(next=STRANGER.peer_id), ORIGIN), "not in this node's"),
    "from a stranger": (
        ORIGIN,
        sign_ticket(a_ticket(previous=STRANGER.peer_id), ORIGIN),
        "not in this node's",
    ),
    "results to a third": (ORIGIN, sign_ticket(a_ticket(next_hop=None), ORIGIN), "results of the last hop"),
    "a short nonce": (ORIGIN, sign_ticket(a_ticket(nonce=b"x"), ORIGIN), "nonce"),
    "a lease of a day": (ORIGIN, sign_ticket(a_ticket(lease_s=86400.0), ORIGIN), "lease"),
    "a lease that is no number": (ORIGIN, sign_ticket(a_ticket(lease_s=float("nan")), ORIGIN), "number"),
    "huge chunks": (ORIGIN, sign_ticket(a_ticket(max_chunk=1 << 20), ORIGIN), "chunks"),
    "no positions": (ORIGIN, sign_ticket(a_ticket(max_positions=0), ORIGIN), "0 positions"),
    "a span that is none": (ORIGIN, sign_ticket(a_ticket(span="all of it\n"), ORIGIN), "all of it"),
    "a block beyond the model": (ORIGIN, sign_ticket(a_ticket(span="2-9"), ORIGIN), "beyond the model"),
}
REFUSED["signed by another peer"] = (
    OTHER,
    OpenHop(ticket=encoded(previous=OTHER.peer_id), signature=secrets.token_bytes(64)),
    "not signed",
)


@pytest.mark.parametrize("what", REFUSED)
def test_no_hop_without_a_good_ticket(what: str) -> None:
    node = Node()
    sender, message, words = REFUSED[what]
    failure = only_failure(node.hears(sender, message), sender, "ticket_refused", words)
    assert failure.tag == "open"
    assert node.server.hops == {}
    assert node.work == []


def test_a_ticket_counts_once_also_after_its_hop_was_closed_or_its_lease_ended() -> None:
    node = Node()
    message = sign_ticket(a_ticket(), ORIGIN)
    assert node.hears(ORIGIN, message) == []
    node.hears(ORIGIN, CloseHop(key=KEY))
    for sender in (ORIGIN, BEFORE, AFTER):
        only_failure(node.hears(sender, message), sender, "ticket_refused", "used before")
    node.time += 100 * LEASE_S
    only_failure(node.hears(ORIGIN, message), ORIGIN, "ticket_refused", "used before")
    assert node.server.hops == {}


def test_a_ticket_that_comes_twice_is_answered_once_more_and_changes_nothing() -> None:
    node = Node()
    first, later = (sign_ticket(a_ticket(route=route), ORIGIN) for route in (1, 2))
    node.hears(ORIGIN, first)
    assert node.hears(ORIGIN, first) == []  # the worker's answer will do for both
    told = HopOpened(key=KEY, credits=4, route=1)
    assert node.computed(HopOpened(key=KEY, credits=4)) == [(ORIGIN.peer_id, told)]
    node.hears(BEFORE, a_step(KEY), hidden(2))
    node.work.clear()
    for sender in (ORIGIN, BEFORE):  # the answer is the origin's, whoever sent it
        again = node.hears(sender, first)
        assert again == [(ORIGIN.peer_id, msgspec.structs.replace(told, length=2))]
    news = node.hears(OTHER, first)
    only_failure(news, OTHER, "ticket_refused", "is not the origin, the previous or the next")
    assert node.work == []
    assert node.hears(ORIGIN, later) == node.hears(ORIGIN, later) == []  # until nothing is under way
    node.computed(HopLength(key=KEY, branch=0, length=2))
    assert node.hears(ORIGIN, first) == []  # late: the hop is of another route by now
    assert [message.route for _, message in node.hears(ORIGIN, later)] == [2]
    forged = OpenHop(ticket=later.ticket, signature=first.signature)
    only_failure(node.hears(ORIGIN, forged), ORIGIN, "ticket_refused", "not signed")


def test_a_refused_ticket_says_which_hop_it_spoke_of() -> None:
    node = Node()
    only_failure(node.hears(ORIGIN, tampered(a_ticket())), ORIGIN, "ticket_refused")
    assert node.posted[-1][1].message.key == KEY  # type: ignore[union-attr]


def test_a_ticket_may_be_brought_by_a_neighbour_and_the_origin_is_answered() -> None:
    node = Node()
    assert node.hears(BEFORE, sign_ticket(a_ticket(), ORIGIN)) == []
    assert node.computed(HopOpened(key=KEY, credits=2))[0][0] == ORIGIN.peer_id


@pytest.mark.parametrize("span", ["0-1", "2,3", "1,3", "embed,0", "3,head"])
def test_blocks_that_are_not_loaded_are_not_ready(span: str) -> None:
    node = Node(loaded="1-2")
    news = node.hears(ORIGIN, sign_ticket(a_ticket(span=span), ORIGIN))
    only_failure(news, ORIGIN, "not_ready", span, "loaded: 1-2")
    assert node.server.hops == {}


def test_other_weights_are_refused() -> None:
    node = Node(other_model="model m has other weights there")
    news = node.hears(ORIGIN, sign_ticket(a_ticket(), ORIGIN))
    only_failure(news, ORIGIN, "ticket_refused", "other weights")


def test_no_worker_is_not_ready() -> None:
    node = Node(worker_up=False)
    only_failure(node.hears(ORIGIN, sign_ticket(a_ticket(), ORIGIN)), ORIGIN, "not_ready", "nothing")
    assert node.server.hops == {}


def test_what_the_worker_can_not_open_is_gone() -> None:
    node = Node()
    node.hears(ORIGIN, sign_ticket(a_ticket(), ORIGIN))
    news = node.computed(Failure(kind="limit", message="no memory", key=KEY, tag="open"))
    only_failure(news, ORIGIN, "limit", "no memory")
    assert node.server.hops == {}


# --- limits -------------------------------------------------------------------------------------------


def test_sessions_are_limited_for_each_origin() -> None:
    node = Node(max_sessions=3)
    for number in range(3):
        node.opened(session=f"s{number}", hop=number)
    over = sign_ticket(a_ticket(session="s3", hop=3), ORIGIN)
    only_failure(node.hears(ORIGIN, over), ORIGIN, "no_room_now", "3 sessions", "of 3 at most")
    assert len(node.server.hops) == 3
    node.opened(OTHER, session="s0")
    own = {"previous": ME.peer_id, "next": ME.peer_id, "next_hop": None, "span": "3,head"}
    node.opened(ME, session="mine", **own)
    node.hears(ORIGIN, CloseHop(key=HopKey(ORIGIN.peer_id, "s1", 1)))
    node.opened(session="s4", hop=4)


def test_several_hops_of_one_session_are_one_session() -> None:
    node = Node(max_sessions=1)
    for hop, span in enumerate(("embed,0", "2", "head"), start=1):
        node.opened(hop=hop, span=span)
    assert len(node.server.hops) == 3


def test_a_new_hop_replaces_what_its_session_had_in_its_place() -> None:
    """So a session never holds more than one model's worth of KV, whatever its origin opens."""
    node = Node(max_sessions=1)
    node.opened(hop=1, span="0-1")
    node.opened(hop=2, span="3")
    node.opened(hop=3, span="1-2", route=2)
    assert sorted(key.hop for key in node.server.hops) == [2, 3]
    node.hears(ORIGIN, sign_ticket(a_ticket(hop=4, span="0-3"), ORIGIN))
    closed = [frame.message.key.hop for frame in node.work if isinstance(frame.message, CloseHop)]
    assert sorted(closed) == [2, 3]
    assert [key.hop for key in node.server.hops] == [4]


def test_more_positions_than_the_context_are_refused_with_both_numbers() -> None:
    node = Node()
    over = sign_ticket(a_ticket(max_positions=CONTEXT + 1), ORIGIN)
    only_failure(node.hears(ORIGIN, over), ORIGIN, "limit", str(CONTEXT), str(CONTEXT + 1))
    assert node.server.hops == {}


def test_a_step_beyond_its_ticket_is_refused_with_the_numbers() -> None:
    node = Node()
    key = node.opened(max_positions=20, max_chunk=8)
    only_failure(node.hears(BEFORE, a_step(key, 0, 9), hidden(9)), BEFORE, "limit", "8 a step", "20 in all")
    for start in (0, 8):
        assert node.hears(BEFORE, a_step(key, start, 8), hidden(8)) == []
    only_failure(node.hears(BEFORE, a_step(key, 16, 8), hidden(8)), BEFORE, "limit", "16-23", "20 in all")
    assert node.hears(BEFORE, a_step(key, 16, 4), hidden(4)) == []


def test_a_frame_beyond_the_credits_is_refused() -> None:
    node = Node()
    key = node.opened(credits=2)
    for start in (0, 2):
        assert node.hears(BEFORE, a_step(key, start), hidden(2)) == []
    only_failure(node.hears(BEFORE, a_step(key, 4), hidden(2)), BEFORE, "protocol", "credits")
    node.computed(a_step(key, 0), hidden(2))
    assert node.hears(BEFORE, a_step(key, 4), hidden(2)) == []


# --- data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sender", [ORIGIN, OTHER, AFTER, STRANGER, ME])
def test_data_comes_from_the_previous_peer_alone(sender: Identity) -> None:
    node = Node()
    key = node.opened()
    only_failure(node.hears(sender, a_step(key), hidden(2)), sender, "protocol", "comes from")
    assert node.work == []
    assert node.server.hops[key].fence.length == 0


def test_a_step_of_an_unknown_hop_is_stale() -> None:
    node = Node()
    news = node.hears(BEFORE, a_step(HopKey(ORIGIN.peer_id, "s", 99)), hidden(2))
    only_failure(news, BEFORE, "stale_state", "99")


def test_results_go_to_the_next_peer_under_its_own_key() -> None:
    node = Node()
    key = node.opened()
    step = a_step(key, sample=Sampling(seed=4))
    node.hears(BEFORE, step, hidden(2))
    ((peer, message),) = node.computed(step, hidden(2))
    assert peer == AFTER.peer_id
    assert message == msgspec.structs.replace(step, key=HopKey(ORIGIN.peer_id, "s", 8))
    assert node.posted[-1][1].payload is not None


def test_on_a_relayed_edge_data_comes_from_and_goes_to_the_origin() -> None:
    node = Node()
    key = node.opened(previous=ORIGIN.peer_id, next=ORIGIN.peer_id)
    only_failure(node.hears(BEFORE, a_step(key), hidden(2)), BEFORE, "protocol", "comes from")
    assert node.hears(ORIGIN, a_step(key), hidden(2)) == []
    ((peer, message),) = node.computed(a_step(key), hidden(2))
    assert (peer, message.key.hop) == (ORIGIN.peer_id, 8)


def test_what_was_there_already_is_not_computed_again_and_an_overlap_is_cut() -> None:
    node = Node()
    key = node.opened()
    assert node.hears(BEFORE, a_step(key, 0, 2), hidden(2)) == []
    assert node.hears(BEFORE, a_step(key, 0, 2), hidden(2)) == []
    assert len(node.work) == 1
    assert node.hears(BEFORE, a_step(key, 0, 5), hidden(5)) == []
    frame = node.work[1]
    assert isinstance(frame.message, StepFrame)
    assert (frame.message.start, frame.message.count) == (2, 3)
    assert frame.payload is not None
    assert frame.payload.to_f32().tolist() == hidden(5).to_f32()[2:].tolist()


def test_a_gap_says_where_to_begin() -> None:
    node = Node()
    key = node.opened()
    failure = only_failure(node.hears(BEFORE, a_step(key, 4), hidden(2)), BEFORE, "position_gap")
    assert failure.data == {"expected": 0}
    assert failure.key == key


def test_answers_of_the_head_go_to_the_origin() -> None:
    node = Node()
    key = node.opened(next=ORIGIN.peer_id, next_hop=None, span="3,head")
    node.hears(BEFORE, a_step(key), hidden(2))
    node.hears(BEFORE, a_step(key, 2, sample=Sampling()), hidden(2))
    for answer in (
        Credit(key=key, branch=0, route=1, stop=2),
        TokenFrame(key=key, branch=0, route=1, position=4, token_id=9),
    ):
        assert node.computed(answer) == [(ORIGIN.peer_id, answer)]
    assert node.server.hops[key].fence.under_way == 0


def test_a_ticket_that_ends_before_the_head_is_told_so() -> None:
    node = Node()
    key = node.opened(next=ORIGIN.peer_id, next_hop=None, span="1-2")
    node.hears(BEFORE, a_step(key), hidden(2))
    only_failure(node.computed(a_step(key), hidden(2)), ORIGIN, "protocol", "no head")


def test_answers_for_a_hop_that_is_gone_are_dropped() -> None:
    node = Node()
    key = node.opened()
    node.hears(ORIGIN, CloseHop(key=key))
    assert node.computed(a_step(key), hidden(2)) == []
    assert node.computed(HopLength(key=key, branch=0, length=3)) == []


# --- control ------------------------------------------------------------------------------------------

CONTROLS = [
    Cancel(key=KEY, branch=0),
    EndTurn(key=KEY, branch=0),
    CloseHop(key=KEY),
    History(key=KEY, branch=0, start=0, answer_start=0),
]
IDS = Tensor.from_numpy(np.asarray([1, 2, 3], "<i4"), "i32")


@pytest.mark.parametrize("message", CONTROLS, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("sender", [BEFORE, AFTER, OTHER, STRANGER, ME])
def test_only_the_origin_steers(sender: Identity, message: Any) -> None:
    node = Node()
    key = node.opened()
    assert node.hears(BEFORE, a_step(key), hidden(2)) == []
    node.work.clear()
    payload = IDS if isinstance(message, History) else None
    only_failure(node.hears(sender, message, payload), sender, "ticket_refused", "only its origin")
    assert node.work == []
    assert node.server.hops[key].fence.length == 2
    assert node.hears(BEFORE, a_step(key, 2), hidden(2)) == []  # it goes on as if nothing had been


def test_a_cancel_is_answered_with_the_last_boundary_in_the_kv() -> None:
    node = Node()
    key = node.opened()
    for start in (0, 4, 8):
        node.hears(BEFORE, a_step(key, start, 4), hidden(4))
    assert node.hears(ORIGIN, Cancel(key=key, branch=0)) == []
    assert node.work[-1].message == Cancel(key=key, branch=0)
    assert node.hears(BEFORE, a_step(key, 12, 4), hidden(4)) == []  # late: dropped
    assert len(node.work) == 4
    news = node.computed(HopLength(key=key, branch=0, length=7))
    assert news == [(ORIGIN.peer_id, HopLength(key=key, branch=0, length=4))]
    again = a_step(key, 4, 4, branch=1, truncate_to=4)
    assert node.hears(BEFORE, again, hidden(4)) == []
    assert node.work[-1].message == again


def test_the_end_of_a_turn_is_answered_with_the_length() -> None:
    node = Node()
    key = node.opened()
    node.hears(BEFORE, a_step(key, 0, 4), hidden(4))
    assert node.hears(ORIGIN, EndTurn(key=key, branch=0)) == [
        (ORIGIN.peer_id, HopLength(key=key, branch=0, length=4))
    ]


def test_control_of_an_unknown_hop_is_answered_with_nothing_there() -> None:
    node = Node()
    for message in (Cancel(key=KEY, branch=3), EndTurn(key=KEY, branch=3)):
        assert node.hears(ORIGIN, message) == [(ORIGIN.peer_id, HopLength(key=KEY, branch=3, length=0))]
    assert node.hears(ORIGIN, CloseHop(key=KEY)) == []
    assert node.hears(ORIGIN, History(key=KEY, branch=0, start=0, answer_start=0), IDS) == []
    assert node.work == []


def test_steps_with_penalties_wait_for_the_token_ids_of_their_branch() -> None:
    node = Node()
    key = node.opened(next=ORIGIN.peer_id, next_hop=None, span="3,head")
    step = a_step(key, sample=PENALTIES)
    node.hears(BEFORE, step, hidden(2))
    assert node.work == []
    assert node.hears(ORIGIN, History(key=key, branch=0, start=0, answer_start=2), IDS) == []
    assert [type(frame.message) for frame in node.work] == [History, StepFrame]
    node.hears(BEFORE, a_step(key, 2, sample=PENALTIES), hidden(2))
    assert isinstance(node.work[-1].message, StepFrame)


def test_a_history_beyond_the_ticket_is_refused() -> None:
    node = Node()
    key = node.opened(max_positions=4)
    history = History(key=key, branch=0, start=2, answer_start=0)
    only_failure(node.hears(ORIGIN, history, IDS), ORIGIN, "limit", "5 positions", "for 4")
    assert node.work == []


# --- the next peer's word -----------------------------------------------------------------------------


def test_a_refusal_of_the_next_peer_is_passed_to_the_origin() -> None:
    node = Node()
    node.opened()
    refusal = Failure(kind="position_gap", message="gap", key=HopKey(ORIGIN.peer_id, "s", 8))
    assert node.hears(AFTER, refusal) == [(ORIGIN.peer_id, refusal)]


@pytest.mark.parametrize(
    ("sender", "key"),
    [
        (OTHER, HopKey(ORIGIN.peer_id, "s", 8)),
        (AFTER, HopKey(ORIGIN.peer_id, "s", 7)),
        (AFTER, HopKey(ORIGIN.peer_id, "another", 8)),
        (AFTER, HopKey(OTHER.peer_id, "s", 8)),
    ],
)
def test_other_words_are_passed_to_nobody(sender: Identity, key: HopKey) -> None:
    node = Node()
    node.opened()
    assert node.hears(sender, Failure(kind="x", message="not true", key=key)) == []


# --- ends ---------------------------------------------------------------------------------------------


def test_a_dead_worker_is_told_to_every_origin_and_whose_steps_ran() -> None:
    node = Node()
    key = node.opened()
    node.opened(OTHER)
    assert node.posts(lambda: node.server.on_worker_down("m", "another worker", (), ())) == []
    ended = lambda: node.server.on_worker_down("m", "killed by SIGKILL", set(node.server.hops), {key})  # noqa: E731
    news = node.posts(ended)
    assert [(peer, message.kind) for peer, message in news] == [
        (ORIGIN.peer_id, "worker_died"),
        (OTHER.peer_id, "worker_died"),
    ]
    assert [message.data["running"] for _, message in news] == [True, False]
    assert "1-2" in news[0][1].message
    assert "SIGKILL" in news[0][1].message
    assert node.server.hops == {}


def test_a_hop_that_stays_logs_under_the_id_of_the_next_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dgnd.hops")
    node = Node()
    key = node.opened(generation="one")
    for generation in ("one", "", "two", "two"):
        assert node.hears(ORIGIN, Probe(key=key, generation=generation)) == [(ORIGIN.peer_id, Alive(key=key))]
    node.hears(ORIGIN, CloseHop(key=key))
    said = [(record.generation, record.session, record.peer) for record in caplog.records]  # type: ignore[attr-defined]  # given by `extra`
    assert said == [(each, "s", ORIGIN.peer_id) for each in ("one", "two", "two")]
    caplog.clear()
    node.opened(hop=8)  # by an origin that does not tell
    assert [record.generation for record in caplog.records] == ["s"]  # type: ignore[attr-defined]  # as above


def test_a_hop_is_one_line_of_the_log_unless_it_ends_otherwise_than_its_origin_wants(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dgnd.hops")
    node = Node()
    for hop in range(1, 21):
        key = node.opened(hop=hop, generation=f"g{hop}")
        node.hears(ORIGIN, CloseHop(key=key))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"generation g{hop}: hop {hop} opened" for hop in range(1, 21)
    ]
    node.opened(hop=21)
    caplog.clear()
    node.time += LEASE_S + 1
    node.server.sweep()
    assert [record.getMessage() for record in caplog.records] == [
        "generation s: hop 21 closed at 0: its lease ended"
    ]


def test_who_waits_has_the_worker_and_the_way_onward_looked_after() -> None:
    node = Node()
    key = node.opened()
    assert node.hears(ORIGIN, Probe(key=key)) == [(ORIGIN.peer_id, Alive(key=key))]
    assert (node.looked_after, node.nudged) == (["m"], [AFTER.peer_id])
    only_failure(node.hears(BEFORE, Probe(key=key)), BEFORE, "ticket_refused")
    gone = HopKey(ORIGIN.peer_id, key.session, key.hop + 1)
    only_failure(node.hears(ORIGIN, Probe(key=gone)), ORIGIN, "stale_state")
    assert (node.looked_after, node.nudged) == (["m"], [AFTER.peer_id])


def test_a_silent_worker_is_told_to_every_origin_and_keeps_its_hops() -> None:
    node = Node()
    node.opened()
    node.opened(OTHER)
    news = node.posts(lambda: node.server.on_worker_silent("m", "is stopped", set(node.server.hops)))
    assert [(peer, message.kind) for peer, message in news] == [
        (ORIGIN.peer_id, "worker_silent"),
        (OTHER.peer_id, "worker_silent"),
    ]
    assert len(node.server.hops) == 2


def test_a_step_for_a_worker_that_is_down_is_refused() -> None:
    node = Node()
    key = node.opened()
    node.worker_up = False
    only_failure(node.hears(BEFORE, a_step(key), hidden(2)), BEFORE, "worker_died")


def test_a_gone_origin_takes_its_sessions_along_and_no_others() -> None:
    node = Node()
    key = node.opened()
    other = node.opened(OTHER)
    assert node.posts(lambda: node.server.on_peer_down(ORIGIN.peer_id)) == []
    assert list(node.server.hops) == [other]
    assert [frame.message for frame in node.work] == [CloseHop(key=key)]


@pytest.mark.parametrize("neighbour", [BEFORE, AFTER])
def test_a_gone_neighbour_is_told_to_the_origin(neighbour: Identity) -> None:
    node = Node()
    node.opened()
    node.opened(OTHER, previous=OTHER.peer_id, next=OTHER.peer_id, next_hop=None, span="3,head")
    news = node.posts(lambda: node.server.on_peer_down(neighbour.peer_id))
    only_failure(news, ORIGIN, "peer_gone", neighbour.peer_id)


def test_a_result_for_a_peer_that_is_not_there_is_told_to_the_origin() -> None:
    node = Node(down={AFTER.peer_id})
    key = node.opened()
    node.hears(BEFORE, a_step(key), hidden(2))
    only_failure(node.computed(a_step(key), hidden(2)), ORIGIN, "peer_gone", AFTER.peer_id)


def test_a_lease_ends_when_nothing_comes() -> None:
    node = Node()
    key = node.opened()
    node.opened(OTHER, lease_s=2 * LEASE_S)
    for _ in range(4):  # every frame renews it
        node.time += LEASE_S - 1
        node.hears(ORIGIN, EndTurn(key=key, branch=0))
        node.hears(OTHER, EndTurn(key=HopKey(OTHER.peer_id, "s", 7), branch=0))
        assert node.posts(node.server.sweep) == []
    node.time += LEASE_S + 1
    ((peer, message),) = node.posts(node.server.sweep)
    assert (peer, message) == (ORIGIN.peer_id, CloseHop(key=key, reason="its lease ended"))
    assert [hop.origin for hop in node.server.hops] == [OTHER.peer_id]
    assert CloseHop(key=key) in [frame.message for frame in node.work]


def test_what_others_send_does_not_renew_a_lease() -> None:
    node = Node()
    key = node.opened()
    node.time += LEASE_S - 1
    node.hears(OTHER, a_step(key), hidden(2))
    node.hears(OTHER, Cancel(key=key, branch=0))
    node.time += 2
    assert [type(message) for _, message in node.posts(node.server.sweep)] == [CloseHop]


def test_a_node_that_stops_closes_everything_and_says_so() -> None:
    node = Node()
    node.opened()
    own = {"previous": ME.peer_id, "next": ME.peer_id, "next_hop": None, "span": "3,head"}
    node.opened(ME, **own)
    news = node.posts(lambda: node.server.close_all("the node is stopping"))
    assert news == [(ORIGIN.peer_id, CloseHop(key=KEY, reason="the node is stopping"))]
    assert node.server.hops == {}


# --- another route: hops that stay, journals, catching up


def rerouted(node: Node, route: int = 2, **fields: Any) -> list[tuple[str, Any]]:
    """A later ticket for the open hop; what is posted at once."""
    return node.hears(ORIGIN, sign_ticket(a_ticket(route=route, **fields), ORIGIN))


def with_results(node: Node, count: int = 3) -> None:
    """The hop has computed `count` steps of two positions."""
    for start in range(0, 2 * count, 2):
        step = a_step(KEY, start)
        node.hears(BEFORE, step, hidden(2))
        node.computed(step, hidden(2))
    node.work.clear()


def test_a_hop_that_stays_says_how_far_it_is_once_nothing_is_under_way() -> None:
    node = Node()
    node.opened()
    with_results(node, 2)
    waiting = a_step(KEY, 4)
    node.hears(BEFORE, waiting, hidden(2))
    assert rerouted(node, next=OTHER.peer_id, next_hop=11) == []
    assert node.work[-1].message == Cancel(key=KEY, branch=0)
    # What the worker had begun is journalled and goes nowhere; then its length comes.
    assert node.computed(waiting, hidden(2)) == []
    told = node.computed(HopLength(key=KEY, branch=0, length=6))
    assert told == [(ORIGIN.peer_id, HopOpened(key=KEY, credits=4, length=6, route=2))]
    # Frames of the route before are late, those of the new one go to the new neighbour.
    assert node.hears(BEFORE, a_step(KEY, 6), hidden(2)) == []
    step = a_step(KEY, 6, branch=1, route=2, truncate_to=6)
    assert node.hears(BEFORE, step, hidden(2)) == []
    ((peer, onward),) = node.computed(step, hidden(2))
    assert (peer, onward.key.hop, onward.route) == (OTHER.peer_id, 11, 2)


def test_a_hop_that_stays_drops_what_the_worker_did_not_do() -> None:
    node = Node()
    node.opened()
    with_results(node, 1)
    node.hears(BEFORE, a_step(KEY, 2), hidden(2))
    rerouted(node)
    ((_, told),) = node.computed(HopLength(key=KEY, branch=0, length=2))
    assert told.length == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"route": 1}, "the ticket is of route 1, the hop of 1"),
        ({"route": 2, "span": "1"}, "is open for 1-2 of m"),
        ({"route": 2, "max_positions": 10}, "is open for 1-2 of m"),
    ],
)
def test_a_later_ticket_is_of_a_later_route_and_the_same_blocks(fields: dict[str, Any], words: str) -> None:
    node = Node()
    node.opened()
    news = node.hears(ORIGIN, sign_ticket(a_ticket(**fields), ORIGIN))
    only_failure(news, ORIGIN, "ticket_refused", words)
    assert node.work == []


def test_a_replay_sends_the_journal_to_the_next_hop_in_one_piece() -> None:
    node = Node()
    node.opened()
    with_results(node, 3)
    rerouted(node, next=OTHER.peer_id, next_hop=11)
    node.computed(HopLength(key=KEY, branch=0, length=6))
    replay = Replay(key=KEY, branch=0, route=2, start=2, stop=6)
    ((peer, step),) = node.hears(ORIGIN, replay)
    assert (peer, step.key.hop, step.start, step.count, step.sample) == (OTHER.peer_id, 11, 2, 4, None)
    assert (step.digest_start, step.digest_end) == (DIGESTS.at(2), DIGESTS.at(6))
    _, frame = node.posted[-1]
    assert frame.payload is not None
    both = np.concatenate([hidden(2).to_f32()] * 2)
    np.testing.assert_array_equal(frame.payload.to_f32(), both)


def test_what_goes_in_q8_is_journalled_and_sent_again_so_whatever_way_it_came() -> None:
    node = Node()
    node.opened(wire="q8")
    sent = q8.encode(hidden(2))
    node.hears(BEFORE, a_step(KEY), sent)
    work = node.work[-1].payload
    assert work is not None  # the worker knows nothing of it
    np.testing.assert_array_equal(work.to_numpy(), q8.decode(sent).to_numpy())
    assert work.dtype == "f32"
    node.computed(a_step(KEY), hidden(2))
    first = node.posted[-1][1].payload
    rerouted(node, next=OTHER.peer_id, next_hop=11, wire="q8")
    node.computed(HopLength(key=KEY, branch=0, length=2))
    node.hears(ORIGIN, Replay(key=KEY, branch=0, route=2, start=0, stop=2))
    again = node.posted[-1][1].payload
    assert first is not None
    assert again is not None
    assert (first.dtype, bytes(first.data)) == (again.dtype, bytes(again.data)) == ("q8", bytes(sent.data))
    news = node.hears(ORIGIN, sign_ticket(a_ticket(route=3), ORIGIN))
    only_failure(news, ORIGIN, "ticket_refused", "sends its results as q8")


def test_results_that_are_not_finite_are_the_fault_of_who_computed_them() -> None:
    node = Node()
    node.opened(wire="q8")
    node.hears(BEFORE, a_step(KEY), hidden(2))
    bad = Tensor.from_f32(np.full((2, HIDDEN), np.inf, np.float32), "f32")
    only_failure(node.computed(a_step(KEY), bad), ORIGIN, "non_finite", "1-2 of m", "not finite")


def test_results_that_cannot_wait_are_told_and_kept_to_be_sent_again() -> None:
    node = Node()
    node.opened()
    node.full = {AFTER.peer_id}
    node.hears(BEFORE, a_step(KEY), hidden(2))
    only_failure(node.computed(a_step(KEY), hidden(2)), ORIGIN, "peer", "too much waits already")
    node.full.clear()
    ((peer, step),) = node.hears(ORIGIN, Replay(key=KEY, branch=0, route=1, start=0, stop=2))
    assert (peer, step.start, step.count) == (AFTER.peer_id, 0, 2)


def test_a_replay_of_an_earlier_route_is_late_and_one_of_what_is_gone_says_so() -> None:
    node = Node()
    node.opened()
    with_results(node, 3)
    assert node.hears(ORIGIN, Replay(key=KEY, branch=0, route=0, start=2, stop=6)) == []
    news = node.hears(ORIGIN, Replay(key=KEY, branch=0, route=1, start=2, stop=8))
    only_failure(news, ORIGIN, "journal_gone", "positions 2 to 7 are no longer kept; there are 0 to 5")
    only_failure(
        node.hears(ORIGIN, Replay(key=HopKey(ORIGIN.peer_id, "s", 99), branch=0, route=1, start=0, stop=2)),
        ORIGIN,
        "stale_state",
        "there is no hop 99",
    )
    only_failure(
        node.hears(BEFORE, Replay(key=KEY, branch=0, route=1, start=0, stop=2)), BEFORE, "ticket_refused"
    )


def replay(start: int, stop: int, route: int = 1) -> Replay:
    return Replay(key=KEY, branch=0, route=route, start=start, stop=stop)


def test_of_a_hop_one_replay_is_on_its_way_and_few_wait() -> None:
    node = Node()
    node.opened(credits=3)
    with_results(node, 8)
    node.slow = True
    sent = [message for _, message in node.hears(ORIGIN, replay(0, 2))]
    for start in (2, 4, 6):
        assert node.hears(ORIGIN, replay(start, start + 2)) == []
    while node.leaving:
        news = node.posts(node.leaving.pop(0))
        sent += [message for _, message in news]
        assert len(node.leaving) == len(news) <= 1
    assert [(step.start, step.count) for step in sent] == [(0, 2), (2, 2), (4, 2), (6, 2)]
    # An origin has as many under way as the hop has credits, and more is a flood.
    node.hears(ORIGIN, replay(8, 10))
    waiting = [node.hears(ORIGIN, replay(start, start + 1)) for start in range(10, 16)]
    only_failure(waiting[-1], ORIGIN, "limit", "4 replays wait for their turn")
    assert len(node.leaving) == 1


def test_a_replay_that_is_lost_with_its_connection_lets_the_next_route_have_its_own() -> None:
    node = Node()
    node.opened()
    with_results(node, 3)
    node.slow = True
    node.hears(ORIGIN, replay(0, 2))
    assert node.hears(ORIGIN, replay(2, 4)) == []
    node.down = {AFTER.peer_id}
    only_failure(node.posts(node.leaving.pop()), ORIGIN, "peer_gone", AFTER.peer_id)
    rerouted(node, next=OTHER.peer_id, next_hop=11)
    node.computed(HopLength(key=KEY, branch=0, length=6))
    ((peer, step),) = node.hears(ORIGIN, replay(0, 2, route=2))
    assert (peer, step.start) == (OTHER.peer_id, 0)


def test_what_waits_to_be_sent_again_ends_with_its_hop() -> None:
    node = Node()
    node.opened()
    with_results(node, 3)
    node.slow = True
    node.hears(ORIGIN, replay(0, 2))
    node.hears(ORIGIN, replay(2, 4))
    node.hears(ORIGIN, CloseHop(key=KEY))
    assert node.posts(node.leaving.pop()) == []


def test_in_a_route_every_position_is_sent_again_once(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    node.opened()
    with_results(node, 3)
    assert len(node.hears(ORIGIN, replay(0, 4))) == 1
    for again in (replay(0, 4), replay(2, 6)):
        only_failure(node.hears(ORIGIN, again), ORIGIN, "limit", "up to 3 were sent again already in route 1")
    assert len(node.hears(ORIGIN, replay(4, 6))) == 1
    assert "refused replay of" in caplog.text
    rerouted(node, next=OTHER.peer_id, next_hop=11)
    node.computed(HopLength(key=KEY, branch=0, length=6))
    assert len(node.hears(ORIGIN, replay(0, 4, route=2))) == 1


def test_a_replay_is_no_larger_than_a_step_may_be() -> None:
    node = Node()
    node.opened(max_chunk=4)
    with_results(node, 4)
    only_failure(node.hears(ORIGIN, replay(0, 6)), ORIGIN, "limit", "positions 0-5 exceed", "4 at once")
    assert len(node.hears(ORIGIN, replay(0, 4))) == 1


def test_what_is_rolled_back_is_no_longer_in_the_journal() -> None:
    node = Node()
    node.opened()
    with_results(node, 3)
    step = a_step(KEY, 2, branch=1, truncate_to=2)
    node.hears(BEFORE, step, hidden(2))
    news = node.hears(ORIGIN, Replay(key=KEY, branch=1, route=1, start=2, stop=4))
    only_failure(news, ORIGIN, "journal_gone", "there are 0 to 1")
    node.computed(step, hidden(2))
    assert len(node.hears(ORIGIN, Replay(key=KEY, branch=1, route=1, start=0, stop=4))) == 1
    # A result of the branch before, which the worker had under way, is no longer kept.
    node.computed(a_step(KEY, 4), hidden(2))
    only_failure(
        node.hears(ORIGIN, Replay(key=KEY, branch=1, route=1, start=4, stop=6)), ORIGIN, "journal_gone"
    )


def test_a_hop_that_catches_up_keeps_results_to_itself_until_the_next_branch() -> None:
    node = Node()
    node.opened(catch_up=True)
    step = a_step(KEY, 0)
    node.hears(BEFORE, step, hidden(2))
    credit = Credit(key=KEY, branch=0, route=1, stop=2)
    assert node.computed(step, hidden(2)) == [(ORIGIN.peer_id, credit)]
    live = a_step(KEY, 2, branch=1, truncate_to=2)
    node.hears(BEFORE, live, hidden(2))
    ((peer, _),) = node.computed(live, hidden(2))
    assert peer == AFTER.peer_id
    assert len(node.hears(ORIGIN, Replay(key=KEY, branch=1, route=1, start=0, stop=4))) == 1


def test_journals_stay_within_their_bytes_and_end_with_their_hops() -> None:
    book = JournalBook(max_bytes=3 * (2 * HIDDEN * 4 + ENTRY_BYTES))
    other = HopKey(ORIGIN.peer_id, "t", 9)
    for start in (0, 2):
        book.keep(KEY, a_step(KEY, start), hidden(2))
    book.keep(other, a_step(other, 0), hidden(2))
    assert book.bytes == book.max_bytes
    book.read(KEY, 0, 4)  # now the other one is the longest unused
    book.keep(KEY, a_step(KEY, 4), hidden(2))
    assert book.bytes == book.max_bytes
    with pytest.raises(JournalGone):
        book.read(other, 0, 2)
    book.keep(KEY, a_step(KEY, 6), hidden(2))  # it alone is too much: what it had goes
    with pytest.raises(JournalGone, match="there are 8 to 7"):
        book.read(KEY, 0, 2)
    book.keep(KEY, a_step(KEY, 8), hidden(2))
    assert book.read(KEY, 8, 10).digest_end == DIGESTS.at(10)
    book.truncate(KEY, 8)
    book.drop(KEY)
    book.drop(other)
    assert (book.bytes, len(book)) == (0, 0)


def test_a_hop_that_ends_as_its_result_is_sent_leaves_no_journal() -> None:
    node = Node()
    node.opened()
    step = a_step(KEY, 0)
    node.hears(BEFORE, step, hidden(2))
    post = node._post

    def lost(peer: str, frame: Frame, left: Callable[[], None] | None = None, /) -> bool:
        node.server.on_peer_down(ORIGIN.peer_id)  # the connection broke at this write
        return post(peer, frame, left)

    object.__setattr__(node.server._host, "post", lost)
    node.computed(step, hidden(2))
    assert (len(node.server.hops), len(node.server.journals), node.server.journals.bytes) == (0, 0, 0)


def test_a_closed_hop_leaves_no_journal() -> None:
    node = Node()
    node.opened()
    with_results(node)
    assert node.server.journals.bytes > 0
    node.hears(ORIGIN, CloseHop(key=KEY))
    assert (node.server.journals.bytes, len(node.server.journals)) == (0, 0)
