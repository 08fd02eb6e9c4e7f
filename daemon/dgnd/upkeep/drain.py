"""This node is about to leave: it begins nothing new, has its hops handed over, and waits until that is done.

What is left when the time is over is ended with a typed error. Knows nothing of who takes the hops over:
their origins do. Whether the process ends afterwards is the node's affair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import trio

from dgnd.background import Background
from dgnd.errors import ShuttingDown
from dgnd.hosting.leaving import Leaving
from dgnd.hosting.server import HopServer
from dgnd.origin.engine import Engine
from dgnd.waiting import wait_while
from dgnd.words import counted

log = logging.getLogger("dgnd.drain")

#: Of `drain_s`, for what comes after: last words to clients and peers, and the ends of workers.
END_S = 1.0
#: For answers that were ended to be gone.
_ENDED_S = 1.0


@dataclass(frozen=True, slots=True)
class Drained:
    """What came of it: sessions that ended or were handed over in time, and those that were cut off."""

    left: int
    ended: int


class Drain:
    """One node's. `tell`: says to peers what is offered now, ahead of what is posted after it. A drain once
    begun goes on in the `background`, whoever asked for it."""

    def __init__(
        self,
        leaving: Leaving,
        hops: HopServer,
        engine: Engine,
        tell: Callable[[], None],
        background: Background,
        drain_s: float,
    ) -> None:
        self.state: Literal["", "draining", "drained"] = ""
        self.drain_s = drain_s
        self._leaving = leaving
        self._hops = hops
        self._engine = engine
        self._tell = tell
        self._patience = trio.CancelScope()
        self._done = trio.Event()
        self._result = Drained(0, 0)
        self._background = background

    def begin(self) -> None:
        """Nothing new from now on; origins are told to take their sessions elsewhere."""
        if self.state:
            return
        self._set("draining")
        self._done = trio.Event()
        self._patience = trio.CancelScope()
        self._hops.ask_to_leave(self._hops.foreign(), "its node is about to leave")
        self._background.start(self._work, self._patience, self._done)

    def undo(self) -> None:
        """The node stays after all."""
        if self.state:
            self._set("")
            self._patience.cancel()
            log.info("no longer draining")

    def hurry(self) -> None:
        """Waits no longer."""
        self._patience.cancel()

    async def finished(self) -> Drained:
        """Waits for the end of what was begun, or for `undo`."""
        await self._done.wait()
        return self._result

    def _set(self, state: Literal["", "draining", "drained"]) -> None:
        self.state = state
        self._leaving.everything = self._engine.draining = bool(state)
        self._tell()

    async def _work(self, patience: trio.CancelScope, done: trio.Event) -> None:
        begun, busy = trio.current_time(), self.left()
        log.info("draining: %s to be handed over or ended", counted(busy, "session"))
        patience.deadline = begun + max(self.drain_s - END_S, self.drain_s / 2)
        with patience:
            await wait_while(self.left)
        if self.state == "draining" and patience is self._patience:
            ended = self.left()
            await self._end_rest()
            self._result = Drained(max(busy - ended, 0), ended)
            self._set("drained")
            log.info("drained in %.1f s; cut off: %s", trio.current_time() - begun, counted(ended, "session"))
        done.set()

    def left(self) -> int:
        """Sessions that still run: those with a hop here, and this node's own answers."""
        foreign = {(hop.ticket.key.origin, hop.ticket.key.session) for hop in self._hops.foreign()}
        return len(foreign) + sum(item.busy for item in self._engine.conversations)

    async def _end_rest(self) -> None:
        self._hops.close(self._hops.foreign(), "its node has left")
        for conversation in self._engine.conversations:
            if conversation.busy:
                conversation.driver.fail(
                    ShuttingDown("the node is leaving, and the answer did not end in time")
                )
        await wait_while(lambda: any(item.busy for item in self._engine.conversations), _ENDED_S)
