"""Follows one generation to its end, and watches what may stop it: Ctrl-C, keys, a stdout that is gone."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Final

from dgnctl.output import StdoutClosed
from dgnd.control.api import GenerateDelta, GenerateResult
from dgnd.control.client import GenerateStream
from dgnd.errors import Cancelled

STOP_GRACE_S: Final = 3.0  #: for dgnd to answer a cancel
_GONE: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Unwatched(Exception):
    """Raised by a callback of `follow`'s `watch`: nothing more is to be expected of that file."""


class Interrupts:
    """Ctrl-C as something to poll: `fileno` is readable once it came, `count` says how often."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.count = 0
        self._read_fd = read_fd
        self._write_fd = write_fd

    def fileno(self) -> int:
        """Readable after a Ctrl-C."""
        return self._read_fd

    def take(self) -> None:
        """Makes it unreadable again."""
        os.read(self._read_fd, 4096)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C ends the program, also where it waits for a slow stdout."""
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        os.write(self._write_fd, b"!")


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """While it lasts, the first Ctrl-C raises nothing and is noted."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    noted = Interrupts(read_fd, write_fd)
    before = signal.signal(signal.SIGINT, noted.note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(read_fd)
        os.close(write_fd)


def follow(
    stream: GenerateStream,
    on_text: Callable[[str], None],
    noted: Interrupts,
    watch: Mapping[int, Callable[[], bool]] | None = None,
    pause: Callable[[], float] = lambda: math.inf,
    on_wait: Callable[[str], None] = lambda _: None,
) -> GenerateResult:
    """Gives the text to `on_text` as it comes, and what it waits for to `on_wait`, and returns the result.

    A Ctrl-C, or a callback of `watch` (by file descriptor, called when that is readable) that returns True,
    asks dgnd to stop. Whenever there is nothing more to give, `pause` is called and says for how many seconds
    at most it need not be called again. Where this raises, dgnd may still be at it; closing the connection
    ends that.

    Raises:
        DgnError: what dgnd answered, Cancelled when it did not answer within STOP_GRACE_S of being asked, or
            DaemonSilent when it gives no sign of life.
        StdoutClosed: nobody reads stdout.
    """
    watch = watch or {}
    poller = select.poll()
    poller.register(stream.client, select.POLLIN)
    poller.register(noted, select.POLLIN)
    for fd in watch:
        poller.register(fd, select.POLLIN)
    out = _stdout_fd()
    if out is not None and out not in watch:
        poller.register(out, 0)
    deadline: float | None = None
    while True:
        while events := stream.read():  # until it is empty: what comes after may be an error
            for event in events:
                if isinstance(event, GenerateResult):
                    return event
                assert isinstance(event, GenerateDelta)
                on_wait(event.waiting) if event.waiting else on_text(event.text)
        timeout = min(stream.client.left_s(), max(0.0, pause()))
        if deadline is not None:
            timeout = min(timeout, max(0.0, deadline - time.monotonic()))
        ready = poller.poll(timeout * 1000)
        stop = False
        for fd, state in ready:
            if fd == noted.fileno():
                noted.take()
                stop = True
            elif fd in watch:
                try:
                    stop = watch[fd]() or stop
                except Unwatched:
                    poller.unregister(fd)
            elif fd == out and state & _GONE:
                raise StdoutClosed
        if stop and deadline is None:
            stream.cancel()
            deadline = time.monotonic() + STOP_GRACE_S
        if deadline is not None and time.monotonic() >= deadline:
            raise Cancelled("stopped without waiting for dgnd, which frees what the answer used")
        if any(fd == stream.client.fileno() for fd, _ in ready):
            stream.client.fill()
        elif stream.client.left_s() == 0.0:
            stream.client.lapse()


def _stdout_fd() -> int | None:
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError):  # none, or one that is not a file
        return None
