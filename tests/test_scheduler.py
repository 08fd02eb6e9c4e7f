"""The worker's scheduler: order within a hop, who comes first, and turns between hops and origins."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import structs

from dgnd.wire.messages import (
    Cancel,
    CloseHop,
    EndTurn,
    Frame,
    History,
    HopKey,
    OpenSequence,
    Sampling,
    StepFrame,
)
from dgnd.worker.scheduler import SMALL_IN_A_ROW, Scheduler, kind_of


def key(origin: str, hop: int = 0) -> HopKey:
    return HopKey(origin, "s", hop)


def step(of: HopKey, start: int = 0, count: int = 1, sample: bool = True) -> Frame:
    more: dict[str, Any] = {"digest_start": 0, "digest_end": 0, "sample": Sampling() if sample else None}
    return Frame(StepFrame(key=of, branch=0, route=1, start=start, count=count, **more))


def decode(of: HopKey, start: int = 0) -> Frame:
    return step(of, start)


def chunk(of: HopKey, start: int = 0) -> Frame:
    return step(of, start, 128, sample=False)


def alone(frame: Frame) -> Frame:
    assert isinstance(frame.message, StepFrame)
    return Frame(structs.replace(frame.message, alone=True), frame.payload)


def opening(of: HopKey) -> Frame:
    return Frame(OpenSequence(key=of, span="0", max_positions=9))


def history(of: HopKey, start: int = 0) -> Frame:
    return Frame(History(key=of, branch=0, start=start, answer_start=0))


def cancel(of: HopKey) -> Frame:
    return Frame(Cancel(key=of, branch=0))


def close(of: HopKey) -> Frame:
    return Frame(CloseHop(key=of))


def filled(*frames: Frame, max_batch: int = 32, last: HopKey | None = None) -> Scheduler:
    """`last`: a hop that has the head."""
    scheduler = Scheduler(max_batch)
    if last is not None:
        scheduler.put(last, Frame(OpenSequence(key=last, span="3,head", max_positions=9)))
        scheduler.take()
    for frame in frames:
        scheduler.put(frame.message.key, frame)  # type: ignore[union-attr]
    return scheduler


def drained(scheduler: Scheduler, budget: int = 128) -> list[list[Frame]]:
    batches = []
    while batch := scheduler.take(budget):
        batches.append(batch)
    assert len(scheduler) == 0
    return batches


A, A2, B, C = key("a"), key("a", 1), key("b"), key("c")


def test_nothing_waits_at_first() -> None:
    assert Scheduler().take() == []
    assert len(Scheduler()) == 0


def test_a_short_prompt_of_one_position_is_decoded_and_a_chunk_without_sample_is_none() -> None:
    kinds = [kind_of(frame) for frame in (decode(A), step(A, sample=False), step(A, count=2), opening(A))]
    assert kinds == ["decode", "chunk", "chunk", "small"]


def test_decode_steps_go_first_and_together() -> None:
    batches = drained(filled(chunk(A), decode(B), chunk(A2), decode(C)))
    assert batches == [[decode(B), decode(C)], [chunk(A)], [chunk(A2)]]


def test_chunks_share_a_batch_while_the_budget_lasts() -> None:
    frames = [chunk(A), chunk(A2), chunk(B)]
    assert drained(filled(*frames), 256) == [[chunk(A), chunk(B)], [chunk(A2)]]
    assert drained(filled(*frames), 255) == [[chunk(A)], [chunk(B)], [chunk(A2)]]


def test_who_decodes_waits_for_one_chunk_and_is_not_computed_beside_one() -> None:
    frames = [decode(C), chunk(A), chunk(A2), chunk(B)]
    assert drained(filled(*frames), 512) == [[decode(C)], [chunk(A)], [chunk(B)], [chunk(A2)]]


def test_what_is_short_of_a_prompt_goes_with_the_decode_steps() -> None:
    short, shorter = step(A, count=20), step(A2, count=12)
    assert drained(filled(decode(C), short, shorter, chunk(B))) == [[decode(C), short], [chunk(B)], [shorter]]


def test_chunks_of_a_last_hop_that_follow_each_other_go_together() -> None:
    prompt = [chunk(A, start) for start in range(0, 768, 128)]
    last = step(A, 768, 5)
    alone = drained(filled(*prompt, last, last=A))  # and so with the budget four times
    assert alone == [prompt[:4], [*prompt[4:], last]]
    assert drained(filled(*prompt, last, chunk(B), last=A), 256)[0] == [prompt[0], chunk(B)]


def test_chunks_that_another_hop_waits_for_go_one_by_one() -> None:
    prompt = [chunk(A, start) for start in range(0, 512, 128)]
    assert drained(filled(*prompt)) == [[frame] for frame in prompt]


def test_what_does_not_follow_is_not_joined() -> None:
    turned = step(A, 128, 5)
    assert drained(filled(turned, chunk(A, 133), last=A)) == [
        [turned],
        [chunk(A, 133)],
    ]  # a token was asked for
    rolled_back = Frame(structs.replace(chunk(A, 128).message, truncate_to=128))
    assert drained(filled(chunk(A), rolled_back, last=A)) == [[chunk(A)], [rolled_back]]
    rerouted = Frame(structs.replace(chunk(A, 128).message, route=2))
    assert drained(filled(chunk(A), rerouted, last=A)) == [[chunk(A)], [rerouted]]
    assert drained(filled(chunk(A), chunk(A, 256), last=A)) == [[chunk(A)], [chunk(A, 256)]]


def test_a_hop_gives_a_decode_step_or_chunks_to_a_batch() -> None:
    assert drained(filled(decode(A), chunk(A, 1), decode(B))) == [[decode(A), decode(B)], [chunk(A, 1)]]


def test_one_hop_gives_one_step_to_a_batch() -> None:
    batches = drained(filled(decode(A, 0), decode(A, 1), decode(B)))
    assert batches == [[decode(A, 0), decode(B)], [decode(A, 1)]]


def test_what_opens_a_hop_is_done_before_its_steps_and_before_other_chunks() -> None:
    batches = drained(filled(chunk(B), opening(A), chunk(A)))
    assert batches == [[opening(A)], [chunk(B)], [chunk(A)]]


def test_a_step_that_is_to_be_alone_is_and_holds_up_nobody() -> None:
    a, b, c, d = (key(name) for name in "abcd")
    outcast = alone(decode(b))
    assert drained(filled(decode(a), outcast, decode(c))) == [[decode(a), decode(c)], [outcast]]
    outcast = alone(chunk(d))
    assert drained(filled(outcast, chunk(a), decode(c))) == [[decode(c)], [outcast], [chunk(a)]]
    outcasts = [alone(chunk(d)), alone(chunk(d, 128))]
    assert drained(filled(*outcasts), budget=512) == [[outcasts[0]], [outcasts[1]]]


def test_a_batch_is_bounded_and_takes_from_every_origin() -> None:
    many = [decode(key("greedy", hop)) for hop in range(6)]
    scheduler = filled(*many, decode(B), max_batch=4)
    first, second = drained(scheduler)
    assert first == [many[0], decode(B), many[1], many[2]]
    assert second == many[3:]


def test_chunks_of_many_hops_of_one_origin_do_not_hold_up_another() -> None:
    greedy = [chunk(key("greedy", hop), start) for hop in range(3) for start in (0, 128)]
    order = [batch[0] for batch in drained(filled(*greedy, chunk(B)))]
    assert order.index(chunk(B)) <= 1
    hops = [frame.message.key.hop for frame in order if frame != chunk(B)]  # type: ignore[union-attr]
    assert hops == [0, 1, 2, 0, 1, 2]


def test_neither_decode_steps_nor_chunks_wait_for_the_other() -> None:
    scheduler = filled(*(chunk(A, start) for start in range(0, 1280, 64)))
    for round_ in range(10):
        scheduler.put(B, decode(B, round_))
        assert scheduler.take(128) == [decode(B, round_)]
        scheduler.put(B, decode(B, round_ + 1))
        assert scheduler.take(128) == [chunk(A, 128 * round_)]
        assert scheduler.take(128) == [decode(B, round_ + 1)]
        assert scheduler.take(128) == [chunk(A, 128 * round_ + 64)]


def test_who_decodes_keeps_its_turn_for_chunks() -> None:
    """Origin a has an answer and a prompt under way, b only prompts."""
    scheduler = filled(chunk(A), *(chunk(B, start) for start in range(0, 1280, 128)))
    taken: Counter[str] = Counter()
    for position in range(8):
        scheduler.put(A2, decode(A2, position))
        for frame in scheduler.take(128):
            if kind_of(frame) == "chunk":
                taken[frame.message.key.origin] += 1  # type: ignore[union-attr]
        if taken["a"]:
            break
    assert taken == {"a": 1} or taken == {"a": 1, "b": 1}


def test_a_batch_is_gathered_when_the_hops_of_the_last_one_are_back() -> None:
    first, second, third = key("a"), key("a", 1), key("b")
    scheduler = filled(decode(first))
    assert scheduler.is_gathered()  # nobody is expected yet
    for hop in (second, third):
        scheduler.put(hop, decode(hop))
    assert len(scheduler.take()) == 3
    for hop in (third, first):
        scheduler.put(hop, decode(hop, 1))
        assert not scheduler.is_gathered()
    scheduler.put(second, decode(second, 1))
    assert scheduler.is_gathered()
    scheduler.take()
    scheduler.put(first, decode(first, 2))
    scheduler.take()  # the others took too long: they are not waited for again
    scheduler.put(first, decode(first, 3))
    assert scheduler.is_gathered()


@pytest.mark.parametrize("end", [CloseHop, EndTurn, Cancel])
def test_a_hop_that_ended_is_not_waited_for(end: type[CloseHop] | type[EndTurn] | type[Cancel]) -> None:
    first, second = key("a"), key("b")
    scheduler = filled(decode(first), decode(second))
    assert len(scheduler.take()) == 2
    scheduler.put(first, decode(first, 1))
    assert not scheduler.is_gathered()
    keywords = {} if end is CloseHop else {"branch": 0}
    scheduler.put(second, Frame(end(key=second, **keywords)))
    scheduler.take()  # the word of the end
    assert scheduler.is_gathered()


def test_a_flood_of_small_frames_lets_steps_pass() -> None:
    scheduler = filled(decode(B), chunk(C))
    waited = []
    for number in range(4 * SMALL_IN_A_ROW):
        for part in range(2):
            scheduler.put(A, history(A, 2 * number + part))
        batch = scheduler.take(128)
        if batch[0].message.key != A:  # type: ignore[union-attr]
            waited.append((number, batch))
    assert [batch for _, batch in waited] == [[decode(B)], [chunk(C)]]
    assert waited[-1][0] <= 2 * (SMALL_IN_A_ROW + 1)


def test_a_cancel_drops_the_steps_of_its_hop_alone() -> None:
    scheduler = filled(history(A), chunk(A), chunk(B), decode(A2), cancel(A), chunk(A, 128))
    batches = drained(scheduler)
    assert batches[:2] == [[history(A)], [cancel(A)]]
    assert batches[2:] in (
        [[decode(A2)], [chunk(B)], [chunk(A, 128)]],
        [[decode(A2)], [chunk(A, 128)], [chunk(B)]],
    )


def test_a_close_drops_the_steps_and_leaves_nothing_behind() -> None:
    scheduler = filled(chunk(A), chunk(A, 128), close(A), opening(A))
    assert drained(scheduler) == [[close(A)], [opening(A)]]
    scheduler.put(A, chunk(A))
    assert drained(scheduler) == [[chunk(A)]]


class AgainstANaiveModel(RuleBasedStateMachine):
    """Lists of frames by hop; every take is judged by what it should never be."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_batch=3)
        self.waiting: dict[HopKey, list[Frame]] = {}
        self.position = 0
        self.turn = "decode"
        self.passed: dict[HopKey, Counter[HopKey]] = {}  # others' chunks taken while its own was first

    def _put(self, of: HopKey, frame: Frame) -> None:
        queue = self.waiting.setdefault(of, [])
        if isinstance(frame.message, Cancel | CloseHop):
            queue[:] = [other for other in queue if not isinstance(other.message, StepFrame)]
        queue.append(frame)
        self.scheduler.put(of, frame)

    hops = st.builds(key, st.sampled_from("abc"), st.integers(0, 2))

    @rule(of=hops, make=st.sampled_from([decode, chunk, history]))
    def put(self, of: HopKey, make: Any) -> None:
        self.position += 1
        self._put(of, make(of, self.position))

    @rule(of=hops, make=st.sampled_from([cancel, close, opening]))
    def put_control(self, of: HopKey, make: Any) -> None:
        self._put(of, make(of))

    @rule(times=st.integers(1, 4))
    def take(self, times: int) -> None:
        for _ in range(times):
            self._take()

    def _take(self) -> None:
        heads = {of: queue[0] for of, queue in self.waiting.items() if queue}
        batch = self.scheduler.take(128)
        keys: list[HopKey] = [frame.message.key for frame in batch]  # type: ignore[union-attr]
        assert len(set(keys)) == len(keys)
        assert [heads[of] for of in keys] == batch  # the oldest of each hop
        assert bool(batch) == bool(heads)
        kinds = [kind_of(frame) for frame in batch]
        waiting_chunks = {of for of, head in heads.items() if kind_of(head) == "chunk"}
        if "small" not in kinds:
            ready = sum(kind_of(head) == "decode" for head in heads.values())
            assert kinds in (["decode"] * min(3, ready), ["chunk"] * min(1, len(waiting_chunks)))
            if ready and waiting_chunks:
                assert kinds[0] == self.turn
            if kinds:
                self.turn = "chunk" if kinds[0] == "decode" and waiting_chunks else "decode"
        if "chunk" in kinds:
            taken = keys[-1]
            self.passed.pop(taken, None)
            for of in waiting_chunks - {taken}:
                self.passed.setdefault(of, Counter())[taken] += 1
                same = {hop for hop in self.passed[of] if hop.origin == of.origin}
                # One of another hop; and of another origin, as many as its own hops are ahead.
                assert all(self.passed[of][hop] <= 1 for hop in same)
                for origin in {hop.origin for hop in self.passed[of]} - {of.origin}:
                    theirs = sum(n for hop, n in self.passed[of].items() if hop.origin == origin)
                    assert theirs <= 1 + len(same)
        for of in keys:
            self.waiting[of].pop(0)
        still = {of for of, queue in self.waiting.items() if queue and kind_of(queue[0]) == "chunk"}
        self.passed = {of: count for of, count in self.passed.items() if of in still}

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.scheduler) == sum(map(len, self.waiting.values()))
        # A cancel may take away the chunk that was first, and with it the count of those before it.
        still = {of for of, queue in self.waiting.items() if queue and kind_of(queue[0]) == "chunk"}
        self.passed = {of: count for of, count in self.passed.items() if of in still}


TestAgainstANaiveModel = AgainstANaiveModel.TestCase
TestAgainstANaiveModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@given(st.permutations([A, A2, B, C]), st.integers(1, 5))
def test_everything_put_comes_out_once_and_in_order(order: list[HopKey], each: int) -> None:
    frames = [decode(of, position) for position in range(each) for of in order]
    taken = [frame for batch in drained(filled(*frames)) for frame in batch]
    for of in order:
        mine = [frame.message.start for frame in taken if frame.message.key == of]  # type: ignore[union-attr]
        assert mine == list(range(each))
