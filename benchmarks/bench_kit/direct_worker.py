"""A worker driven directly over its socketpair, without dgnd: what the backend and the worker do alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from dgn_backends.span import Span
from dgnd.session import OriginSession, RouteHop
from dgnd.wire.codec import WORKER, FrameDecoder, encode
from dgnd.wire.limits import DEFAULT_LIMITS
from dgnd.wire.messages import (
    CloseHop,
    Credit,
    Failure,
    Frame,
    HopOpened,
    Loaded,
    LoadProgress,
    LoadSpans,
    OpenSequence,
    Sampling,
    TokenFrame,
)

_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Timed:
    """One generation: when the first token came and how long the rest took, in seconds."""

    prompt_tokens: int
    tokens: int
    prefill_s: float
    decode_s: float


class DirectWorker:
    """One worker process with the whole model; a context manager that ends it."""

    def __init__(self, load: LoadSpans, span: Span, environment: dict[str, str]) -> None:
        self._span = span
        self._hop = 0
        self._decoder = FrameDecoder(DEFAULT_LIMITS, WORKER)
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dgnd.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._sock = ours
        self._send(Frame(load))
        while not isinstance(message := self._receive().message, Loaded):
            assert isinstance(message, LoadProgress), message

    def __enter__(self) -> DirectWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()
        self.process.wait(10)

    def generate(self, prompt: Sequence[int], count: int, max_chunk: int, context: int) -> Timed:
        """Greedy: the prompt in chunks under the worker's credits, then `count` tokens one by one."""
        self._hop += 1
        session = OriginSession("bench", "s", "m")
        session.set_route((RouteHop(self._hop, "worker", self._span),))
        key = session.key(self._hop)
        self._send(Frame(OpenSequence(key=key, span=str(self._span), max_positions=context)))
        opened = self._receive().message
        assert isinstance(opened, HopOpened), opened
        session.set_credits(opened.credits)
        began = first = time.perf_counter()
        session.set_tokens(prompt)
        for index in range(count):
            session.append(self._next_token(session, max_chunk))
            if index == 0:
                first = time.perf_counter()
        ended = time.perf_counter()
        self._send(Frame(CloseHop(key=key)))
        return Timed(len(prompt), count, first - began, ended - first)

    def _next_token(self, session: OriginSession, max_chunk: int) -> int:
        while True:
            while (frame := session.next_step(Sampling(), max_chunk)) is not None:
                self._send(frame)
            message = self._receive().message
            assert isinstance(message, TokenFrame | Credit), message
            session.credits += 1
            if isinstance(message, TokenFrame):
                return message.token_id

    def _send(self, frame: Frame) -> None:
        for part in encode(frame):
            self._sock.sendall(part)

    def _receive(self) -> Frame:
        while (frame := self._decoder.next_frame()) is None:
            data = self._sock.recv(_READ_BYTES)
            if not data:
                raise SystemExit(f"the worker ended with {self.process.wait()}")
            self._decoder.receive_data(data)
        if isinstance(frame.message, Failure):
            raise SystemExit(f"the worker failed: {frame.message.message}")
        return frame
