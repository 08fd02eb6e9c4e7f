"""What the service manager that started us is told: ready, how it is, that it lives, that it takes longer.

The watchdog is fed by a round through everything that a user of dgnctl needs: a new connection to the control
socket, a request, its answer. Does nothing where no service manager asks. Knows nothing of what is served.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from dgnd.control import api, jsonrpc
from dgnd.systemd import sdnotify
from dgnd.upkeep.standing import Standing

log = logging.getLogger("dgnd")

_POLL_S: Final = 0.1  #: of the state while starting
_STEADY_POLL_S: Final = 3.0  #: once ready: what it costs is spent for as long as the daemon runs
_ANSWER_S: Final = 10.0  #: for an answer on the control socket
_LOOK_S: Final = 5.0  #: between two rounds, unless the watchdog is to be fed more often
_LONGER_S: Final = 60.0  #: what is asked for, at every look, while blocks are loaded
_FEEDS: Final = 3  #: in the time that the service manager waits for one
#: A worker that was started so often without being ready once is not waited for.
_MOST_STARTS: Final = 3


@dataclass(slots=True)
class Supervision:
    """One daemon's."""

    standing: Standing
    socket: Path
    ready: bool = False  #: and the service manager knows
    _told: str = ""
    _pids: dict[str, set[int]] = field(default_factory=dict)  # of workers, by model

    async def run(self) -> None:
        """Goes on until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            if sdnotify.is_asked():
                nursery.start_soon(self._watch)

    def reloading(self) -> None:
        """The configuration is being read again."""
        if self.ready:
            sdnotify.reloading(trio.current_time())

    def reloaded(self, problem: str = "") -> None:
        """It was, or could not be."""
        self._told = f"the configuration stays as it was: {problem}" if problem else self._line()
        if self.ready:
            self._say_ready(self._told)

    # --- how it is

    def _line(self) -> str:
        return f"{self.standing.state()}: {self.standing.why()}"

    def _say_ready(self, line: str) -> None:
        """What is not taken, as its queue is full for a moment, is said again: else the start would fail."""
        self._told = line
        self.ready = sdnotify.ready(line) or not sdnotify.is_asked()

    async def _tell(self) -> None:
        before, serving = "", False
        while True:
            line = self._line()
            if not self.ready and self.standing.serves():
                self._say_ready(line)
                if not serving:
                    log.info("serving")
                serving = True
            elif line not in (before, self._told):  # what was told of a reload stays until something changes
                self._told = line
                sdnotify.status(line)
            if self.ready and not sdnotify.is_asked():
                return
            before = line
            await trio.sleep(_STEADY_POLL_S if self.ready or serving else _POLL_S)

    # --- that it lives

    async def _watch(self) -> None:
        patience_s = sdnotify.watchdog_s()
        every_s = _LOOK_S if patience_s is None else patience_s / _FEEDS
        while True:
            answers = await self._answers(min(_ANSWER_S, every_s))
            if not answers:
                log.warning("the control socket %s does not answer", self.socket)
            elif self.ready:
                sdnotify.alive()
            elif self._hopes():
                sdnotify.longer(_LONGER_S)
            await trio.sleep(every_s if self.ready else min(every_s, _LOOK_S))

    async def _answers(self, within_s: float) -> bool:
        """Whether a client gets an answer."""
        with trio.move_on_after(within_s):
            try:
                async with await trio.open_unix_socket(self.socket) as stream:
                    await stream.send_all(jsonrpc.encode_request(1, "status", api.NoParams()))
                    lines = jsonrpc.Lines(jsonrpc.MAX_LINE_BYTES)
                    while (line := lines.next()) is None:
                        data = await stream.receive_some()
                        if not data:
                            return False
                        lines.receive(bytes(data))
                    # That there are too many clients is an answer, too.
                    return isinstance(line, bytes) and not isinstance(jsonrpc.parse(line), jsonrpc.Malformed)
            except (OSError, trio.BrokenResourceError):
                return False
        return False

    def _hopes(self) -> bool:
        """Whether it may still come to serve: it waits for its turn, or what it loads was not tried again and
        again."""
        if not self.standing.started:
            return True
        for worker in self.standing.workers():
            if worker.pid is not None:
                self._pids.setdefault(worker.model, set()).add(worker.pid)
        starts = max((len(pids) for pids in self._pids.values()), default=0)
        return self.standing.loads() and starts <= _MOST_STARTS
