"""The daemon's side of its workers: start one, watch it, say why it ended, start it again after a growing
delay.

Knows the frames only by name: steps and their answers pass through. One `WorkerHandle` for each model.
"""

from __future__ import annotations

import itertools
import logging
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from dgn_backends.registry import label_of
from dgnd.eager import EagerWriter
from dgnd.errors import (
    BackendError,
    BackendUnavailable,
    DgnError,
    LimitError,
    ModelError,
    ProtocolError,
    WorkerDied,
    error_from,
)
from dgnd.memory.system_memory import private_bytes
from dgnd.wire.codec import encode_for_stream
from dgnd.wire.decoder import WORKER, FrameDecoder
from dgnd.wire.limits import DEFAULT_LIMITS
from dgnd.wire.messages import (
    Failure,
    Frame,
    HopKey,
    Loaded,
    LoadedSpan,
    LoadProgress,
    LoadSpans,
    Ping,
    Pong,
    WorkDone,
    WorkerStats,
)
from dgnd.workers.end import oom_kills, reap, why_it_ended
from dgnd.workers.launch import worker_command, worker_environment
from dgnd.workers.mapped_files import MappedFiles
from dgnd.workers.running_note import RunningNote
from dgnd.workers.seal import Seal
from dgnd.workers.vitals import moved_by

log = logging.getLogger("dgnd.workers")

_READ_BYTES = 1 << 18
_PING_INTERVAL_S = 2.0
_SILENT_S = 30.0  #: without any byte from a worker for this long it is taken for hung
#: Without a byte and without computing for so many pings one that nobody waits for is not offered any more.
_QUIET_PINGS = 2
_LOOK_S = 2.0  #: without a byte and without computing for so long while an answer waits it is told of
_TICK_S = 0.1
_SILENT_LOADING_S = 180.0  #: the same before it is loaded: importing a library holds up everything in it
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 60.0
#: Of loading: what nobody's waiting changes.
_PERMANENT = (BackendUnavailable, ModelError, LimitError)
_STEADY_S = 10.0  #: one that was ready after so long begins with the first delay again


@dataclass(slots=True)
class WorkerHandlers:
    """What the daemon does with a worker's news. None of these may block."""

    on_frame: Callable[[str, Frame], None]
    on_ready: Callable[[str], None]
    on_silent: Callable[[str, str], None]
    on_down: Callable[[str, str, frozenset[HopKey]], None]
    #: what it had done when it said so before, and what now
    on_done: Callable[[str, WorkDone, WorkDone], None] = lambda *_: None


