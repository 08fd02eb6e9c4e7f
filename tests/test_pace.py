"""The worker's batches in time: a fake machine, a virtual clock, the real scheduler and pace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from dgnd.wire.messages import Frame, HopKey, OpenSequence, Sampling, StepFrame
from dgnd.worker.joined import positions
from dgnd.worker.pace import LEAST, MOST, Pace
from dgnd.worker.scheduler import ALONE_TIMES, Scheduler, kind_of

CHUNK = 128


def step(of: HopKey, start: int, count: int) -> Frame:
    more: dict[str, Any] = {"digest_start": 0, "digest_end": 0, "sample": Sampling() if count == 1 else None}
    return Frame(StepFrame(key=of, branch=0, route=1, start=start, count=count, **more))


@dataclass
class Machine:
    """Takes `fixed_s` for a batch and `position_s` for each of its positions."""

    fixed_s: float
    position_s: float
    scheduler: Scheduler = field(default_factory=Scheduler)
    pace: Pace = field(default_factory=Pace)
    now: float = 0.0

    def put(self, frame: Frame) -> None:
        assert isinstance(frame.message, StepFrame)
        self.scheduler.put(frame.message.key, frame)

    def open(self, hop: HopKey) -> None:
        """A hop with the head."""
        opening = Frame(OpenSequence(key=hop, span="embed,0-1,head", max_positions=10_000))
        self.scheduler.put(hop, opening)
        assert self.scheduler.take() == [opening]

    def run(self) -> list[Frame]:
        batch = self.scheduler.take(self.pace.budget)
        took = self.fixed_s + self.position_s * positions(batch)
        self.now += took
        self.pace.observe(positions(batch), took)
        return batch


@pytest.mark.parametrize("per_s", [20, 200, 2_000, 20_000])
def test_no_decode_step_waits_longer_than_one_chunk(per_s: int) -> None:
    """Two origins send long prompts, one of them many; a third decodes all the while."""
    machine = Machine(0.001, 1 / per_s)
    for hop in [*(HopKey("greedy", "s", hop) for hop in range(3)), HopKey("b", "s", 0)]:
        machine.open(hop)
    for hop in range(3):
        for start in range(0, 40 * CHUNK, CHUNK):
            machine.put(step(HopKey("greedy", "s", hop), start, CHUNK))
    for start in range(0, 40 * CHUNK, CHUNK):
        machine.put(step(HopKey("b", "s", 0), start, CHUNK))
    talker, longest, taken = HopKey("talker", "s", 0), 0.0, {"greedy": 0, "b": 0}
    machine.put(step(talker, 0, 1))
    for position in range(1, 30):
        asked = machine.now
        while step(talker, position - 1, 1) not in (batch := machine.run()):
            for frame in batch:
                assert isinstance(frame.message, StepFrame)
                taken[frame.message.key.origin] += 1
        longest = max(longest, machine.now - asked)
        machine.put(step(talker, position, 1))
    assert longest <= (CHUNK + 1) / per_s + 0.01
    assert abs(taken["greedy"] - taken["b"]) <= 1  # each origin has half
    assert min(taken.values()) >= 14


def test_a_lone_prompt_takes_larger_bites_and_stops_when_somebody_comes() -> None:
    machine = Machine(0.0, 1 / 256)
    machine.open(HopKey("a", "s", 0))
    for start in range(0, 20 * CHUNK, CHUNK):
        machine.put(step(HopKey("a", "s", 0), start, CHUNK))
    machine.run()
    assert machine.pace.budget == CHUNK
    assert positions(machine.run()) == ALONE_TIMES * CHUNK
    machine.put(step(HopKey("b", "s", 0), 0, 1))
    assert [kind_of(frame) for frame in machine.run()] == ["decode"]
    assert positions(machine.run()) == CHUNK  # b may be back at any time


def test_the_budget_follows_the_machine_and_is_bounded() -> None:
    pace = Pace(target_s=1.0)
    assert pace.budget == LEAST
    pace.observe(1, 10.0)  # a decode step says nothing
    assert pace.budget == LEAST
    pace.observe(100, 1.0)
    assert pace.budget == 100
    budgets = []
    for _ in range(20):
        pace.observe(400, 1.0)
        budgets.append(pace.budget)
    assert budgets == sorted(budgets)
    assert budgets[0] < 250
    assert budgets[-1] > 395
    for _ in range(20):
        pace.observe(100_000, 1.0)
    assert pace.budget == MOST
    for _ in range(40):
        pace.observe(16, 60.0)
    assert pace.budget == LEAST


def test_a_batch_waits_for_others_a_small_part_of_what_it_takes() -> None:
    pace = Pace()
    assert pace.patience_s == 0
    pace.observe(1, 0.05)
    assert 0 < pace.patience_s < 0.005
    assert pace.patience_s < pace.all_patience_s < 0.02
