"""The origin's session against real fences: what it sends is admitted, and hops hold just its token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dgn_backends.span import Span
from dgnd.sessions.driver_host import hop_ids
from dgnd.sessions.session import LEAST_CHUNK, OriginSession, RouteHop, chunk_for
from dgnd.wire.fencing import Compute, Drop, HopFence
from dgnd.wire.messages import Frame, History, Sampling, StepFrame

GREEDY = Sampling()
ROUTE = (RouteHop(1, "p", Span(0, 2, embed=True)), RouteHop(2, "q", Span(2, 4, head=True)))


def opened(tokens: list[int], credits: int = 4) -> OriginSession:
    session = OriginSession("origin", "s", "m")
    session.set_route(ROUTE)
    session.resume(0, credits, new=True)
    session.set_tokens(tokens)
    return session


def steps(session: OriginSession, max_chunk: int = 4) -> list[StepFrame]:
    """Everything that can be sent now."""
    found = []
    while (frame := session.next_step(GREEDY, max_chunk)) is not None:
        assert isinstance(frame.message, StepFrame)
        found.append(frame.message)
    return found


def ranges(frames: list[StepFrame]) -> list[tuple[int, int]]:
    return [(frame.start, frame.stop) for frame in frames]


def test_a_prompt_goes_in_chunks_and_only_the_last_asks_for_a_token() -> None:
    frames = steps(opened(list(range(10))))
    assert ranges(frames) == [(0, 4), (4, 8), (8, 10)]
    assert [frame.sample for frame in frames] == [None, None, GREEDY]
    assert {(frame.branch, frame.route, frame.truncate_to) for frame in frames} == {(0, 1, None)}
    assert [frame.key.hop for frame in frames] == [1, 1, 1]
    assert [a.digest_end for a in frames[:-1]] == [b.digest_start for b in frames[1:]]


@given(st.integers(1, 600), st.integers(2, 140))
def test_no_chunk_leaves_a_single_position_behind_others(length: int, max_chunk: int) -> None:
    frames = steps(opened(list(range(length)), credits=1000), max_chunk)
    assert [p for frame in frames for p in range(frame.start, frame.stop)] == list(range(length))
    assert all(1 <= frame.count <= max_chunk for frame in frames)
    if len(frames) > 1:  # else it could overtake them, as one that is decoded does
        assert frames[-1].count > 1
        assert all(frame.sample is None for frame in frames[:-1])


def test_credits_bound_what_is_under_way() -> None:
    session = opened(list(range(20)), credits=2)
    assert ranges(steps(session)) == [(0, 4), (4, 8)]
    session.credit(4)
    assert ranges(steps(session)) == [(8, 12)]
    assert session.unsent == 8


def test_a_route_begins_without_credits_and_sends_everything_again() -> None:
    session = opened(list(range(4)))
    steps(session)
    session.set_route(ROUTE)
    assert steps(session) == []
    session.resume(0, 4, new=True)
    (again,) = steps(session)
    assert (again.start, again.stop, again.route, again.truncate_to) == (0, 4, 2, None)
    session.drop_route()
    assert session.sent == 0
    assert session.route == ()


def test_a_follow_up_turn_sends_only_what_is_new() -> None:
    session = opened([1, 2, 3])
    steps(session)
    session.append(4)
    steps(session)
    session.set_tokens([1, 2, 3, 4, 5, 6, 7])
    assert session.branch == 0
    assert ranges(steps(session)) == [(4, 7)]


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 99], 8),  # at a border of frames
        ([0, 1, 2, 3, 4, 5, 6, 99], 4),  # within a frame: from its beginning
        ([0, 1, 2, 3], 0),  # a prefix: its last position is computed again, to sample from
        ([0, 1, 2, 3, 4, 5], 4),
        (list(range(10)), 8),  # the same again
        ([7], 0),
    ],
)
def test_changed_ids_begin_a_branch_at_a_boundary(tokens: list[int], start: int) -> None:
    session = opened(list(range(10)))
    steps(session)
    session.credit(10)
    session.set_tokens(tokens)
    first, *rest = steps(session)
    assert (first.branch, first.truncate_to, first.start) == (1, start, start)
    assert all((frame.branch, frame.truncate_to) == (1, None) for frame in rest)
    assert [first, *rest][-1].stop == len(tokens)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=2, max_size=5))
def test_digests_are_equal_where_the_token_ids_before_are(turns: list[list[int]]) -> None:
    session = opened(turns[0], credits=1000)
    seen: dict[int, list[int]] = {}
    for turn in turns:
        session.set_tokens(turn)
        for frame in steps(session):
            for position, digest in ((frame.start, frame.digest_start), (frame.stop, frame.digest_end)):
                assert seen.setdefault(digest, turn[:position]) == turn[:position]
    prefixes = [tuple(prefix) for prefix in seen.values()]
    assert len(set(prefixes)) == len(prefixes)


def test_after_a_cancel_it_goes_on_from_the_shortest_hop() -> None:
    session = opened(list(range(20)), credits=4)
    assert ranges(steps(session)) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    session.hops_stopped_at([12, 8])
    assert session.credits == 4
    session.set_tokens(list(range(12)))
    frames = steps(session)
    assert ranges(frames) == [(8, 12)]
    assert (frames[0].branch, frames[0].truncate_to) == (1, 8)


def test_history_is_all_token_ids_on_a_new_branch() -> None:
    session = opened([5, 6, 7])
    steps(session)
    session.append(8)
    session.begin_branch()
    frame = session.history(3)
    assert frame.message == History(key=session.key(2), branch=1, start=0, answer_start=3)
    assert frame.payload is not None
    assert frame.payload.to_numpy().tolist() == [5, 6, 7, 8]
    (after,) = steps(session)
    assert (after.branch, after.truncate_to, after.start) == (1, 3, 3)


def test_where_states_go_in_q8_stays_whoever_takes_over() -> None:
    hops = [RouteHop(n, peer, Span(n, n + 1)) for n, peer in enumerate("ppqr")]
    session = OriginSession("o", "s", "m")
    session.set_route(tuple(hops))
    session.fix_wire("q8")
    wires = [session.wire_after(hop) for hop in hops]
    assert wires == ["plain", "q8", "q8", "plain"]  # p has two hops, and the last one has nobody after it
    session.set_route(tuple(RouteHop(10 + n, peer, Span(n, n + 1)) for n, peer in enumerate("stss")))
    session.fix_wire("plain")  # the configuration is another one by now
    assert [session.wire_after(hop) for hop in session.route] == wires
    session.drop_route()
    session.set_route(tuple(hops))
    session.fix_wire("plain")
    assert [session.wire_after(hop) for hop in hops] == ["plain"] * 4


def test_two_sessions_have_other_digests_for_the_same_ids() -> None:
    one, two = steps(opened([1, 2])), steps(opened([1, 2]))
    assert one[0].digest_end != two[0].digest_end


def test_a_restarted_origin_gives_higher_hop_ids() -> None:
    """A peer refuses a hop id that is not above the last one of a session's name."""
    before = hop_ids()
    used = [next(before) for _ in range(50)]
    assert used == sorted(set(used))
    for _ in range(20):
        assert next(hop_ids()) > used[0]
    assert used[-1] < 2**63


