"""Whether a peer is alive: pings, round trips, and deadlines. A frozen peer's connection says nothing by
itself.

Knows the connection only as "when did bytes last come" and "send this ping".
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable

import trio

from dgnd.p2p.settings import NetworkSettings

_PROBE_S = 1.0
#: For a sign of life that is asked for because an answer waits.
NUDGE_S = 2.0
_TICK_S = 0.1
#: A tick that ends so much too late was one of standing still.
_LATE_S = 0.5
#: Of so many looks at a link that is heard, one asks for the round trip.
_ASKED_ANYWAY = 5
#: Pings by which the link is judged.
_TRIPS = 9


class Heartbeat:
    """Of one connection: `send` queues a ping with a nonce, without waiting.

    `received` is when bytes last came.
    """

    def __init__(
        self, settings: NetworkSettings, send: Callable[[int], None], received: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._send = send
        self._received = received
        self._nonce = 0
        self._sent_at = 0.0
        self._answered = trio.Event()
        self._trips: deque[float] = deque(maxlen=_TRIPS)

    @property
    def rtt_s(self) -> float | None:
        """The usual round trip of late: one that met a busy process says nothing of the link."""
        return statistics.median(self._trips) if self._trips else None

    def ping(self) -> None:
        """Asks for a sign of life."""
        self._nonce += 1
        self._sent_at = trio.current_time()
        self._send(self._nonce)

    def pong(self, nonce: int) -> None:
        """The answer to a ping has come; only the last one counts."""
        if nonce == self._nonce:
            self._trips.append(trio.current_time() - self._sent_at)
            self._answered.set()

    async def probe(self) -> bool:
        """Whether the peer answers within a second."""
        self._answered = trio.Event()
        self.ping()
        with trio.move_on_after(_PROBE_S):
            await self._answered.wait()
        return self._answered.is_set()

    @property
    def patience_s(self) -> float:
        """How long a sign of life that is asked for may take: NUDGE_S, or six round trips if these are
        longer."""
        return max(NUDGE_S, 6 * (self.rtt_s or 0.0))

    async def lives(self) -> bool:
        """Whether anything comes within `patience_s` of a ping.

        Time is counted in ticks of this process: while it stands still itself, nobody is late.
        """
        before = self._received()
        self.ping()
        for _ in range(int(self.patience_s / _TICK_S)):
            await trio.sleep(_TICK_S)
            if self._received() > before:
                return True
        return False

    async def watch(self, is_up: Callable[[], bool]) -> str:
        """Returns, with the reason, when nothing has come for too long or the greeting takes too long.

        Time is counted in ticks here, too: one in which this process stood still itself (stopped, suspended)
        counts half, since what came meanwhile is not read yet. Who was just heard is asked now and then only,
        for the round trip: so of two that rest, one asks and both know.
        """
        silence, greeting = self._settings.gone_s, self._settings.handshake_s
        tick = min(self._settings.ping_s, silence / 3)
        seen = self._received()
        silent = ungreeted = 0.0
        for number in itertools.count():
            begun = trio.current_time()
            await trio.sleep(tick)
            now, received = trio.current_time(), self._received()
            waited = tick if now - begun < tick + _LATE_S else tick / 2
            is_silent, seen = received == seen, received
            silent = silent + waited if is_silent else min(now - received, waited)
            if silent > silence:
                return f"no sign of life for {silence:g} s"
            if is_up():
                ungreeted = -math.inf
                if is_silent or number % _ASKED_ANYWAY == 0:
                    self.ping()
            ungreeted += waited
            if ungreeted > greeting:
                return f"no Hello within {greeting:g} s"
        raise AssertionError("counting ends never")
