"""The fence: each line of its table, and a hop under every kind of late, repeated and foreign frame."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dgnd.errors import DgnError, NotYet, PositionGap, ProtocolError, StalePrefix
from dgnd.wire.digest import PrefixDigests
from dgnd.wire.fencing import Admit, AlreadyHave, Compute, Drop, HopFence, Reject
from dgnd.wire.messages import HopKey, StepFrame

KEY = HopKey("origin", "s", 1)
ROUTE = 4
BRANCH = 2


def _digests(ids: list[int], key: bytes = b"the key of this session") -> PrefixDigests:
    digests = PrefixDigests(key)
    digests.extend(ids)
    return digests


IDS = _digests(list(range(100)))
OTHER_IDS = _digests([0, 1, 2, 99, *range(4, 100)])


def _step(start: int, stop: int, *, ids: PrefixDigests = IDS, branch: int = BRANCH, **more: Any) -> StepFrame:
    values: dict[str, Any] = {
        "route": ROUTE,
        "digest_start": ids.at(start),
        "digest_end": ids.at(stop),
        **more,
    }
    return StepFrame(key=KEY, branch=branch, start=start, count=stop - start, **values)


def _fence(*steps: StepFrame, credits: int = 100) -> HopFence:
    fence = HopFence(branch=BRANCH, route=ROUTE, credits=credits)
    for step in steps:
        assert isinstance(fence.admit(step), Compute)
    return fence


def _hop() -> HopFence:
    """A hop of length 10 with boundaries 0, 4, 8, 10."""
    return _fence(_step(0, 4), _step(4, 8), _step(8, 10))


def _error(verdict: Admit) -> DgnError:
    assert isinstance(verdict, Reject)
    return verdict.error


REFUSED: dict[str, tuple[StepFrame, type[DgnError], int | None]] = {
    "start beyond the length": (_step(11, 12), PositionGap, 10),
    "far beyond": (_step(50, 60), PositionGap, 10),
    "another prefix at the end": (_step(10, 11, ids=OTHER_IDS), StalePrefix, None),
    "another prefix at a boundary": (_step(4, 8, ids=OTHER_IDS), StalePrefix, None),
    "another prefix, overlapping": (_step(8, 12, ids=OTHER_IDS), StalePrefix, None),
    "another prefix at its end": (_step(5, 8, ids=OTHER_IDS), StalePrefix, None),
    "another key at 0": (
        _step(0, 4, ids=_digests(list(range(100)), b"another session's")),
        StalePrefix,
        None,
    ),
    "an overlap that can't be checked": (_step(9, 12), PositionGap, 10),
    "a higher route": (_step(10, 11, route=ROUTE + 1), NotYet, None),
    "a higher route and branch": (_step(8, 11, branch=9, route=9, truncate_to=8), NotYet, None),
    "a new branch without truncate_to": (_step(10, 11, branch=3), NotYet, None),
    "a new branch beyond the length": (_step(11, 12, branch=3, truncate_to=11), PositionGap, 10),
    "a new branch at no boundary": (_step(7, 9, branch=3, truncate_to=7), PositionGap, 4),
    "a new branch just below a boundary": (_step(9, 12, branch=3, truncate_to=9), PositionGap, 8),
    "a new branch with a gap": (_step(8, 10, branch=3, truncate_to=4), PositionGap, 4),
    "a new branch of other ids": (_step(8, 12, ids=OTHER_IDS, branch=3, truncate_to=8), StalePrefix, None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_frame_changes_nothing(what: str) -> None:
    step, kind, expected = REFUSED[what]
    fence = _hop()
    error = _error(fence.admit(step))
    assert type(error) is kind
    if expected is not None:
        assert error.data["expected"] == expected
    assert "\n" not in error.message
    assert (fence.length, fence.branch, fence.route, fence.under_way) == (10, BRANCH, ROUTE, 3)
    assert fence.admit(_step(10, 11)) == Compute(_step(10, 11))


LATE = {
    "a lower branch": _step(10, 11, branch=1),
    "a lower branch that would truncate": _step(4, 11, branch=1, truncate_to=4),
    "a lower route": _step(10, 11, route=ROUTE - 1),
    "a lower route of a higher branch": _step(8, 11, branch=5, route=ROUTE - 1, truncate_to=8),
}


@pytest.mark.parametrize("what", LATE)
def test_a_late_frame_is_dropped(what: str) -> None:
    fence = _hop()
    assert isinstance(fence.admit(LATE[what]), Drop)
    assert (fence.length, fence.branch) == (10, BRANCH)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (0, 10), (4, 8), (3, 5), (9, 10), (0, 1)])
def test_what_is_there_is_acknowledged_and_ignored(start: int, stop: int) -> None:
    fence = _hop()
    assert fence.admit(_step(start, stop)) == AlreadyHave()
    assert (fence.length, fence.under_way) == (10, 3)


@pytest.mark.parametrize("start", [0, 4, 8])
def test_an_overlap_is_trimmed(start: int) -> None:
    fence = _hop()
    assert fence.admit(_step(start, 13)) == Compute(_step(10, 13), skip=10 - start)
    assert fence.length == 13
    assert fence.admit(_step(13, 14)) == Compute(_step(13, 14))


@pytest.mark.parametrize("boundary", [0, 4, 8, 10])
def test_a_new_branch_goes_back_to_a_boundary(boundary: int) -> None:
    fence = _hop()
    ids = _digests([*range(boundary), *range(500, 520)])
    first = _step(boundary, boundary + 3, ids=ids, branch=7, truncate_to=boundary)
    assert fence.admit(first) == Compute(first)
    assert (fence.length, fence.branch) == (boundary + 3, 7)
    assert isinstance(fence.admit(_step(10, 11)), Drop)
    assert fence.admit(first) == AlreadyHave()  # it truncates once
    assert isinstance(fence.admit(_step(boundary + 3, boundary + 5, ids=ids, branch=7)), Compute)


def test_an_overlap_does_not_truncate_again() -> None:
    fence = _hop()
    fence.admit(_step(8, 10, branch=3, truncate_to=8))
    verdict = fence.admit(_step(8, 12, branch=3, truncate_to=8))
    assert verdict == Compute(_step(10, 12, branch=3), skip=2)


def test_the_first_frame_fixes_the_digest_of_the_empty_prefix() -> None:
    other = _digests([1, 2, 3], b"the key of another session")
    fence = _fence(_step(0, 4))
    assert isinstance(_error(fence.admit(_step(0, 3, ids=other, branch=3, truncate_to=0))), StalePrefix)
    assert isinstance(fence.admit(_step(0, 3, branch=3, truncate_to=0)), Compute)


def test_a_fresh_hop_takes_the_first_frame_of_its_ticket_or_of_a_later_branch() -> None:
    assert isinstance(_fence().admit(_step(0, 4)), Compute)
    assert _fence().admit(_step(0, 4, truncate_to=0)) == Compute(_step(0, 4))
    later = _step(0, 4, branch=5, truncate_to=0)
    assert _fence().admit(later) == Compute(later)
    assert _error(_fence().admit(_step(4, 8))).data["expected"] == 0


def test_credits_are_for_frames_not_yet_passed_on() -> None:
    fence = _fence(_step(0, 4), _step(4, 8), credits=2)
    for step in (_step(8, 9), _step(4, 9), _step(4, 9, branch=3, truncate_to=4)):
        assert type(_error(fence.admit(step))) is ProtocolError
    assert (fence.length, fence.branch, fence.under_way) == (8, BRANCH, 2)
    assert fence.admit(_step(0, 4)) == AlreadyHave()  # costs nothing
    fence.passed_on(4)
    assert fence.under_way == 1
    assert isinstance(fence.admit(_step(8, 9)), Compute)
    fence.passed_on(9)
    assert fence.under_way == 0
    fence.passed_on(9)  # told twice
    assert fence.under_way == 0


def test_no_frame_is_accepted_before_credits_are_granted() -> None:
    fence = _fence(credits=0)
    assert type(_error(fence.admit(_step(0, 1)))) is ProtocolError
    fence.grant(1)
    assert isinstance(fence.admit(_step(0, 1)), Compute)


@pytest.mark.parametrize(
    ("kv_length", "length"), [(10, 10), (99, 10), (9, 8), (8, 8), (5, 4), (3, 0), (0, 0)]
)
def test_a_cancelled_hop_ends_at_a_boundary_and_goes_on_with_a_new_branch(
    kv_length: int, length: int
) -> None:
    fence = _hop()
    fence.cancel(BRANCH)
    assert isinstance(fence.admit(_step(10, 11)), Drop)
    early = _step(length, length + 1, branch=3, truncate_to=length)
    assert isinstance(_error(fence.admit(early)), NotYet)
    assert fence.cancelled(kv_length) == length
    assert (fence.length, fence.under_way) == (length, 0)
    assert isinstance(fence.admit(_step(length, length + 1)), Drop)
    assert fence.admit(early) == Compute(early)


def test_a_cancel_may_overtake_the_branch_that_it_is_for() -> None:
    fence = _hop()
    fence.cancel(5)
    assert fence.cancelled(10) == 10
    assert isinstance(fence.admit(_step(8, 11, branch=5, truncate_to=8)), Drop)
    assert isinstance(fence.admit(_step(8, 11, branch=6, truncate_to=8)), Compute)


def test_a_digest_of_0_is_one_as_any_other() -> None:
    fence = _fence(_step(0, 4, digest_end=0))
    assert isinstance(_error(fence.admit(_step(4, 5))), StalePrefix)
    assert isinstance(fence.admit(_step(4, 5, digest_start=0)), Compute)


class HopUnderFire(RuleBasedStateMachine):
    """An origin that edits its text, a network that delays and repeats, another session: what is in the KV?

    The model is as naive as can be: the KV is the list of token ids of the rows computed. It must always be
    what the origin's text was in the hop's branch.
    """

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.branch = 0
        self.texts: dict[int, list[int]] = {0: []}
        self.digests = PrefixDigests(b"the key of this session")
        self.fence = HopFence(branch=0, route=0, credits=3)
        self.kv: list[int] = []
        self.working: list[int] = []  # stops of frames in the worker
        self.sent: list[tuple[StepFrame, list[int]]] = []
        self.settling = False

    def _deliver(self, step: StepFrame, rows: list[int]) -> Admit:
        before = (self.fence.length, self.fence.branch, self.fence.under_way)
        verdict = self.fence.admit(step)
        if isinstance(verdict, Compute):
            done = verdict.step
            if done.truncate_to is not None:
                del self.kv[done.truncate_to :]
            assert done.start == len(self.kv)
            self.kv += rows[verdict.skip :]
            assert done.count == len(rows) - verdict.skip
            self.working.append(done.stop)
        else:
            assert (self.fence.length, self.fence.branch, self.fence.under_way) == before
        return verdict

    def _send(self, start: int, stop: int, truncate_to: int | None) -> Admit:
        step = StepFrame(
            key=KEY, branch=self.branch, route=0, start=start, count=stop - start, truncate_to=truncate_to,
            digest_start=self.digests.at(start), digest_end=self.digests.at(stop),
        )  # fmt: skip
        rows = list(self.texts[self.branch][start:stop])
        self.sent.append((step, rows))
        return self._deliver(step, rows)

    def _write(self, count: int) -> None:
        ids = [self.random.randrange(3) for _ in range(count)]
        self.texts[self.branch] += ids
        self.digests.extend(ids)

    def _new_branch(self, keep: int) -> None:
        text = self.texts[self.branch][:keep]
        self.branch += 1
        self.texts[self.branch] = text
        self.digests.truncate(keep)

    @rule(count=st.integers(1, 5), lost=st.booleans())
    def go_on(self, count: int, lost: bool) -> None:
        """The next chunk; or the origin believes that it came, and it did not."""
        start = len(self.texts[self.branch])
        self._write(count)
        if not lost:
            self._send(start, start + count, None)

    @rule(keep=st.integers(0, 40), count=st.integers(1, 5), lost=st.booleans())
    def edit(self, keep: int, count: int, lost: bool) -> None:
        """A rollback to where the origin thinks it can go, and the first frame of the new branch."""
        keep = min(keep, len(self.texts[self.branch]))
        self._new_branch(keep)
        self._write(count)
        if not lost:
            self._send(keep, keep + count, keep)

    @rule()
    def follow_the_advice(self) -> None:
        """Sends from where the hop says, as often as it says so: that must come to an end."""
        text = self.texts[self.branch]
        if self.settling or not text:
            return
        while self.working:
            self._pass_on()
        if self.fence.branch != self.branch:
            keep = 0
            for _ in range(3):
                verdict = self._send(keep, len(text), keep) if keep < len(text) else AlreadyHave()
                if not (isinstance(verdict, Reject) and isinstance(verdict.error, PositionGap)):
                    break
                keep = int(str(verdict.error.data["expected"]))
            return
        verdict = self._send(0, len(text), None)
        assert isinstance(verdict, Compute | AlreadyHave | Drop)
        if not isinstance(verdict, Drop):
            assert self.kv[: len(text)] == text

    @rule(pick=st.integers(0, 2**16))
    @precondition(lambda self: self.sent)
    def repeat(self, pick: int) -> None:
        """The network brings an old frame again."""
        self._deliver(*self.sent[pick % len(self.sent)])

    @rule(pick=st.integers(0, 2**16), cut=st.integers(1, 6))
    def resend_other_chunks(self, pick: int, cut: int) -> None:
        """A replay of the same text need not be cut as it was."""
        text = self.texts[self.branch]
        if text:
            start = pick % len(text)
            self._send(start, min(start + cut, len(text)), None)

    @rule(pick=st.integers(0, 2**16), cut=st.integers(1, 6), foreign=st.booleans(), fresh=st.booleans())
    def send_what_is_stale(self, pick: int, cut: int, foreign: bool, fresh: bool) -> None:
        """Rows computed after another prefix, or in another session, under the numbers of this branch."""
        text = self.texts[self.branch]
        start = min(pick % (len(text) + 1), self.fence.length)
        if not start:
            return  # rows at position 0 follow no prefix
        wrong = [9, *text[1:start]]
        digests = PrefixDigests(b"the key of another one." if foreign else b"the key of this session")
        digests.extend(wrong)
        rows = [8] * cut
        digests.extend(rows)
        step = StepFrame(
            key=KEY, branch=self.fence.branch + fresh, route=0, start=start, count=cut,
            truncate_to=start if fresh else None,
            digest_start=digests.at(start), digest_end=digests.at(start + cut),
        )  # fmt: skip
        assert not isinstance(self._deliver(step, rows), Compute)

    @rule()
    @precondition(lambda self: self.working)
    def _pass_on(self) -> None:
        self.fence.passed_on(self.working.pop(0))

    @rule(lost=st.integers(0, 3))
    @precondition(lambda self: not self.settling)
    def cancel(self, lost: int) -> None:
        """The origin cancels; the worker gives up up to `lost` frames that wait."""
        self.fence.cancel(self.branch)
        self.settling = True
        given_up = min(lost, len(self.working))
        waiting = self.working[len(self.working) - given_up :]
        self.working.clear()
        if waiting:
            del self.kv[max(0, min(waiting) - self.random.randrange(1, 4)) :]

    @rule(count=st.integers(1, 5))
    @precondition(lambda self: self.settling)
    def settle(self, count: int) -> None:
        """The worker answers; the next turn begins where the hop ends, and is accepted."""
        length = self.fence.cancelled(len(self.kv))
        assert length <= len(self.kv)
        del self.kv[length:]
        self.settling = False
        keep = min(length, len(self.texts[self.branch]))
        if keep == length and self.kv == self.texts[self.branch][:keep]:
            self._new_branch(keep)
            self._write(count)
            assert isinstance(self._send(keep, keep + count, keep), Compute)

    @invariant()
    def the_kv_is_of_the_branch(self) -> None:
        if not hasattr(self, "fence") or self.settling:
            return
        assert self.fence.length == len(self.kv)
        assert self.kv == self.texts[self.fence.branch][: len(self.kv)]
        assert self.fence.under_way == len(self.working) <= 3


HopUnderFire.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHopUnderFire = HopUnderFire.TestCase
