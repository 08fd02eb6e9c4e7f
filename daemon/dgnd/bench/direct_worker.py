"""A worker process driven directly over its socketpair, without dgnd: what backend and worker do alone.

The frames, chunks and credits are those that dgnd uses. Knows nothing of peers or text; token ids go in and
times come out.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from dgn_backends.span import Span
from dgnd.errors import WorkerDied, error_from
from dgnd.sessions.session import OriginSession, RouteHop
from dgnd.wire.codec import encode
from dgnd.wire.decoder import WORKER, FrameDecoder
from dgnd.wire.limits import DEFAULT_LIMITS
from dgnd.wire.messages import (
    CloseHop,
    Credit,
    Failure,
    Frame,
    HopOpened,
    Loaded,
    LoadedSpan,
    LoadProgress,
    LoadSpans,
    OpenSequence,
    Sampling,
    TokenFrame,
)
from dgnd.workers.launch import worker_command, worker_environment
from dgnd.workers.running_note import RunningNote

_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Timed:
    """One generation: when the first token came and how long the rest took, in seconds."""

    prompt_tokens: int
    tokens: int
    prefill_s: float
    decode_s: float


class DirectWorker:
    """One worker process with the whole model; a context manager that ends it.

    Making it starts the process and waits until the model is loaded, `load_s` seconds from the start of the
    process. What the worker reports as a failure is raised as that error; WorkerDied where it just ends.
    """

    def __init__(self, load: LoadSpans, span: Span, environment: Mapping[str, str], max_chunk: int) -> None:
        self.span = span
        self.max_chunk = max_chunk
        self._hops = 0
        self._decoder = FrameDecoder(DEFAULT_LIMITS, WORKER)
        began = time.perf_counter()
        ours, theirs = socket.socketpair()
        note = RunningNote()  # which nobody reads
        with theirs, contextlib.closing(note):
            self.process = subprocess.Popen(
                worker_command(theirs.fileno(), note.fd, "WARNING"),
                pass_fds=[theirs.fileno(), note.fd],
                stdin=subprocess.DEVNULL,
                env=worker_environment(environment),
            )
        self._sock = ours
        try:
            self.send([Frame(load)])
            self.loaded: LoadedSpan = self._wait_loaded()
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - began

    def __enter__(self) -> DirectWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._sock.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # in a long step of a library that holds the interpreter
            self.process.kill()
            self.process.wait()

    def open(self, context: int) -> DirectSession:
        """An empty sequence that may grow to `context` positions."""
        self._hops += 1
        return DirectSession(self, self._hops, context)

    def generate(self, prompt: Sequence[int], count: int, context: int) -> Timed:
        """Greedy: the prompt in chunks under the worker's credits, then tokens one by one, `count` in all."""
        with self.open(context) as session:
            prefill_s = session.prefill(prompt)
            decode_s = decode([session], count - 1)
        return Timed(len(prompt), count, prefill_s, decode_s)

    def send(self, frames: Sequence[Frame]) -> None:
        """Sends frames in one write."""
        try:
            self._sock.sendall(b"".join(part for frame in frames for part in encode(frame)))
        except OSError:
            raise self._died() from None

    def receive(self) -> list[Frame]:
        """Waits for a frame; returns all that have come."""
        frames: list[Frame] = []
        while not frames:
            data = self._sock.recv(_READ_BYTES)
            if not data:
                raise self._died()
            self._decoder.receive_data(data)
            while (frame := self._decoder.next_frame()) is not None:
                if isinstance(frame.message, Failure):
                    raise error_from(frame.message.kind, frame.message.message, {})
                frames.append(frame)
        return frames

    def _wait_loaded(self) -> LoadedSpan:
        while True:
            for frame in self.receive():
                if isinstance(frame.message, Loaded):
                    return frame.message.spans[0]
                assert isinstance(frame.message, LoadProgress), frame.message

    def _died(self) -> WorkerDied:
        return WorkerDied(f"the worker ended with exit code {self.process.wait()}; its log is above")


class DirectSession:
    """One sequence of a DirectWorker; a context manager that closes it."""

    def __init__(self, worker: DirectWorker, hop: int, context: int) -> None:
        self._worker = worker
        self._session = OriginSession("bench", f"s{hop}", "m")
        self._session.set_route((RouteHop(hop, "worker", worker.span),))
        self.key = self._session.key(hop)
        worker.send([Frame(OpenSequence(key=self.key, span=str(worker.span), max_positions=context))])
        (frame,) = worker.receive()
        assert isinstance(frame.message, HopOpened), frame.message
        self._session.resume(0, frame.message.credits, new=True)

    def __enter__(self) -> DirectSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._worker.send([Frame(CloseHop(key=self.key))])

    @property
    def worker(self) -> DirectWorker:
        """Where it runs."""
        return self._worker

    @property
    def tokens(self) -> list[int]:
        """Its ids so far: the last one has not been through the model."""
        return self._session.tokens

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds from the first chunk of `prompt` to the first token, which is appended."""
        began = time.perf_counter()
        self._session.set_tokens(prompt)
        while True:
            self._worker.send(self.steps())
            if self.take(self._worker.receive()):
                return time.perf_counter() - began

    def rewind(self, length: int) -> None:
        """Forgets all ids from `length` on; the next step goes on from there."""
        self._session.set_tokens(self._session.tokens[:length])

    def steps(self) -> list[Frame]:
        """What can be sent now."""
        frames = []
        while (frame := self._session.next_step(Sampling(), self._worker.max_chunk)) is not None:
            frames.append(frame)
        return frames

    def take(self, frames: Sequence[Frame]) -> bool:
        """Takes the answers that are its own; whether a token was among them."""
        token = False
        for frame in frames:
            if getattr(frame.message, "key", None) == self.key:
                if isinstance(frame.message, Credit):
                    self._session.credit(frame.message.stop)
                if isinstance(frame.message, TokenFrame):
                    self._session.credit(frame.message.position)
                    self._session.append(frame.message.token_id)
                    token = True
        return token


def decode(sessions: Sequence[DirectSession], count: int) -> float:
    """Seconds in which each session, all of one worker, makes `count` more tokens, side by side."""
    worker = sessions[0].worker
    left = dict.fromkeys(sessions, count)
    began = time.perf_counter()
    if count:
        worker.send([frame for session in sessions for frame in session.steps()])
    while left and count:
        frames = worker.receive()
        ready = [session for session in left if session.take(frames)]
        for session in ready:
            left[session] -= 1
        left = {session: more for session, more in left.items() if more}
        worker.send([frame for session in ready if session in left for frame in session.steps()])
    return time.perf_counter() - began
