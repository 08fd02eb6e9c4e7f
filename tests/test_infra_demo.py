"""`make demo`, without make: two daemons answer, and nothing is left behind whichever way it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dgn_backends.bundled import bundled_model
from dgn_backends.span import parse_units

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/demo.py"
PATIENCE_S = 120.0
N_BLOCKS = 8

pytestmark = pytest.mark.skipif(
    bundled_model("dgn-demo") is None, reason="the bundled model dgn-demo is absent"
)


class Demo:
    """The script, started with a temporary directory of its own, in a process group of its own."""

    def __init__(self, directory: Path, prompt: str = "") -> None:
        self.directory = directory
        self.errors = directory / "stderr"
        environ = {**os.environ, "TMPDIR": str(directory), "DGN_DEMO_PROMPT": prompt}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=0,
            )

    @property
    def sockets(self) -> list[Path]:
        """The control sockets, the one that is chatted with first."""
        return sorted(self.directory.glob("dgn-demo-*/*/dgnd.sock"), reverse=True)

    def descendants(self) -> list[psutil.Process]:
        """Every process that the demo started, the keeper among them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, what: str, found: Callable[[], bool]) -> None:
        """Until it is so, or the script ended, which is a failure."""
        until = time.monotonic() + PATIENCE_S
        while not found():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < until, f"no {what}:\n{self.errors.read_text()}"
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        self.wait_for("readiness", lambda: "desk: ready; attic: ready" in self.errors.read_text())

    def assert_nothing_is_left(self, processes: list[psutil.Process]) -> None:
        """All `processes` end within the daemons' time to stop, and the directory goes."""
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not [process.cmdline() for process in alive]
        assert list(self.directory.glob("dgn-demo-*")) == []


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    directory = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))  # a socket's path must be short
    demos: list[Demo] = []

    def begin(prompt: str = "") -> Demo:
        demos.append(Demo(directory, prompt))
        return demos[-1]

    yield begin
    for demo in demos:
        with contextlib.suppress(ProcessLookupError):
            demo.process.kill()
        demo.process.wait()
        for pipe in (demo.process.stdin, demo.process.stdout):
            assert pipe is not None
            pipe.close()
    until = time.monotonic() + 12
    while list(directory.glob("dgn-demo-*")) and time.monotonic() < until:
        time.sleep(0.05)
    shutil.rmtree(directory)


def test_a_prompt_is_answered_on_stdout(start: Callable[..., Demo]) -> None:
    demo = start("How do I connect a peer?")
    demo.wait_for("daemons", lambda: len(demo.sockets) == 2)
    started = demo.descendants()
    answer, _ = demo.process.communicate(timeout=PATIENCE_S)
    assert demo.process.returncode == 0, demo.errors.read_text()
    assert answer.strip()
    assert "demo: " not in answer.decode()
    demo.assert_nothing_is_left(started)


def test_the_route_has_both_nodes_and_every_block_once(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_until_ready()
    client = [Path(sys.executable).parent / "dgnctl", "--socket", demo.sockets[0]]
    done = subprocess.run(
        [*client, "run", "--json", "--max-tokens", "4", "Hello"], capture_output=True, check=True, text=True
    )
    route = json.loads(done.stdout)["route"]
    assert len({hop["peer"] for hop in route}) == 2
    units = [unit for hop in route for unit in sorted(parse_units(hop["span"], N_BLOCKS))]
    assert units == list(range(N_BLOCKS + 2))
    started = demo.descendants()
    demo.process.communicate(b"exit\n", timeout=PATIENCE_S)
    assert demo.process.returncode == 0, demo.errors.read_text()
    demo.assert_nothing_is_left(started)


@pytest.mark.parametrize(
    ("how", "ready"),
    [
        ("kill", False),
        ("kill", True),
        ("terminate", False),
        ("hang up", True),
        ("ctrl-c", False),
        ("ctrl-c", True),
    ],
    ids=lambda value: value if isinstance(value, str) else "chatting" if value else "loading",
)
def test_nothing_is_left_behind(start: Callable[..., Demo], how: str, ready: bool) -> None:
    demo = start()
    if ready:
        demo.wait_until_ready()
    else:
        demo.wait_for("daemons", lambda: len(demo.sockets) == 2)
    started = demo.descendants()
    assert len(started) >= 3  # the keeper and two daemons, perhaps workers
    if how == "ctrl-c":
        os.killpg(demo.process.pid, signal.SIGINT)
        if ready:  # a chat may take Ctrl-C as "stop the answer"; the end of its input ends it
            assert demo.process.stdin is not None
            demo.process.stdin.close()
    else:
        signals = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "hang up": signal.SIGHUP}
        demo.process.send_signal(signals[how])
    demo.process.wait(timeout=60)
    demo.assert_nothing_is_left(started)


def test_a_daemon_that_ends_is_said(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("daemons", lambda: len(demo.sockets) == 2)
    started = demo.descendants()
    daemon = next(each for each in started if "--config" in each.cmdline() and "attic" in each.cmdline()[-1])
    daemon.kill()
    demo.process.wait(timeout=60)
    assert demo.process.returncode == 1
    assert "the daemon of attic ended" in demo.errors.read_text()
    demo.assert_nothing_is_left(started)
