"""What a worker hears and says over its socketpair: order, while it computes, and when nobody reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dgn_backends.tensor import Tensor
from dgnd.wire.codec import encode_bytes
from dgnd.wire.decoder import WORKER, FrameDecoder
from dgnd.wire.limits import DEFAULT_LIMITS
from dgnd.wire.messages import Frame, HopKey, Ping, Pong, StepFrame
from dgnd.worker.inlet import TICK_S, Inlet
from dgnd.worker.outlet import Outlet


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    yield ours, theirs
    time.sleep(3 * TICK_S)
    theirs.close()  # first: what reads there would end this process with the daemon that it takes it for
    ours.close()


def step(number: int, kib: int) -> Frame:
    """A step that is told by its start, with so many KiB of hidden states."""
    rows = Tensor.from_numpy(np.full((kib, 256), number, np.float32), "f32")
    message = StepFrame(
        key=HopKey("o", "s", 1), branch=0, route=1, start=number, count=kib, digest_start=0, digest_end=0
    )
    return Frame(message, rows)


def read_frames(sock: socket.socket, count: int) -> list[Frame]:
    decoder = FrameDecoder(DEFAULT_LIMITS, WORKER)
    frames: list[Frame] = []
    while len(frames) < count:
        data = sock.recv(1 << 16)
        assert data
        decoder.receive_data(data)
        while (frame := decoder.next_frame()) is not None:
            frames.append(frame)
    assert decoder.buffered == 0
    return frames


def test_all_frames_arrive_whole_and_in_order_when_the_daemon_reads_late(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outlet = Outlet(theirs)
    sent = [step(number, kib) for number, kib in enumerate([1, 64, 8, 300, 1, 1, 128, 2])]
    begun = time.monotonic()
    for frame in sent:  # far more than a socketpair holds, and nobody reads
        outlet.send([frame])
    outlet.send([Frame(Pong(nonce=7)), Frame(Pong(nonce=8))])
    assert time.monotonic() - begun < 5
    came = read_frames(ours, len(sent) + 2)
    assert [frame.message for frame in came[:-2]] == [frame.message for frame in sent]
    for mine, theirs_ in zip(sent, came, strict=False):
        assert mine.payload is not None
        assert theirs_.payload is not None
        assert bytes(mine.payload.data) == bytes(theirs_.payload.data)
    assert [frame.message for frame in came[-2:]] == [Pong(nonce=7), Pong(nonce=8)]


def test_frames_of_several_threads_are_not_mixed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outlet = Outlet(theirs)

    def say(first: int) -> None:
        for number in range(first, first + 40):
            outlet.send([step(number, 1 + number % 90)])

    threads = [threading.Thread(target=say, args=(first,)) for first in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    starts = [frame.message.start for frame in read_frames(ours, 120) if isinstance(frame.message, StepFrame)]
    for thread in threads:
        thread.join()
    for first in (0, 1000, 2000):
        mine = [start for start in starts if first <= start < first + 1000]
        assert mine == list(range(first, first + 40))


def test_the_last_words_get_out_before_close_returns(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outlet = Outlet(theirs)
    outlet.send([step(0, 900)])  # does not fit
    reader = threading.Timer(0.3, lambda: frames.extend(read_frames(ours, 1)))
    frames: list[Frame] = []
    reader.start()
    outlet.close(10)
    reader.join()
    assert len(frames) == 1


class Heard:
    """What an inlet took, and on which threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.frames: list[Frame] = []
        self.threads: list[str] = []
        self.inlet = Inlet(sock, self._take)

    def _take(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.threads.append(threading.current_thread().name)

    def wait_for(self, count: int, within_s: float = 10) -> None:
        deadline = time.monotonic() + within_s
        while len(self.frames) < count and time.monotonic() < deadline:
            time.sleep(0.002)
        assert len(self.frames) >= count


def test_a_thread_that_has_nothing_to_do_reads_itself(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    heard = Heard(theirs)
    for number in range(50):
        ours.sendall(encode_bytes(step(number, 8)))
        heard.inlet.read_until(lambda number=number: len(heard.frames) > number)
        heard.inlet.leave()
        heard.inlet.come_back()
    assert set(heard.threads) == {threading.current_thread().name}


def test_another_thread_reads_while_the_first_computes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    heard = Heard(theirs)
    time.sleep(80 * TICK_S)  # the one that stands in has gone to sleep
    heard.inlet.leave()
    for number in range(20):
        ours.sendall(encode_bytes(step(number, 64)))  # more than the socketpair holds
    heard.wait_for(20)
    assert set(heard.threads) == {"reader"}
    heard.inlet.come_back()
    time.sleep(3 * TICK_S)
    ours.sendall(encode_bytes(Frame(Ping(nonce=1))))
    heard.inlet.read_until(lambda: len(heard.frames) == 21)
    starts = [frame.message.start for frame in heard.frames if isinstance(frame.message, StepFrame)]
    assert starts == list(range(20))


def test_no_frame_is_lost_or_swapped_when_the_threads_take_turns(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    heard = Heard(theirs)
    count = 400

    def say() -> None:
        for number in range(count):
            ours.sendall(encode_bytes(step(number, 1 + number % 50)))
            if number % 20 == 0:
                time.sleep(0.01)

    thread = threading.Thread(target=say)
    thread.start()
    taken = 0
    while taken < count:
        heard.inlet.read_all()
        heard.inlet.read_until(lambda taken=taken: len(heard.frames) > taken)
        taken = len(heard.frames)
        heard.inlet.leave()
        time.sleep((taken % 7) * 0.012)  # some absences shorter than a tick, some longer than two
        heard.inlet.come_back()
    thread.join()
    starts = [frame.message.start for frame in heard.frames if isinstance(frame.message, StepFrame)]
    assert starts == list(range(count))
    assert len(set(heard.threads)) == 2


_IDLE = """
import socket, sys, time
from dgnd.worker.inlet import Inlet
taken = []
inlet = Inlet(socket.socket(fileno=int(sys.argv[1])), taken.append)
inlet.read_until(lambda: taken)
print("heard", flush=True)
inlet.leave(); inlet.come_back()
inlet.read_until(lambda: len(taken) > 1)
"""


def test_a_worker_without_work_takes_no_cpu_and_ends_with_its_daemon(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    command = [sys.executable, "-c", _IDLE, str(theirs.fileno())]
    with subprocess.Popen(
        command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, env=_environment()
    ) as it:
        theirs.close()
        try:
            ours.sendall(encode_bytes(Frame(Ping(nonce=1))))
            assert it.stdout is not None
            assert it.stdout.readline() == b"heard\n"
            time.sleep(80 * TICK_S)
            before = _switches(it.pid)
            time.sleep(1)
            assert _switches(it.pid) - before < 5
            ours.close()
            assert it.wait(10) == 0
        finally:
            it.kill()


def _switches(pid: int) -> int:
    """How often its threads have waited."""
    paths = Path(f"/proc/{pid}/task").glob("*/status")
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
