"""Nodes die, stand still, leave and join at random while conversations go on; in the end nothing has grown.

    python benchmarks/churn.py [--seconds N] [--seed S] [--sessions N] [--json]

Any two of the nodes a, b and c have the whole model; one of them at a time is killed, stopped, drained or
restarted, or loses its worker. The origin and the node d are never ended; d is stopped and drained. Other
nodes join for a while, under new identities, and are gone for good then. Every conversation is repeated and
must give the token ids of the undisturbed one. What each process takes is compared after a fourth of the time
and at the end, both without load. The exit code is 1 where an answer was lost or another one, or something
has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench_kit import conditions, flatness, report
from cluster import Cluster, Row, TestNode
from load import TWO_OF_THREE, Load, restart, serving
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient

ROWS = [Row("origin", "embed,0-1"), *TWO_OF_THREE, Row("d", "2-3")]
GUEST_SPAN = "2-5,head"
#: The first part of the run only warms up.
WARM_UP = 0.25


@dataclass
class Churn:
    """The cluster and what is done to it."""

    cluster: Cluster
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    guests: list[str] = field(default_factory=list)

    @property
    def origin(self) -> TestNode:
        """Where the conversations are."""
        return self.cluster.nodes["origin"]

    def go_on(self, seconds: float) -> None:
        """One thing after another, until so much time has passed; afterwards everybody is well again."""
        deadline = time.monotonic() + seconds
        kinds: list[Callable[[], None]] = [
            self.kill, self.kill_worker, self.stand_still, self.drain, self.restart, self.join, self.part
        ]  # fmt: skip
        while time.monotonic() < deadline:
            kind = self.chance.choice(kinds)
            if (kind == self.part and not self.guests) or (kind == self.join and len(self.guests) == 2):
                continue
            self.counts[kind.__name__] += 1
            kind()
            self.whole()
        while self.guests:
            self.part()
        self.whole()

    def whole(self) -> None:
        """Waits until the origin can use everybody."""
        names = set(self.cluster.nodes)
        self.origin.wait_for(lambda: serving(self.origin) >= names, what=f"all of {sorted(names)}")

    def kill(self) -> None:
        """kill -9 of a node."""
        node = self._any("abc")
        node.kill()
        node.start()
        node.wait_ready()

    def kill_worker(self) -> None:
        """kill -9 of a worker."""
        node = self._any("abc")
        before = node.worker_pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        node.wait_for(lambda: not set(before) & set(node.worker_pids()), what="another worker")
        node.wait_ready()

    def stand_still(self) -> None:
        """SIGSTOP of a node and its worker, for some seconds."""
        node = self._any("abcd")
        assert node.process is not None
        pids = [node.process.pid, *(child.pid for child in node.children())]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.2, 8.0))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        node.wait_ready()

    def drain(self) -> None:
        """Leaves, and takes sessions again."""
        node = self._any("abcd")
        with ControlClient(node.socket) as client:
            client.call("drain", api.DrainParams())
            time.sleep(self.chance.uniform(0.0, 2.0))
            client.call("drain", api.DrainParams(undo=True))

    def restart(self) -> None:
        """SIGTERM, and started again."""
        restart(self.cluster, self.origin, self.chance.choice("abc"))

    def join(self) -> None:
        """Somebody new, whom all others list from now on."""
        name = f"guest{self.counts['join']}"
        self.cluster.add(name)
        self.guests.append(name)
        self._tell_everybody()
        self.cluster.start(name)

    def part(self) -> None:
        """A guest ends in one way or the other, and is listed no more."""
        node = self.cluster.nodes[self.guests.pop(0)]
        if self.chance.random() < 0.5:
            node.kill()
        else:
            node.terminate(30.0)
        del self.cluster.nodes[node.name]
        self._tell_everybody()
        shutil.rmtree(node.directory)

    def _any(self, names: str) -> TestNode:
        return self.cluster.nodes[self.chance.choice(names)]

    def _tell_everybody(self) -> None:
        rows = [*ROWS, *(Row(name, GUEST_SPAN) for name in self.guests)]
        for name, node in self.cluster.nodes.items():
            self.cluster.configure(name, rows, [other for other in self.cluster.nodes if other != name])
            if node.process is not None:
                with ControlClient(node.socket) as client:
                    client.call("reload")


@dataclass
class Found:
    """What came of it."""

    counts: Counter[str]
    loads: list[Load]
    before: flatness.Sample
    after: flatness.Sample
    grown: list[str]

    @property
    def bad(self) -> list[str]:
        """A line for each answer that was lost or another one, and for whatever has grown."""
        lines = [line for load in self.loads for line in (*load.errors, *load.wrong)] + self.grown
        if self.loads[0].right != self.loads[1].right:
            lines.append("after the warm-up undisturbed answers were others than before it")
        return lines


def measure(seconds: float, seed: int, sessions: int) -> Found:
    """The run."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_llama(Path(directory) / "model", n_blocks=6, max_positions=4096)
        with Cluster(Path(directory) / "nodes", model) as cluster:
            cluster.full_mesh(ROWS)
            churn = Churn(cluster, random.Random(seed))
            loads = [Load(churn.origin, sessions), Load(churn.origin, sessions)]
            nodes = list(cluster.nodes.values())
            with loads[0]:
                churn.go_on(seconds * WARM_UP)
            time.sleep(flatness.SETTLE_S / 3)
            before = flatness.sample(nodes)
            with loads[1]:
                churn.go_on(seconds * (1 - WARM_UP))
            after, grown = flatness.settled(nodes, before)
            return Found(churn.counts, loads, before, after, grown)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    found = measure(options.seconds, options.seed, options.sessions)
    survivors = sorted(found.before.keys() & found.after.keys())
    figures = {
        "requests": sum(load.done for load in found.loads),
        "failed": sum(len(load.errors) for load in found.loads),
        "wrong": sum(len(load.wrong) for load in found.loads),
        "events": found.counts.total(),
        "longest_pause_s": max(load.longest_s for load in found.loads),
        "survivors": len(survivors),
        "grown": len(found.grown),
    }
    rows = [
        ["requests answered", f"{figures['requests']:,}"],
        ["failed", str(figures["failed"])],
        ["other tokens than undisturbed", str(figures["wrong"])],
        ["events", f"{found.counts.total()}"],
        *([f"  {kind}", str(count)] for kind, count in sorted(found.counts.items())),
        ["longest pause of an answer", f"{figures['longest_pause_s']:.1f} s"],
    ]
    taken = [
        [name, f"{old.memory / 1e6:.1f} -> {new.memory / 1e6:.1f} MB"]
        + [f"{a} -> {b}" for a, b in ((old.fds, new.fds), (old.threads, new.threads), (old.tasks, new.tasks))]
        for name in survivors
        for old, new in [(found.before[name], found.after[name])]
    ]
    header = [f"{options.sessions} conversations for {options.seconds:g} s, seed {options.seed}", ""]
    lines = [
        report.table(header, rows),
        "",
        report.table(["lived through it", "memory", "files", "threads", "tasks"], taken),
        *found.bad,
    ]
    report.show(options.json, where, figures, lines)
    sys.exit(1 if found.bad else 0)


if __name__ == "__main__":
    main()
