"""Answers with a fault at one frame: at each in turn. None may be lost, and none may differ by a token.

One seed is one cluster; its answers are alike, and the fault comes one frame later each time.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import trio

from dgnd.control import api
from dgnd.wire.messages import Frame, Sampling

from .campaign import LAYOUTS
from .cluster import Log, SimCluster, read_once
from .determinism import run_seeded
from .net import Fault, untouched
from .oracle import right_ids

TOKENS = 12
END_S = 200.0
#: To a frame, or, by a frame's time, to the node or the worker of who sends or receives it.
FAULTS = (*get_args(Fault), "freeze node", "freeze worker")
#: Shorter than any patience, and longer.
_FREEZE_S = (0.2, 12.0)


@dataclass
class Faults:
    """What one seed gave."""

    seed: int
    frames: int = 0  #: of an answer without a fault
    done: Counter[str] = field(default_factory=Counter)  #: by fault
    wrong: list[str] = field(default_factory=list)
    digest: str = ""
    lines: list[str] = field(default_factory=list)
    longest_s: float = 0.0  #: virtual, of one answer


def run_frames(model: Path, seed: int, most: int | None = None, keep: bool = False) -> Faults:
    """A fault at every frame of an answer, or at `most` of them, beginning anywhere."""
    found = Faults(seed)
    rng = random.Random(f"frames {seed}")
    log = Log(keep)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            layout = rng.choice(LAYOUTS)
            cluster = SimCluster(model, layout, rng, log, nursery)
            for name in layout:
                cluster.start(name)
            strike = _Strike(cluster, rng)
            sampling = rng.choice((Sampling(), Sampling(temperature=0.9, seed=seed, presence_penalty=0.5)))
            prompt = [rng.randint(5, 260) for _ in range(rng.choice((7, 150)))]
            right = right_ids(model, prompt, sampling, TOKENS)
            params = api.GenerateParams(
                token_ids=prompt,
                max_tokens=len(right),
                temperature=sampling.temperature,
                seed=sampling.seed,
                presence_penalty=sampling.presence_penalty,
            )
            if 2 in right:  # the end of the answer: too short to say much
                nursery.cancel_scope.cancel()
                return
            await cluster.all_ready()
            problem = await _answer(cluster, params, right, found)
            assert not problem, problem
            found.frames = strike.seen
            places = list(range(found.frames))
            for place in places if most is None else rng.sample(places, min(most, len(places))):
                await cluster.all_ready()
                fault = rng.choice(FAULTS)
                strike.arm(place, fault)
                log.note("fault", fault, place)
                problem = await _answer(cluster, params, right, found)
                found.done[fault] += 1
                if problem:
                    found.wrong.append(f"{fault} at frame {place}, {strike.what}: {problem}")
            await trio.sleep(_FREEZE_S[1])  # the last one may stand still, and keep what it is told to close
            await cluster.all_ready()
            found.wrong += await cluster.left_over()
            nursery.cancel_scope.cancel()

    read_once(model)
    run_seeded(seed, main)
    found.digest, found.lines = log.digest, log.lines
    return found


async def _answer(cluster: SimCluster, params: api.GenerateParams, right: list[int], found: Faults) -> str:
    """What is wrong with the answer; nothing, most likely."""
    begun = trio.current_time()
    try:
        with trio.fail_after(END_S):
            result = await cluster.ask("a", params)
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is lost
        return f"lost: {error!r}"
    found.longest_s = max(found.longest_s, trio.current_time() - begun)
    return "" if result.token_ids == right else f"differs: {result.token_ids}, not {right}"


class _Strike:
    """Counts the frames of an answer and strikes at one."""

    def __init__(self, cluster: SimCluster, rng: random.Random) -> None:
        self.seen = 0
        self.what = "never reached"
        self._cluster, self._rng = cluster, rng
        self._place, self._fault = -1, ""
        cluster.net.tamper = self._look

    def arm(self, place: int, fault: str) -> None:
        """The next answer has `fault` at its frame `place`."""
        self.seen, self._place, self._fault, self.what = 0, place, fault, "never reached"

    def _look(self, sender: str, receiver: str, frame: Frame) -> Fault | None:
        if not self._cluster.route("a"):
            return untouched(sender, receiver, frame)
        self.seen += 1
        if self.seen != self._place + 1:
            return None
        names = [self._cluster.name_of(peer) for peer in (sender, receiver)]
        self.what = f"{type(frame.message).__name__} from {names[0]} to {names[1]}"
        if self._fault.startswith("freeze"):
            victim = self._rng.choice([name for name in names if name != "a"])
            self._cluster.freeze(victim, self._fault.split()[1], self._rng.uniform(*_FREEZE_S))
            return None
        return next(fault for fault in get_args(Fault) if fault == self._fault)
