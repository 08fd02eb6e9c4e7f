"""The worker process: a reader, a writer and a compute thread around one `SpanWorker`.

The reader answers ping, stats and nothing else by itself, so the daemon hears at once also while a batch
runs; neither end of the socketpair waits on a write before it reads. The process ends when the daemon does:
by EOF, and by PR_SET_PDEATHSIG where no EOF comes. Knows nothing of what frames mean to the origin.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from dgn_backends.errors import DgnError
from dgn_backends.foreign import raised
from dgn_backends.registry import label_of
from dgnd.logs import log_to_stderr
from dgnd.running_note import RunningNote
from dgnd.wire.codec import WORKER, FrameDecoder, encode
from dgnd.wire.limits import DEFAULT_LIMITS
from dgnd.wire.messages import (
    Cancel,
    CloseHop,
    EndTurn,
    Failure,
    Frame,
    History,
    Loaded,
    LoadProgress,
    LoadSpans,
    OpenSequence,
    Ping,
    Pong,
    StepFrame,
    WorkerStats,
)
from dgnd.worker.joined import hops_of, positions
from dgnd.worker.load_watch import LoadWatch
from dgnd.worker.pace import Pace
from dgnd.worker.runner import SpanWorker
from dgnd.worker.scheduler import Scheduler
from dgnd.worker.speed import Speed
from dgnd.worker.watchdog import Watchdog

_READ_BYTES = 1 << 18
_ONE_WRITE_BYTES = 1 << 18  #: more than this is not copied to be written at once
_PROGRESS_INTERVAL_S = 0.2
_PR_SET_PDEATHSIG = 1
#: A batch that takes longer has hung. Batches are sized to take `pace.TARGET_S` or a few times that, and an
#: origin gives up an answer that rests for `driver.STEP_TIMEOUT_S`, 120: so it still hears who is to blame.
HUNG_S = 60.0


def die_with_parent(parent_pid: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send this process the signal `by` when the thread that started it ends (Linux;
    prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent_pid:  # it died before the call
        os._exit(1)


def be_first_to_go() -> None:
    """Makes the kernel's OOM killer choose the worker, which is restarted, before the daemon."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


