"""Answers during which processes are killed: none may be lost, and none may differ by a token.

One seed is one cluster and a few answers. A kill counts if its victim was in the answer's route at 5 to 95 %
of it. Every process is a possible victim but the origin's dgnd; another one serves all that it served.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import trio

from dgnd.control import api
from dgnd.wire.messages import Sampling

from .cluster import CONTEXT, EVERYTHING, Log, SimCluster, read_once
from .determinism import run_seeded
from .net import Death
from .oracle import right_ids

ANSWERS = 5  #: of one seed
ROLES = ("first", "middle", "head", "worker", "two")
#: Virtual seconds within which an answer with a few deaths in it must be there.
END_S = 200.0
_EOS = 2

#: Who serves what; "a" is the origin. Everything is served by two at least.
LAYOUTS: tuple[dict[str, str], ...] = (
    {"a": "", "b": "embed,0", "c": "embed,0", "d": "1-2", "e": "1-2", "f": "3,head", "g": "3,head"},
    {"a": "embed", "b": "embed,0-1", "c": "0-1", "d": "2-3", "e": "2-3", "f": "head", "g": "head"},
    {"a": "embed,0", "b": "embed,0-1", "c": "0-2", "d": "1-3", "e": "2-3,head", "f": "3,head", "g": "1-2"},
    {"a": "3,head", "b": "embed,0-1", "c": "embed,0", "d": "1-2", "e": "2", "f": "3,head", "g": "1"},
    {"a": "", "b": EVERYTHING, "c": EVERYTHING},
    {"a": "", "b": "embed,0-1", "c": "embed,0-1", "d": "2-3,head", "e": "2-3,head"},
)


@dataclass
class Outcome:
    """What one seed gave."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)  #: those that count, by role
    missed: int = 0  #: victims that were in no route, or too early or late
    answers: int = 0
    struck: int = 0  #: answers with a kill that counts
    wrong: list[str] = field(
        default_factory=list
    )  #: answers lost or different, and what is left of them, in words
    digest: str = ""
    lines: list[str] = field(default_factory=list)
    longest_s: float = 0.0  #: virtual, between two tokens


def run_seed(model: Path, seed: int, keep: bool = False) -> Outcome:
    """The answers of one seed; with `keep` the outcome has the whole log."""
    outcome = Outcome(seed)
    rng = random.Random(f"campaign {seed}")
    log = Log(keep)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            layout = rng.choice(LAYOUTS)
            apart = [frozenset(rng.sample(sorted(set(layout) - {"a"}), 2))] if rng.random() < 0.3 else []
            cluster = SimCluster(model, layout, rng, log, nursery, apart)
            for name in layout:
                cluster.start(name)
            session, said = "", list[int]()
            for number in range(ANSWERS):
                await cluster.all_ready()
                if not session or rng.random() < 0.5 or len(said) > CONTEXT // 2:
                    session, said = f"s{number}", []
                said = await _Trial(cluster, model, rng, outcome).run(session, said)
            outcome.wrong += await cluster.left_over()
            nursery.cancel_scope.cancel()

    read_once(model)  # what is kept between seeds may draw no random number within one
    run_seeded(seed, main)
    outcome.digest, outcome.lines = log.digest, log.lines
    return outcome


