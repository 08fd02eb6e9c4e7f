"""This node computes nothing for a while: the PC is its user's alone. Workers end, and are back afterwards.

Sessions have a moment to go elsewhere; what nobody else can go on with is closed with the reason, and kept
where it was asked for. A pause outlives the daemon. Knows nothing of who asks for it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from dgnd.background import Background
from dgnd.hosting.server import HopServer
from dgnd.models.local import LocalModel
from dgnd.peers.offers import OfferBook
from dgnd.upkeep.replacing import Replacing
from dgnd.upkeep.workshop import Workshop
from dgnd.waiting import wait_while
from dgnd.words import counted

log = logging.getLogger("dgnd.pausing")

#: For sessions to begin elsewhere. What ends a worker takes up to half a second more, and after one second
#: nothing is to compute here.
_GIVE_S: Final = 0.3
MOST_PAUSE_S: Final = 366 * 86400.0
#: An end beyond that is shown with its date: an hour alone would be taken for today's.
_SAME_DAY_S: Final = 12 * 3600.0


@dataclass(frozen=True, slots=True)
class Paused:
    """What came of it, in sessions with blocks here: answers that ended or went elsewhere at once, sessions
    between two answers that did so, and those that were closed."""

    left: int = 0
    idle: int = 0
    closed: int = 0


@dataclass(slots=True)
class Pausing:
    """One node's. `tell`: says to peers what is offered now, ahead of what is posted after it; `path`: where
    a pause is kept; `clock`: seconds since the epoch, to be shown and kept."""

    models: Mapping[str, LocalModel]
    hops: HopServer
    offers: OfferBook
    workshop: Workshop
    replacing: Replacing
    tell: Callable[[], None]
    background: Background
    path: Path
    clock: Callable[[], float] = time.time
    until: float | None = None  #: by `clock`; None: until it is resumed
    _resumed: trio.Event | None = None

    @property
    def paused(self) -> bool:
        """Whether nothing is to compute here."""
        return self._resumed is not None

    @property
    def why(self) -> str:
        """In a few words, for people here and elsewhere; empty where it isn't."""
        if not self.paused:
            return ""
        if self.until is None:
            return "paused by its user"
        form = "%H:%M:%S" if self.until - self.clock() < 60 else "%H:%M"
        form = form if self.until - self.clock() < _SAME_DAY_S else "%Y-%m-%d %H:%M"
        return f"paused by its user until {time.strftime(form, time.localtime(self.until))}"

    def begin_as_before(self) -> None:
        """At the start of the daemon: a pause that is not over goes on."""
        try:
            until = json.loads(self.path.read_text())["until"]
            until = None if until is None else float(until)
            time.localtime(until)  # no number of a file may end the daemon where it is shown
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            log.warning("%s is damaged: if this node was paused, pause it again", self.path)
            return
        if until is None or until > self.clock():
            self._begin(until)
            log.info("%s, as before", self.why)

    async def pause(self, seconds: float | None) -> Paused:
        """Begins a pause, or gives the one that is another end. Returns when no worker is left."""
        until = None if seconds is None else self.clock() + seconds
        if self.paused:
            self.until = until
            self._keep()
            self._say()
            return Paused()
        self._begin(until)
        log.info("%s", self.why)
        self._say()
        before, answering = _sessions(self.hops), _sessions(self.hops, answering=True)
        self.hops.ask_to_leave(list(self.hops.hops.values()), f"its node is {self.why}")
        await wait_while(lambda: self.hops.hops, _GIVE_S)
        closed = _sessions(self.hops)
        self.hops.close(list(self.hops.hops.values()), f"its node is {self.why}")
        await self.workshop.stop_all()
        found = Paused(len(answering - closed), len(before - answering - closed), len(closed))
        answers = counted(found.left, "answer")
        text = "paused: %s ended or went elsewhere, %d idle sessions let go, %d closed"
        log.info(text, answers, found.idle, found.closed)
        return found

    def resume(self) -> bool:
        """Ends it; whether there was one."""
        if self._resumed is None:
            return False
        self._resumed.set()
        self._resumed, self.until = None, None
        self.offers.leaving.paused = False
        self.path.unlink(missing_ok=True)
        self.workshop.open()
        for model in self.models.values():
            if model.worker is not None:
                self.workshop.start(model.worker)
        log.info("resumed")
        self._say()
        return True

    # --- inside

    def _begin(self, until: float | None) -> None:
        self.until, self._resumed = until, trio.Event()
        self.offers.leaving.paused = True
        self.workshop.close("the node is paused")
        self._keep()
        self.background.start(self._hold, self._resumed)
        self.background.start(self._expire, self._resumed)

    def _keep(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            temporary.write_text(json.dumps({"until": self.until}))
            os.replace(temporary, self.path)  # noqa: PTH105 - in the same directory
        except OSError as error:
            log.warning("the pause ends when dgnd does: %s: %s", self.path, error.strerror or error)

    def _say(self) -> None:
        self.offers.away = self.why
        self.tell()

    async def _hold(self, resumed: trio.Event) -> None:
        """Nothing that loads another worker goes on until then."""
        async with self.replacing.one_at_a_time:
            await resumed.wait()

    async def _expire(self, resumed: trio.Event) -> None:
        while not resumed.is_set():
            left_s = math.inf if self.until is None else self.until - self.clock()
            if left_s <= 0:
                self.resume()
                return
            with trio.move_on_after(min(left_s, 1.0)):  # the clock may be set, and the end be moved
                await resumed.wait()


def _sessions(hops: HopServer, *, answering: bool = False) -> set[tuple[str, str]]:
    """Of all hops, or of those in an answer."""
    return {(key.origin, key.session) for key, hop in hops.hops.items() if hop.answering or not answering}