class WorkerProcess:
    """Wires the threads; `run` returns the exit code."""

    def __init__(self, sock: socket.socket, note: RunningNote) -> None:
        self._sock = sock
        self._note = note
        self._scheduler = Scheduler()
        self._wake = threading.Condition()  # guards _scheduler and _load
        self._load: LoadSpans | None = None
        self._outbox: queue.SimpleQueue[list[Frame] | None] = queue.SimpleQueue()
        self._worker: SpanWorker | None = None
        self._kv_bytes = self._kv_busy = 0
        self._speed = Speed()  # guarded by _wake

    def run(self) -> int:
        """Computes on the calling thread until the daemon hangs up."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        writer = threading.Thread(target=self._write, name="writer", daemon=True)
        writer.start()
        with self._wake:
            self._wake.wait_for(lambda: self._load is not None)
            request = self._load
        assert request is not None
        pid = os.getpid()
        label = label_of(request.backend)
        try:
            what = "nothing of it moved while it loaded"
            with LoadWatch(lambda: self._hung(label, what, writer)) as watch:
                self._worker = worker = SpanWorker(request, Progress(self._outbox, watch))
            if os.getpid() == pid:  # else this is a copy that the plugin made by forking
                self._outbox.put([Frame(Loaded(spans=worker.loaded(), device=request.device))])
                what = f"a batch took more than {HUNG_S:.0f} s"
                self._compute(worker, Watchdog(HUNG_S, lambda: self._hung(label, what, writer)))
        except DgnError as error:
            self._fail(error.kind, error.message)
        except BaseException as error:  # noqa: BLE001 - a plugin is foreign code, beside which anything may fail
            traceback.print_exc()
            self._fail("backend", f"{label}: the worker failed: {raised(error)}")
        return self._end(writer)

    def _end(self, writer: threading.Thread) -> int:
        """Lets the last words out; the exit code."""
        self._outbox.put(None)
        writer.join(timeout=5)
        return 1

    def _hung(self, label: str, what: str, writer: threading.Thread) -> None:
        """A call of the plugin does not come back: says so, shows in the log where it is, and ends the
        process."""
        faulthandler.dump_traceback()
        self._fail("backend", f"{label} hung: {what}")
        os._exit(self._end(writer))

    def _fail(self, kind: str, message: str) -> None:
        self._outbox.put([Frame(Failure(kind=kind, message=message[:4096], tag="w.load"))])

    def _compute(self, worker: SpanWorker, watchdog: Watchdog) -> None:
        pid, pace = os.getpid(), Pace()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: len(self._scheduler) > 0)
                self._wake.wait_for(self._scheduler.is_gathered, pace.patience_s)
                batch = self._scheduler.take(pace.budget)
                beside = self._scheduler.beside(batch)
            works = worker.works(batch)
            begun = time.monotonic()
            self._note.write(hops_of(batch))
            with watchdog:
                answers = worker.run(batch)
                kv_bytes = worker.kv_bytes()
            if os.getpid() != pid:
                return  # a copy that the plugin made by forking
            self._note.write(())
            if answers:
                self._outbox.put(answers)
            ended = time.monotonic()
            pace.observe(positions(batch), ended - begun)
            if works and not any(isinstance(answer.message, Failure) for answer in answers):
                with self._wake:
                    self._speed.observe(works, begun, ended, beside)
            self._kv_bytes, self._kv_busy = kv_bytes, worker.budget.busy_bytes

    def _read(self) -> None:
        decoder = FrameDecoder(DEFAULT_LIMITS, WORKER)
        while True:
            try:
                data = self._sock.recv(_READ_BYTES)
            except OSError:
                data = b""
            if not data:
                os._exit(0)  # the daemon is gone: nothing to clean up that the kernel doesn't
            decoder.receive_data(data)
            while (frame := decoder.next_frame()) is not None:
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        match frame.message:
            case Ping(nonce=nonce):
                self._outbox.put([Frame(Pong(nonce=nonce))])
            case WorkerStats():
                self._outbox.put([Frame(self._stats())])
            case LoadSpans() as load:
                with self._wake:
                    self._load = load
                    self._wake.notify()
            case OpenSequence() | StepFrame() | History() | Cancel() | EndTurn() | CloseHop() as message:
                with self._wake:
                    self._scheduler.put(message.key, frame)
                    self._wake.notify()
            case _:
                pass  # messages that only the daemon receives

    def _stats(self) -> WorkerStats:
        worker = self._worker
        sequences = 0 if worker is None else worker.sequence_count()
        now = time.monotonic()
        with self._wake:
            waiting = len(self._scheduler)
            figures = self._speed.said(now)
        return WorkerStats(
            kv_bytes=self._kv_bytes,
            sequences=sequences,
            waiting=waiting,
            kv_budget=0 if worker is None else worker.budget.total,
            kv_busy=self._kv_busy,
            step_ms=figures.step_ms,
            prompt_ms=figures.prompt_ms,
            queue=figures.queue,
        )

    def _write(self) -> None:
        while (frames := self._outbox.get()) is not None:
            # The answers of a batch leave together, so that the next steps come back together.
            parts = [part for frame in frames for part in encode(frame)]
            if sum(map(len, parts)) <= _ONE_WRITE_BYTES:
                parts = [b"".join(parts)]
            try:
                for part in parts:
                    self._sock.sendall(part)
            except OSError:
                os._exit(0)


class Progress:
    """Load progress as frames, a few a second and the last one always."""

    def __init__(self, outbox: queue.SimpleQueue[list[Frame] | None], watch: LoadWatch) -> None:
        self._outbox = outbox
        self._watch = watch
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        done, total = (min(max(int(number), 0), 2**63 - 1) for number in (done, total))  # foreign code calls
        self._watch.sign()
        now = time.monotonic()
        if now - self._last >= _PROGRESS_INTERVAL_S or done >= total:
            self._last = now
            self._outbox.put([Frame(LoadProgress(done=done, total=total))])


def main(argv: list[str]) -> int:
    """`python -m dgnd.worker FD NOTE_FD PARENT_PID LOG_LEVEL`."""
    fd, note_fd, parent_pid = (int(argument) for argument in argv[:3])
    die_with_parent(parent_pid)
    be_first_to_go()
    faulthandler.enable()  # a plugin that crashes shows in the log where
    log_to_stderr(logging.WARNING)  # as the daemon does; libraries tell more than anybody wants
    logging.getLogger("dgn_backends").setLevel(argv[3])
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the daemon's to handle
        signal.signal(number, signal.SIG_IGN)
    return WorkerProcess(socket.socket(fileno=fd), RunningNote(note_fd)).run()
