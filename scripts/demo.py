"""`make demo`: two dgnd on this machine share the bundled model, and a chat with them.

Each daemon holds half of the blocks and nothing else, in a temporary directory. With $DGN_DEMO_PROMPT it
answers that once on stdout; everything else goes to stderr. A keeper process ends the daemons and removes the
directory when this process has ended, however it ended; the daemons also ask the kernel for a signal at its
death.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MODEL = "dgn-demo"
SPANS = {"desk": "embed,0-3", "attic": "4-7,head"}
READY_S = 180.0
STOP_S = 6.0
BIN = Path(sys.executable).parent
_PR_SET_PDEATHSIG = 1


class DemoError(Exception):
    """Why the demo can't go on, for people."""


@dataclass
class Node:
    """One daemon of the demo."""

    name: str
    directory: Path
    port: int
    peer_id: str

    @property
    def socket(self) -> Path:
        return self.directory / "dgnd.sock"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def config(self) -> Path:
        return self.directory / "dgn.toml"


def say(text: str) -> None:
    """A line of progress."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def die_with_parent(parent: int, signum: int) -> Callable[[], None]:
    """For a child, before exec: have the kernel send `signum` when this process ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


class Keeper:
    """A child that outlives us: at the end of its pipe it ends process groups and removes `directory`."""

    def __init__(self, directory: Path) -> None:
        read_end, self._write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write_end)
            _keep(read_end, directory)
        os.close(read_end)

    def watch(self, group: int) -> None:
        """Ends this process group too."""
        os.write(self._write_end, b"%d\n" % group)

    def finish(self) -> None:
        """Has everything ended, and waits for that."""
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _keep(read_end: int, directory: Path) -> None:
    """The keeper's whole life; never returns."""
    os.setsid()  # Ctrl-C is not for us
    with open(read_end, "rb") as pipe:
        groups = [int(line) for line in pipe]
    # The daemons first, which end their workers; then whatever is left of their groups.
    for send, signum, patience_s in ((os.kill, signal.SIGTERM, STOP_S), (os.killpg, signal.SIGKILL, 1.0)):
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                send(group, signum)
        until = time.monotonic() + patience_s
        while (groups := [group for group in groups if _group_lives(group)]) and time.monotonic() < until:
            time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def _group_lives(group: int) -> bool:
    """Whether a process of the group has not ended; one that waits to be reaped has."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False


def free_port() -> int:
    """A TCP port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_node(name: str, directory: Path) -> Node:
    """Makes the node's directory and identity."""
    directory.mkdir()
    done = subprocess.run(
        [BIN / "dgnd", "init", "--state-dir", directory],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise DemoError(f"dgnd init failed: {done.stderr.strip()}")
    return Node(name, directory, free_port(), done.stdout.strip())


def config_of(node: Node, nodes: list[Node]) -> str:
    """The TOML of one node; the same rows on both, seen from the other side."""
    quote = json.dumps  # a JSON string of ASCII letters is a TOML string
    threads = max(1, (os.cpu_count() or 1) // 2)
    lines = [
        "[node]",
        f"name = {quote(node.name)}",
        f"state_dir = {quote(str(node.directory))}",
        f'listen = ["/ip4/127.0.0.1/tcp/{node.port}"]',
        "[control]",
        f"socket = {quote(str(node.socket))}",
        f"[models.{MODEL}]",
        'backend = "onnx"',
        f"threads = {threads}",
    ]
    for peer in nodes:
        if peer is not node:
            lines += [f"[peers.{peer.name}]", f"id = {quote(peer.peer_id)}"]
            lines += [f'addrs = ["/ip4/127.0.0.1/tcp/{peer.port}"]']
    for each in nodes:
        peer_name = "self" if each is node else each.name
        lines += ["[[blocks]]", f'model = "{MODEL}"', f'peer = "{peer_name}"', f'span = "{SPANS[each.name]}"']
    return "\n".join(lines) + "\n"


def start(node: Node, keeper: Keeper) -> int:
    """Starts the node's daemon in a process group of its own; its process id."""
    with node.log.open("wb") as log:
        daemon = subprocess.Popen(
            [BIN / "dgnd", "--config", node.config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            preexec_fn=die_with_parent(os.getpid(), signal.SIGTERM),
        )
    keeper.watch(daemon.pid)
    daemon.returncode = 0  # never reaped by subprocess, so that the id stays ours until the end
    return daemon.pid


def has_ended(pid: int) -> bool:
    """Whether a child has ended; leaves it to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def status_of(node: Node) -> dict[str, object]:
    """The node's `status`, or its error."""
    done = subprocess.run(
        [BIN / "dgnctl", "--socket", node.socket, "status", "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    try:
        answer: dict[str, object] = json.loads(done.stdout)
    except ValueError:
        raise DemoError(f"dgnctl status: {done.stderr.strip() or done.stdout.strip()}") from None
    return answer


def summary(status: dict[str, object]) -> str:
    """The state of a node in a few words."""
    missing = status.get("missing")
    if isinstance(missing, dict) and any(missing.values()):
        return f"{status.get('state')}, waits for blocks {', '.join(map(str, missing.values()))}"
    return str(status.get("state", "starting"))


def log_tail(node: Node) -> str:
    """The last lines that a daemon wrote."""
    return "\n".join(node.log.read_text(errors="replace").splitlines()[-15:])


def wait_until_ready(nodes: list[Node], pids: list[int]) -> None:
    """Returns when both nodes are ready and see every block; shows what changes meanwhile."""
    shown = ""
    until = time.monotonic() + READY_S
    while True:
        for node, pid in zip(nodes, pids, strict=True):
            if has_ended(pid):
                raise DemoError(f"the daemon of {node.name} ended:\n{log_tail(node)}")
        states = [summary(status_of(node)) for node in nodes]
        line = "; ".join(f"{node.name}: {state}" for node, state in zip(nodes, states, strict=True))
        if line != shown:
            say(line)
            shown = line
        if states == ["ready"] * len(nodes):
            return
        if time.monotonic() > until:
            tails = "\n".join(f"{node.name}:\n{log_tail(node)}" for node in nodes)
            raise DemoError(f"not ready after {READY_S:.0f} s; {line}; the ends of the logs:\n{tails}")
        time.sleep(0.3)


def talk(node: Node, prompt: str) -> int:
    """The chat, or one answer; its exit code."""
    command: list[str | Path] = [BIN / "dgnctl", "--socket", node.socket]
    command += ["run", "--", prompt] if prompt else ["chat"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's now

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        die_with_parent(parent, signal.SIGTERM)()

    parent = os.getpid()
    return subprocess.run(command, preexec_fn=prepare).returncode


@contextlib.contextmanager
def demo_directory() -> Iterator[tuple[Path, Keeper]]:
    """A temporary directory and its keeper."""
    directory = Path(tempfile.mkdtemp(prefix="dgn-demo-"))
    keeper = Keeper(directory)
    try:
        yield directory, keeper
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        keeper.finish()


def main() -> int:
    """Runs the demo; the exit code."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    prompt = os.environ.pop("DGN_DEMO_PROMPT", "")
    try:
        with demo_directory() as (directory, keeper):
            nodes = [make_node(name, directory / name) for name in SPANS]
            for node in nodes:
                node.config.write_text(config_of(node, nodes))
            say(f"starting two nodes: {', '.join(f'{name} has {span}' for name, span in SPANS.items())}")
            pids = [start(node, keeper) for node in nodes]
            wait_until_ready(nodes, pids)
            return talk(nodes[0], prompt)
    except DemoError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
