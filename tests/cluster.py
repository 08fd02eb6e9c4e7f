"""Real daemons on loopback for tests: configurations written, processes started, watched and ended.

A node is named in the test; every node knows the peers that it is told to. Nothing here knows what is tested.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError
from dgnd.identity import IDENTITY_FILE, Identity

#: Deadlines of tests are generous: the machine may be busy.
READY_S = 120.0
POLL_S = 0.05
#: Ports for daemons: each process of tests has PORTS of them for itself.
FIRST_PORT, LAST_PORT, PORTS = 10_000, 30_000, 500


@cache
def _ports() -> tuple[socket.socket, Iterator[int]]:
    """A block of ports that no other test process takes from, and the claim on it, which ends with us.

    They are below those that the kernel gives to connections: nobody has one by chance before its daemon.
    """
    for block in range(FIRST_PORT, LAST_PORT, PORTS):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0dgn-test-ports-{block}")
        except OSError:
            claim.close()
        else:
            return claim, itertools.cycle(range(block, block + PORTS))
    raise AssertionError("every block of ports is claimed")


def free_port() -> int:
    """A TCP port on loopback that nothing listens at, and that no test besides is given soon."""
    _, ports = _ports()
    for port in itertools.islice(ports, PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")


def trained_model(name: str) -> Path | None:
    """One of the trained models to test with, or None where this machine lacks it."""
    root = os.environ.get("DGN_TEST_MODELS")
    folder = Path(root) if root else Path(__file__).resolve().parents[2] / "shared" / "models"
    return folder / name if (folder / name / "config.json").is_file() else None


@dataclass
class Row:
    """One row of the BlocksMap as a test writes it: `peer` is a node of the cluster (itself becomes self)."""

    peer: str
    span: str
    model: str = "m"
    max_bytes: int | None = None


@dataclass
class TestNode:
    """One daemon: its files and its process."""

    __test__ = False

    name: str
    directory: Path
    port: int
    peer_id: str = ""
    dialled_at: int | None = None  #: the port that others are told, where it is not its own
    process: subprocess.Popen[bytes] | None = None
    extra_env: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    before: Sequence[str] = ()  #: what its command begins with: another network, say
    pass_fds: Sequence[int] = ()  #: what its process inherits

    @property
    def socket(self) -> Path:
        """Its control socket."""
        return self.directory / "s"

    @property
    def config(self) -> Path:
        """Its configuration."""
        return self.directory / "dgn.toml"

    @property
    def address(self) -> str:
        """Where it listens, with its peer id."""
        return f"/ip4/{self.host}/tcp/{self.port}/p2p/{self.peer_id}"

    @property
    def log(self) -> str:
        """What it logged so far."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Starts the daemon; does not wait."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.before, sys.executable, "-m", "dgnd", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.extra_env},
                pass_fds=self.pass_fds,
            )

    def ctl(
        self, *arguments: str, check: bool = True, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs dgnctl against it."""
        command = [sys.executable, "-m", "dgnctl", "--socket", str(self.socket), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if check and result.returncode != 0:
            raise AssertionError(
                f"dgnctl {' '.join(arguments)} at {self.name}: exit {result.returncode}\n{result.stdout}"
                f"{result.stderr}\n--- log\n{self.log}"
            )
        return result

    def ctl_json(self, *arguments: str, check: bool = True, timeout: float = 120.0) -> Any:
        """The object that dgnctl --json prints."""
        return json.loads(self.ctl(*arguments, "--json", check=check, timeout=timeout).stdout)

    def run(self, prompt: str, *options: str, **keywords: Any) -> Any:
        """`dgnctl run --raw --json`."""
        return self.ctl_json("run", "--raw", *options, prompt, **keywords)

    def wait_ready(self, state: str = "ready", timeout: float = READY_S) -> None:
        """Waits until the daemon's status says so."""
        self.wait_for(lambda: self.state() == state, timeout, f"state {state}")

    def state(self) -> str | None:
        """The state in its status, asked without a process of dgnctl; None where nothing answers."""
        try:
            return self.status().state
        except DgnError:
            return None

    def status(self) -> api.Status:
        """Its status, asked without a process of dgnctl. Raises DgnError."""
        with ControlClient(self.socket) as client:
            found: api.Status = client.call("status")
        return found

    def wait_for(self, condition: Any, timeout: float = READY_S, what: str = "condition") -> None:
        """Waits until `condition()` is true."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{self.log}")
            if condition():
                return
            time.sleep(POLL_S)
        raise AssertionError(
            f"{self.name}: no {what} within {timeout:.0f} s\n"
            f"{self.ctl('status', check=False).stdout}\n--- log\n{self.log}"
        )

    def worker_pids(self) -> list[int]:
        """Its workers' pids, as it reports them."""
        return [worker.pid for worker in self.status().workers if worker.pid]

    def children(self) -> list[psutil.Process]:
        """Its child processes, as the kernel knows them."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """kill -9 of the daemon, by pid alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        """Sends the daemon a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(timeout)


class Cluster:
    """Nodes of one test; a context manager that leaves no process behind."""

    __test__ = False

    def __init__(self, directory: Path, model: Path | str | None, backend: str = "reference") -> None:
        self.directory = directory
        self.model = model
        self.backend = backend
        self.nodes: dict[str, TestNode] = {}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            if node.process is not None and node.process.poll() is None:
                node.process.terminate()
        for node in self.nodes.values():
            if node.process is not None:
                try:
                    node.process.wait(60)
                except subprocess.TimeoutExpired:
                    node.process.kill()
                    node.process.wait()
                    raise

    def add(self, name: str) -> TestNode:
        """A node with an identity, not yet configured."""
        directory = self.directory / name
        directory.mkdir(parents=True)
        (directory / "state").mkdir(mode=0o700)
        peer_id = Identity.load_or_create(directory / "state" / IDENTITY_FILE).peer_id
        node = TestNode(name, directory, free_port(), peer_id)
        self.nodes[name] = node
        return node

    def configure(
        self,
        name: str,
        rows: Sequence[Row],
        peers: Sequence[str] = (),
        models: Mapping[str, Mapping[str, Any]] | None = None,
        more: str = "",
        node: Mapping[str, Any] | None = None,
    ) -> TestNode:
        """Writes a node's configuration. `peers`: names of nodes it lists; `models`: by default one, "m";
        `node`: further keys of [node]."""
        this = self.nodes[name]
        if models is None:
            models = {"m": {"path": str(self.model), "backend": self.backend}}
        lines = [
            "[node]",
            f'name = "{name}"',
            f'state_dir = "{this.directory / "state"}"',
            f'listen = ["/ip4/{"0.0.0.0" if this.before else this.host}/tcp/{this.port}"]',
            *(f"{key} = {json.dumps(value)}" for key, value in (node or {}).items()),
            "[control]",
            f'socket = "{this.socket}"',
        ]
        for model, keys in models.items():
            lines += [f"[models.{model}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        for peer in peers:
            other = self.nodes[peer]
            lines += [f"[peers.{peer}]", f'id = "{other.peer_id}"']
            lines += [f'addrs = ["/ip4/{other.host}/tcp/{other.dialled_at or other.port}"]']
        for row in rows:
            peer = "self" if row.peer == name else row.peer
            lines += ["[[blocks]]", f'model = "{row.model}"', f'peer = "{peer}"', f'span = "{row.span}"']
            lines += [] if row.max_bytes is None else [f"max_bytes = {row.max_bytes}"]
        this.config.write_text("\n".join([*lines, more, ""]))
        return this

    def start(self, *names: str, state: str = "ready") -> None:
        """Starts nodes (all by default) and waits until each is ready."""
        chosen = [self.nodes[name] for name in names] or list(self.nodes.values())
        for node in chosen:
            node.start()
        for node in chosen:
            node.wait_ready(state)

    def full_mesh(self, rows: Sequence[Row], **keywords: Any) -> None:
        """Adds every node that the rows name, all knowing each other, and starts them."""
        names = list(dict.fromkeys(row.peer for row in rows))
        for name in names:
            if name not in self.nodes:
                self.add(name)
        for name in self.nodes:
            self.configure(name, rows, [other for other in self.nodes if other != name], **keywords)
        self.start()