class WorkerHandle:
    """One worker process, restarted for as long as `run` runs."""

    def __init__(self, request: LoadSpans, handlers: WorkerHandlers, seal: Seal) -> None:
        """`seal`: of the files that `request` names."""
        self.request = request
        self.model = request.model
        self.state = "starting"
        self.detail = ""
        self.pid: int | None = None
        self.spans: tuple[LoadedSpan, ...] = ()
        self.stats = WorkerStats()
        self.fault: DgnError | None = None  #: why it can't load, where trying again alone won't help
        self.allowance: Callable[[WorkerHandle], int] = lambda _: (
            0
        )  #: bytes that its process may have; 0: any
        self.private_bytes = 0  #: what its process has to itself, when it was last looked at
        self.private_weights = 0  #: of its weights, what is not mapped from files
        self.apart = False  #: it computes in another memory than the machine's
        self._handlers = handlers
        self._seal = seal
        self._writer: EagerWriter | None = None
        self._failure: DgnError | None = None
        self._running: frozenset[HopKey] = frozenset()  # at the last end
        self._nursery: trio.Nursery | None = None
        self._heard = 0  # times that bytes came
        self._looked_after = False
        self._mapped = MappedFiles()

    @property
    def ready(self) -> bool:
        """Whether its spans are loaded and it computes."""
        return self.state == "ready"

    @property
    def _loaded(self) -> bool:
        return self.state in ("ready", "silent")

    @property
    def _patience_s(self) -> float:
        """How long it may be silent now."""
        return _SILENT_S if self._loaded else _SILENT_LOADING_S

    @property
    def _label(self) -> str:
        """How its backend is called."""
        return label_of(self.request.backend)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights loaded."""
        return sum(span.weights_bytes for span in self.spans)

    def signs(self) -> object:
        """Differs from before as long as it moves, also while it loads."""
        return self.detail, moved_by(self.pid) if self.pid is not None else None

    def post(self, frame: Frame) -> bool:
        """Sends a frame; False when there is no worker now. What waits is bounded by the credits of hops."""
        if self._writer is None:
            return False
        self._writer.write(encode_for_stream(frame))
        return True

    def look_after(self) -> None:
        """An answer waits for it: if it neither answers nor computes for a while, `on_silent` is told."""
        if self.state == "silent":
            self._handlers.on_silent(self.model, self.detail)
        elif self._nursery is not None and self.ready and not self._looked_after:
            self._looked_after = True
            self._nursery.start_soon(self._look)

    async def _look(self) -> None:
        assert self.pid is not None
        heard, moved = self._heard, moved_by(self.pid)
        self.post(Frame(Ping(nonce=0)))
        for _ in range(int(_LOOK_S / _TICK_S)):  # in ticks of ours: while dgnd stands still, nobody is late
            await trio.sleep(_TICK_S)
            if self._heard > heard:
                break
        else:
            if moved_by(self.pid) == moved:
                self._fell_silent()
        self._looked_after = False

    def _fell_silent(self) -> None:
        """It is not offered until something comes from it."""
        self.state, self.detail = "silent", f"(pid {self.pid}) neither answers nor computes: stopped, or hung"
        log.warning("worker of %s %s", self.model, self.detail)
        self._handlers.on_silent(self.model, self.detail)

    def _came_back(self) -> None:
        self.state, self.detail = "ready", ""
        log.info("worker of %s (pid %s) answers again", self.model, self.pid)
        self._handlers.on_ready(self.model)

    async def run(self) -> None:
        """Runs until cancelled; the process is gone when this returns. May be run again."""
        try:
            await self._run_on()
        finally:
            self.stopped("")

    def stopped(self, why: str) -> None:
        """It does not run, for a reason that is not its own."""
        self.state, self.detail, self.pid, self.fault = "stopped", why, None, None
        self.spans, self.stats, self.private_bytes = (), WorkerStats(), 0

    async def _run_on(self) -> None:
        delay = _FIRST_DELAY_S
        while True:
            started = trio.current_time()
            error = await self._run_once()
            why, before = error.message, self.fault
            if self._loaded and trio.current_time() - started > _STEADY_S:
                delay = _FIRST_DELAY_S
            self.fault = error if isinstance(error, _PERMANENT) else None
            self.state = "restarting" if self.fault is None else "failed"
            self.detail, self.pid = why, None
            self.spans, self.stats, self.private_bytes = (), WorkerStats(), 0
            if isinstance(error, LimitError):  # each try takes memory for a while, and time
                delay = _LONGEST_DELAY_S
            if self.fault is None or _differs(before, self.fault):
                log.error("worker of %s: %s; starting it again in %.1f s", self.model, why, delay)
            self._handlers.on_down(self.model, why, self._running)
            await trio.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY_S)

    async def _run_once(self) -> DgnError:
        """Starts the process and serves it to its end; returns why it ended, or was not started."""
        self._running = frozenset()
        try:
            await self._seal.check()
        except ModelError as error:
            return error
        ours, theirs = socket.socketpair()
        note = RunningNote()
        self._failure = None
        if self.fault is None:  # else it stays failed until a start works
            self.state, self.detail = "loading", ""
        with theirs:
            # Not trio's open_process: it may spawn from a short-lived thread, and PR_SET_PDEATHSIG is about
            # the thread.
            process = subprocess.Popen(  # noqa: ASYNC220 - see above; it takes about a millisecond
                worker_command(theirs.fileno(), note.fd),
                pass_fds=[theirs.fileno(), note.fd],
                stdin=subprocess.DEVNULL,
                env=worker_environment(),
            )
        self.pid, self._mapped = process.pid, MappedFiles()
        oom_before = oom_kills()
        ours.setblocking(False)
        self._writer = EagerWriter(ours)
        self.private_bytes = 0
        allowance = self.allowance(self)
        self.post(Frame(msgspec.structs.replace(self.request, memory_bytes=allowance)))
        hung = False
        try:
            with ours:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._writer.run)
                    nursery.start_soon(self._ping, process.pid)
                    hung = await self._receive_all(ours)
                    nursery.cancel_scope.cancel()
        finally:
            self._nursery, self._looked_after = None, False
            with trio.CancelScope(shield=True):
                await reap(process, patience_s=0.0 if hung else 0.5)
            self._running = note.read()
            note.close()
            self._writer = None  # only now: until `on_down` says why, frames are taken and lost with it
        if hung:
            why = f"{self._label} hung: no sign of life for {self._patience_s:.0f} s, killed"
            return BackendError(why)
        oom = oom_kills() > oom_before
        return (
            self._failure
            or self._file_fault(process.returncode)
            or BackendError(why_it_ended(process.returncode, oom, self._label))
        )

    def _file_fault(self, returncode: int) -> DgnError | None:
        """The file to blame for a SIGBUS, where there is one."""
        changed = self._mapped.changed() if returncode == -signal.SIGBUS else None
        if changed is None:
            return None
        path, what = changed
        remedy = "put it back as it was, and change files in use only while dgnd is stopped"
        if path.is_relative_to(self.request.cache_dir):
            remedy = "it is a cache of dgn's and is made again; let nothing else write there"
        return WorkerDied(f"{path} {what} while the worker used it (SIGBUS): {remedy}")

    async def _receive_all(self, sock: socket.socket) -> bool:
        """Handles frames to EOF; True when the worker fell silent instead."""
        decoder = FrameDecoder(DEFAULT_LIMITS, WORKER)
        buffer = memoryview(bytearray(_READ_BYTES))
        with trio.move_on_after(_SILENT_LOADING_S) as silence:
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    size = sock.recv_into(buffer)
                except BlockingIOError:  # woken for nothing
                    continue
                except OSError:
                    return False
                if not size:
                    return False
                self._heard += 1
                if self.state == "silent":
                    self._came_back()
                deadline = trio.current_time() + self._patience_s
                if abs(deadline - silence.deadline) > _PING_INTERVAL_S:  # to set it costs more than to look
                    silence.deadline = deadline
                try:
                    decoder.receive_data(buffer[:size])
                    while (frame := decoder.next_frame()) is not None:
                        self._take(frame)
                except ProtocolError as error:
                    self._failure = ProtocolError(f"sent what is no frame: {error.message}")
                    return False
                except BackendError as error:
                    self._failure = error
                    return False
        return True

    def _take(self, frame: Frame) -> None:
        match frame.message:
            case LoadProgress(done=done, total=total):
                self._look_at_files()
                self._look_at_memory()
                if self.fault is None:
                    self.detail = f"loading: {100 * done // max(total, 1)} %"
            case Loaded(spans=spans) as loaded:
                if not self._seal.holds():  # the next start finds out what they are
                    raise BackendError("the model's files were touched while it loaded them")
                self._look_at_files()
                self.spans, self.state, self.detail, self.fault = spans, "ready", "", None
                self.private_weights, self.apart = loaded.private_weights, loaded.apart
                self._look_at_memory()
                log.info("worker of %s: %s loaded", self.model, ",".join(span.span for span in spans))
                self._handlers.on_ready(self.model)
            case WorkerStats() as stats:
                self._handlers.on_done(self.model, self.stats.done, stats.done)
                self.stats = stats
                self._look_at_memory()  # at the same moment, so that they can be compared
            case Pong():
                self.post(Frame(WorkerStats()))
            case Failure(tag="w.load", kind=kind, message=message):
                self._failure = error_from(kind, message, {})
            case _:
                self._handlers.on_frame(self.model, frame)

    def _look_at_memory(self) -> None:
        if self.pid is not None:
            self.private_bytes = private_bytes(self.pid)

    def _look_at_files(self) -> None:
        if self.pid is not None:
            self._mapped.look(self.pid)

    async def _ping(self, pid: int) -> None:
        """Asks for a sign of life now and then, also while nobody waits for an answer."""
        quiet = 0
        now = self._heard, moved_by(pid)
        for nonce in itertools.count(1):
            before = now
            self.post(Frame(Ping(nonce=nonce)))
            await trio.sleep(_PING_INTERVAL_S)
            now = self._heard, moved_by(pid)
            quiet = quiet + 1 if now == before else 0
            if quiet >= _QUIET_PINGS and self.ready:
                self._fell_silent()


def _differs(before: DgnError | None, now: DgnError) -> bool:
    """Whether it is worth another line in the log: how much memory is free is always another number."""
    if isinstance(before, LimitError) and isinstance(now, LimitError):
        return False
    return before is None or before.message != now.message