@dataclass
class HopModel:
    """One hop: a real fence, the token ids that its KV stands for, and frames that wait in it."""

    fence: HopFence
    kv: list[int] = field(default_factory=list)
    queue: list[tuple[StepFrame, list[int]]] = field(default_factory=list)

    def take(self, message: StepFrame, ids: list[int], late: bool = False) -> None:
        """What HopServer and worker do with a frame: fence first, then the queue of the worker."""
        verdict = self.fence.admit(message)
        if late:
            assert isinstance(verdict, Drop), verdict
            return
        assert isinstance(verdict, Compute), verdict
        assert verdict.skip == 0
        self.queue.append((verdict.step, ids))

    def work(self) -> tuple[StepFrame, list[int]]:
        step, ids = self.queue.pop(0)
        if step.truncate_to is not None:
            assert step.truncate_to <= len(self.kv)
            del self.kv[step.truncate_to :]
        assert step.start == len(self.kv), "KV is extended where it ends, or not at all"
        self.kv += ids
        self.fence.passed_on(step.stop)
        return step, ids

    def cancel(self, branch: int) -> int:
        self.fence.cancel(branch)
        self.queue.clear()
        return self.fence.cancelled(len(self.kv))


class AgainstFences(RuleBasedStateMachine):
    """An origin and two or three hops with links in between; every order of events that the driver allows."""

    @initialize(hops=st.integers(2, 3), window=st.integers(1, 3))
    def begin(self, hops: int, window: int) -> None:
        self.n, self.window = hops, window
        self.session = OriginSession("origin", "s", "m")
        self.late: list[tuple[int, StepFrame, list[int]]] = []  # of abandoned branches, still on a link
        self.token = 100
        self._route()
        self.session.set_tokens([1, 2, 3])
        self.answering = True

    def _route(self) -> None:
        session = self.session
        self.links: list[list[tuple[StepFrame, list[int]]]] = [[] for _ in range(self.n)]
        self.late = []
        session.set_route(tuple(RouteHop(i, f"p{i}", Span(i, i + 1)) for i in range(self.n)))
        session.resume(0, self.window, new=True)
        self.hops = [
            HopModel(HopFence(branch=session.branch, route=session.route_number, credits=self.window))
            for _ in range(self.n)
        ]

    def _idle(self) -> bool:
        return not any(self.links) and not any(hop.queue for hop in self.hops)

    @rule()
    def send(self) -> None:
        frame: Frame | None = self.session.next_step(GREEDY, 5) if self.answering else None
        if frame is not None:
            assert isinstance(frame.message, StepFrame)
            assert frame.payload is not None
            self.links[0].append((frame.message, frame.payload.to_numpy().tolist()))

    @rule(hop=st.integers(0, 2))
    def arrive(self, hop: int) -> None:
        if hop < self.n and self.links[hop]:
            self.hops[hop].take(*self.links[hop].pop(0))

    @rule(hop=st.integers(0, 2))
    def work(self, hop: int) -> None:
        if hop >= self.n or not self.hops[hop].queue:
            return
        step, ids = self.hops[hop].work()
        if hop + 1 < self.n:
            self.links[hop + 1].append((step, ids))
            return
        self.session.credit(step.stop)
        if step.sample is not None:
            assert self._idle(), "the token of a turn comes after everything else of it"
            assert step.stop == len(self.session.tokens)
            self.token += 1
            self.session.append(self.token)

    @precondition(lambda self: self.late)
    @rule()
    def a_late_frame_arrives(self) -> None:
        hop, step, ids = self.late.pop(0)
        self.hops[hop].take(step, ids, late=True)

    @rule()
    def the_answer_ends(self) -> None:
        """At a token: everything sent has passed. The next turn may then change ids."""
        if self._idle() and self.session.sent == len(self.session.tokens) - 1:
            self.answering = False

    @rule()
    def cancel(self) -> None:
        if not self.answering:
            return
        self.answering = False
        branch = self.session.branch
        for hop, link in enumerate(self.links):
            self.late += [(hop, step, ids) for step, ids in link]
            link.clear()
        self.session.hops_stopped_at([hop.cancel(branch) for hop in self.hops])

    @rule(keep=st.integers(0, 60), more=st.lists(st.integers(0, 3), max_size=12))
    def turn(self, keep: int, more: list[int]) -> None:
        if not self.answering:
            self.session.set_tokens([*self.session.tokens[:keep], *more] or [9])
            self.answering = True

    @rule(keep=st.integers(0, 60), more=st.lists(st.integers(0, 3), min_size=1, max_size=6))
    def turn_with_penalties(self, keep: int, more: list[int]) -> None:
        if not self.answering:
            self.session.set_tokens([*self.session.tokens[:keep], *more])
            self.session.begin_branch()
            self.answering = True

    @rule()
    def reroute(self) -> None:
        """All hops are lost; others are opened, and everything is computed again."""
        self._route()
        if not self.answering:
            self.session.set_tokens(list(self.session.tokens))
            self.answering = True

    @invariant()
    def hops_hold_the_sessions_ids(self) -> None:
        if not hasattr(self, "hops"):
            return
        session = self.session
        assert 0 <= session.sent <= len(session.tokens)
        assert 0 <= session.credits <= self.window
        for hop in self.hops:
            if hop.fence.branch == session.branch:
                accepted = hop.kv + [i for step, ids in hop.queue for i in ids]
                truncation = next((s.truncate_to for s, _ in hop.queue if s.truncate_to is not None), None)
                if truncation is None:  # the worker has done what the fence admitted
                    # After a cancel the KV may reach beyond the fence's boundary, until the next frame.
                    assert accepted[: hop.fence.length] == session.tokens[: hop.fence.length]
                    assert hop.fence.length <= session.sent

    def teardown(self) -> None:
        """Whatever happened: the session can still be brought to its end, and every hop then has its ids."""
        if not hasattr(self, "hops"):
            return
        while self.late:
            self.a_late_frame_arrives()
        if not self.answering:
            self.turn(1000, [7])
        for _ in range(200):
            if self.session.sent == len(self.session.tokens) and self._idle():
                break
            self.send()
            for hop in range(self.n):
                self.arrive(hop)
                self.work(hop)
            if self._idle() and self.session.sent == len(self.session.tokens) - 1:
                break
        for hop in self.hops:
            assert hop.kv == self.session.tokens[: self.session.sent]
            assert hop.kv == self.session.tokens[:-1]


TestAgainstFences = AgainstFences.TestCase
TestAgainstFences.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_a_frame_of_the_session_can_be_replaced_by_none_that_it_did_not_send() -> None:
    """The digests are keyed: a frame with other ids but the session's positions is refused."""
    session, other = opened([1, 2, 3, 4]), opened([1, 2, 3, 5])
    fence = HopFence(branch=0, route=1, credits=9)
    (first,) = steps(session)
    assert isinstance(fence.admit(first), Compute)
    (foreign,) = steps(other)
    forged: Any = msgspec.structs.replace(foreign, branch=1, truncate_to=0)
    assert not isinstance(fence.admit(forged), Compute)


def test_a_prompt_is_cut_so_that_all_hops_compute_at_once() -> None:
    assert chunk_for(1024, hops=1, most=128) == 128  # nobody waits for the first chunk
    assert chunk_for(1024, hops=4, most=128) == 86
    assert chunk_for(1024, hops=2, most=128) == 128
    assert chunk_for(100, hops=4, most=128) == LEAST_CHUNK
    assert chunk_for(100_000, hops=4, most=128) == 128
    assert chunk_for(1, hops=1, most=16) == 16
