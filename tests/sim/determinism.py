"""Runs an async function so that all that happens in it follows from a seed. See the package."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

import trio
import trio.testing

from dgnd.memory.system_memory import Allowed

T = TypeVar("T")

_SCHEDULER: Any = trio._core._run  # its seed is no public matter, but hypothesis sets it the same way
#: Virtual time begins here: 0.0 stands for "never" in some places.
BEGIN_S = 1000.0
#: Bytes of memory that the system says are available.
MEMORY = 1 << 30


def run_seeded(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """`main` on virtual time; raises what it raises."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    clock.jump(BEGIN_S)
    with _seeded(random.Random(seed)):
        return trio.run(main, clock=clock)


@contextmanager
def _seeded(rng: random.Random) -> Iterator[None]:
    state = _SCHEDULER._r.getstate()
    _SCHEDULER._r.seed(rng.getrandbits(64))
    with ExitStack() as stack:
        for owner, name, value in (
            (_SCHEDULER, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
            (secrets, "token_bytes", lambda n: rng.randbytes(n)),
            (secrets, "token_hex", lambda n: rng.randbytes(n).hex()),
            (secrets, "randbits", rng.getrandbits),
            (time, "time_ns", lambda: int(trio.current_time() * 1e9)),
            (trio.to_thread, "run_sync", _at_once),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for module in ("models.local", "upkeep.ledger", "worker.runner"):
            stack.enter_context(mock.patch(f"dgnd.{module}.available_bytes", return_value=MEMORY))
        for name, value in (("allowed", Allowed(MEMORY, "this machine")), ("private_bytes", 0)):
            stack.enter_context(mock.patch(f"dgnd.upkeep.ledger.{name}", return_value=value))
        yield
    _SCHEDULER._r.setstate(state)


async def _at_once(work: Callable[..., T], *arguments: object, **_: object) -> T:
    await trio.lowlevel.checkpoint()
    return work(*arguments)