class _Trial:
    """One answer with its strikes."""

    def __init__(self, cluster: SimCluster, model: Path, rng: random.Random, outcome: Outcome) -> None:
        self._cluster, self._model, self._rng, self._outcome = cluster, model, rng, outcome
        self._came = 0
        self._count = 0
        self._struck = False
        self._last = trio.current_time()

    async def run(self, session: str, said: list[int]) -> list[int]:
        """The ids said in the session after it."""
        rng, outcome = self._rng, self._outcome
        params, right = self._request(session, said)
        self._count = len(right)
        strikes = 1 + (rng.random() < 0.3)
        after = sorted(
            rng.randint(max(1, self._count // 20), int(self._count * 0.94)) for _ in range(strikes)
        )
        outcome.answers += 1
        async with trio.open_nursery() as nursery:

            def on_tokens(came: int) -> None:
                now = trio.current_time()
                if came > 1:
                    outcome.longest_s = max(outcome.longest_s, now - self._last)
                self._last = now
                self._came = came
                while after and came >= after[0]:
                    after.pop(0)
                    nursery.start_soon(self._strike)

            self._cluster.log.note("ask", params.token_ids, right)
            problem = ""
            with trio.move_on_after(END_S) as patience:
                try:
                    result = await self._cluster.ask("a", params, on_tokens)
                    if result.token_ids != right:
                        problem = f"differs: {result.token_ids}, not {right}"
                    elif not result.exact:
                        problem = "is said to be inexact"
                except Exception as error:  # noqa: BLE001 - whatever it is, the answer is lost
                    problem = f"lost at {self._came} of {self._count}: {error!r}"
            if patience.cancelled_caught:
                problem = f"lost at {self._came} of {self._count}: no end within {END_S:g} s"
            nursery.cancel_scope.cancel()
        self._cluster.log.note("answered", problem)
        outcome.struck += self._struck
        if problem:
            outcome.wrong.append(f"answer {outcome.answers}: {problem}")
        return [*(params.token_ids or ()), *right]

    def _request(self, session: str, said: list[int]) -> tuple[api.GenerateParams, list[int]]:
        """A request and its answer, which does not end early."""
        rng = self._rng
        while True:
            length = rng.choice((rng.randint(3, 20), rng.randint(3, 20), rng.randint(100, 200)))
            ids = [*said, *(rng.randint(5, 260) for _ in range(length))]
            count = rng.randint(20, 45)
            sampling = Sampling()
            if rng.random() < 0.5:
                sampling = Sampling(
                    temperature=0.9,
                    seed=rng.getrandbits(32),
                    presence_penalty=rng.choice((0.0, 0.5)),
                    top_p=rng.choice((1.0, 0.95)),
                )
            right = right_ids(self._model, ids, sampling, count)
            if _EOS not in right:
                params = api.GenerateParams(
                    token_ids=ids,
                    max_tokens=count,
                    session=session,
                    temperature=sampling.temperature,
                    seed=sampling.seed,
                    presence_penalty=sampling.presence_penalty,
                    top_p=sampling.top_p,
                    exact=rng.random() < 0.5,
                )
                return params, right

    async def _strike(self) -> None:
        """Kills somebody in the route, some time within the next token or two."""
        rng, cluster = self._rng, self._cluster
        await trio.sleep(rng.choice((0.0, rng.uniform(0.0, 0.03), rng.uniform(0.0, 0.03))))
        role = rng.choice(ROLES)
        hops = [cluster.name_of(hop.peer) for hop in cluster.route("a")]
        far = [name for name in dict.fromkeys(hops) if name != "a"]
        counts = 0.05 * self._count <= self._came <= 0.95 * self._count
        if role == "worker":
            victims = [("worker", name) for name in rng.sample(hops, min(1, len(hops)))]
        elif role == "two":
            chosen = rng.sample(far, min(2, len(far)))
            victims = [(rng.choice(("node", "worker")), name) for name in chosen] if len(chosen) == 2 else []
        else:
            index = {"first": 0, "head": -1}.get(role)
            middle = far[1:-1]
            chosen = ([rng.choice(middle)] if middle else []) if index is None else far[index:][:1]
            victims = [("node", name) for name in chosen]
        if not victims:
            self._outcome.missed += 1
        apart_s = rng.choice((0.0, 0.06))  # at once, or while the first one is being replaced
        for what, name in victims:
            await trio.sleep(rng.uniform(0.0, apart_s))
            this = cluster.nodes[name]
            if this.node is None or (what == "worker" and not this.ready):
                self._outcome.missed += 1  # dead already
                continue
            if what == "worker":
                cluster.kill_worker(name)
            else:
                cluster.kill(name, rng.choice(get_args(Death)))
            if counts:
                self._outcome.kills[role] += 1
                self._struck = True
            else:
                self._outcome.missed += 1
