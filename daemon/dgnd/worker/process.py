"""The worker process: one thread that computes, reads and writes around one `SpanWorker`, and two that help.

A step that finds the worker idle wakes this thread alone. While it computes, another one reads and answers
pings and stats (`inlet`), so the daemon hears of it also while a batch runs; what the socketpair does not
take at once a third one writes (`outlet`), so neither end waits on a write before it reads. The process ends
when the daemon does: by EOF, and by PR_SET_PDEATHSIG where no EOF comes. Knows nothing of what frames mean to
the origin.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
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
from dgnd.logs.setup import log_to_stderr
from dgnd.wire.messages import (
    Cancel,
    CloseHop,
    EndTurn,
    Failure,
    Frame,
    History,
    KvLimit,
    Loaded,
    LoadProgress,
    LoadSpans,
    OpenSequence,
    Ping,
    Pong,
    StepFrame,
    WorkerStats,
)
from dgnd.worker.heap import trim
from dgnd.worker.inlet import Inlet
from dgnd.worker.joined import hops_of, overtakes, positions
from dgnd.worker.load_watch import LoadWatch
from dgnd.worker.outlet import Outlet
from dgnd.worker.pace import Pace
from dgnd.worker.runner import SpanWorker
from dgnd.worker.scheduler import Scheduler, kind_of
from dgnd.worker.speed import Speed
from dgnd.worker.tally import Tally
from dgnd.worker.watchdog import Watchdog
from dgnd.workers.running_note import RunningNote

_PROGRESS_INTERVAL_S = 0.2
_LAST_WORDS_S = 5.0
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
        self._note = note
        self._scheduler = Scheduler()
        self._waiting = threading.Lock()  # guards _scheduler
        self._load: LoadSpans | None = None
        self._outlet = Outlet(sock)
        self._inlet = Inlet(sock, self._take)
        self._worker: SpanWorker | None = None
        self._kv_bytes = self._kv_busy = 0
        self._kv_limit: KvLimit | None = None  # that is to be taken
        self._speed = Speed()  # guarded by _waiting
        self._tally = Tally()  # guarded by _waiting

    def run(self) -> int:
        """Computes on the calling thread until the daemon hangs up."""
        self._inlet.read_until(lambda: self._load)
        self._inlet.leave()
        request = self._load
        assert request is not None
        pid = os.getpid()
        label = label_of(request.backend)
        try:
            what = "nothing of it moved while it loaded"
            with LoadWatch(lambda: self._hung(label, what)) as watch:
                self._worker = worker = SpanWorker(request, Progress(self._outlet, watch))
                worker.self_test()
            trim()
            gc.freeze()  # modules and the plan stay: looking through them again and again delays steps
            if os.getpid() == pid:  # else this is a copy that the plugin made by forking
                loaded = Loaded(
                    spans=worker.loaded(),
                    device=request.device,
                    private_weights=worker.private_weights,
                    apart=worker.apart,
                )
                self._outlet.send([Frame(loaded)])
                what = f"a batch took more than {HUNG_S:.0f} s"
                self._inlet.come_back()
                self._compute(worker, Watchdog(HUNG_S, lambda: self._hung(label, what)))
        except DgnError as error:
            self._fail(error.kind, error.message)
        except BaseException as error:  # noqa: BLE001 - a plugin is foreign code, beside which anything may fail
            traceback.print_exc()
            self._fail("backend", f"{label}: the worker failed: {raised(error)}")
        return self._end()

    def _end(self) -> int:
        """Lets the last words out; the exit code."""
        self._outlet.close(_LAST_WORDS_S)
        return 1

    def _hung(self, label: str, what: str) -> None:
        """A call of the plugin does not come back: says so, shows in the log where it is, and ends the
        process."""
        faulthandler.dump_traceback()
        self._fail("backend", f"{label} hung: {what}")
        os._exit(self._end())

    def _fail(self, kind: str, message: str) -> None:
        self._outlet.send([Frame(Failure(kind=kind, message=message[:4096], tag="w.load"))])

    def _compute(self, worker: SpanWorker, watchdog: Watchdog) -> None:
        pid, pace = os.getpid(), Pace()
        held: list[Frame] = []  # answers to chunks that a batch of decode steps goes before
        while True:
            self._gather(worker, watchdog, pace)
            with self._waiting:
                batch = self._scheduler.take(pace.budget)
                self._tally.taken(batch, time.monotonic())
                beside = self._scheduler.beside(batch)
            if held and not overtakes(batch, held):
                self._outlet.send(held)
                held = []
            self._inlet.leave()
            begun = time.monotonic()
            self._note.write(hops_of(batch))
            with watchdog:
                answers = worker.run(batch)
            if os.getpid() != pid:
                return  # a copy that the plugin made by forking
            self._note.write(())
            ended = time.monotonic()
            failed = any(isinstance(answer.message, Failure) for answer in answers)
            answers, held = answers + held, []
            is_chunk = kind_of(batch[0]) == "chunk"
            # The next hop works on the answers while this one still looks at how long they took.
            if answers and not is_chunk:
                self._outlet.send(answers)
            with watchdog:
                kv_bytes = worker.kv_bytes()
            if os.getpid() != pid:
                return
            pace.observe(positions(batch), ended - begun)
            if not failed and isinstance(batch[0].message, StepFrame):
                with self._waiting:
                    self._speed.observe(worker.works(batch), begun, ended, beside)
                    self._tally.computed(batch, ended - begun)
            self._kv_bytes, self._kv_busy = kv_bytes, worker.budget.busy_bytes
            self._inlet.come_back()
            if is_chunk and self._somebody_decodes():
                held = answers
            elif is_chunk and answers:
                self._outlet.send(answers)

    def _somebody_decodes(self) -> bool:
        """Whether a decode step waits: it has the next turn, and is to reach the next hop before what was
        computed of a prompt meanwhile, or it would wait there for a chunk as well."""
        self._inlet.read_all()
        with self._waiting:
            return self._scheduler.decode_waits()

    def _gather(self, worker: SpanWorker, watchdog: Watchdog, pace: Pace) -> None:
        """Reads until there is something to do, and a little longer for the hops of the last batch, as long
        as they keep coming."""
        if self._scheduler:
            self._inlet.read_all()
        while not self._scheduler or self._kv_limit is not None:
            self._inlet.read_until(lambda: self._scheduler or self._kv_limit)
            if self._kv_limit is not None:
                limit, self._kv_limit = self._kv_limit, None
                with watchdog:
                    worker.limit_kv(limit.n_bytes)
                    self._kv_bytes, self._kv_busy = worker.kv_bytes(), worker.budget.busy_bytes
        deadline = time.monotonic() + pace.all_patience_s
        while not self._scheduler.is_gathered() and (left := deadline - time.monotonic()) > 0:
            if not self._inlet.read_within(min(pace.patience_s, left)):
                return

    def _take(self, frame: Frame) -> None:
        match frame.message:
            case StepFrame() | OpenSequence() | History() | Cancel() | EndTurn() | CloseHop() as message:
                with self._waiting:
                    self._scheduler.put(message.key, frame)
                    self._tally.put(frame, time.monotonic())
            case Ping(nonce=nonce):
                self._outlet.send([Frame(Pong(nonce=nonce))])
            case WorkerStats():
                self._outlet.send([Frame(self._stats())])
            case LoadSpans() as load:
                self._load = load
            case KvLimit() as limit:
                self._kv_limit = limit
            case _:
                pass  # messages that only the daemon receives

    def _stats(self) -> WorkerStats:
        worker = self._worker
        sequences = 0 if worker is None else worker.sequence_count()
        now = time.monotonic()
        with self._waiting:
            waiting = len(self._scheduler)
            figures = self._speed.said(now)
            done = self._tally.said()
        return WorkerStats(
            kv_bytes=self._kv_bytes,
            sequences=sequences,
            waiting=waiting,
            kv_budget=0 if worker is None else worker.budget.total,
            kv_busy=self._kv_busy,
            step_ms=figures.step_ms,
            prompt_ms=figures.prompt_ms,
            queue=figures.queue,
            done=done,
        )


class Progress:
    """Load progress as frames, a few a second and the last one always."""

    def __init__(self, outlet: Outlet, watch: LoadWatch) -> None:
        self._outlet = outlet
        self._watch = watch
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        done, total = (min(max(int(number), 0), 2**63 - 1) for number in (done, total))  # foreign code calls
        self._watch.sign()
        now = time.monotonic()
        if now - self._last >= _PROGRESS_INTERVAL_S or done >= total:
            self._last = now
            self._outlet.send([Frame(LoadProgress(done=done, total=total))])


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
