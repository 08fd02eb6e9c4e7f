"""Nodes and workers are killed, or stopped, in mid-answer; the answers must not change.

    python benchmarks/kills.py [--strikes N] [--how kill|stop] [--model DIR] [--seed N] [--quick] [--json]

Six nodes, two for each third of the model; the origin is one of the first two. Every answer is asked for
undisturbed first, then again with a strike at 5 to 95 % of its tokens, greedy and sampled in turn. A strike
counts only where `status` showed its victims in the answer's route just before. The exit code is 1 where an
answer was lost or had another token.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from bench_kit import conditions, report
from cluster import Cluster, Row, TestNode
from disturbed import Asked, long_answer
from tiny_llama import make_tiny_llama

from dgn_backends.hf_config import read_config
from dgnd.control.client import ControlClient

#: What is struck, in turn: nodes by their place in the route, the worker of any hop, two nodes at once.
KINDS = ("first", "middle", "head", "worker", "two")
SAMPLINGS = ({}, {"temperature": 0.9, "seed": 7})


@dataclass
class Strike:
    """One strike: where, at which token, and what became of the answer."""

    kind: str
    after: int
    victims: list[str] = field(default_factory=list)
    route: list[str] = field(default_factory=list)
    stall_s: float = 0.0
    outcome: str = ""  #: "same", or what went wrong


class Campaign:
    """The cluster, and everything that was done to it. `how`: "kill" or "stop"."""

    def __init__(self, cluster: Cluster, how: str, tokens: int, chance: random.Random) -> None:
        self.cluster = cluster
        self.origin = cluster.nodes["a"]
        self.strikes: list[Strike] = []
        self._how = how
        self._tokens = tokens
        self._chance = chance
        self._stopped: list[int] = []
        self._answers = [long_answer(self.origin, sampling, tokens) for sampling in SAMPLINGS]

    def strike(self) -> None:
        """One answer with one strike, and everybody up again afterwards."""
        number = len(self.strikes)
        params, right = self._answers[number % len(self._answers)]
        kind = KINDS[number % len(KINDS)]
        strike = Strike(kind, int(self._tokens * self._chance.uniform(0.05, 0.95)))
        asked = Asked(self.origin, params, strike.after, lambda route: self._hit(strike, route))
        try:
            strike.outcome = "same" if asked.ids() == right else "other tokens"
        except Exception as error:  # noqa: BLE001 - it is what the campaign is after
            strike.outcome = f"lost: {error}"
        strike.stall_s = asked.longest_s
        self.strikes.append(strike)
        self._heal()

    def _hit(self, strike: Strike, route: list[str]) -> None:
        strike.route = route
        others = [name for name in route if name != "a"]
        place = {"first": route[:1], "middle": route[1:2], "head": route[-1:]}
        if strike.kind == "two":
            strike.victims = self._chance.sample(others, 2)
        elif strike.kind == "worker" or route[0] == "a" == place.get(strike.kind, [""])[0]:
            # The origin's own daemon is spared: as the first hop its worker is struck.
            strike.victims = [route[0] if strike.kind == "first" else self._chance.choice(route)]
            for name in strike.victims:
                self._signal(self.cluster.nodes[name].worker_pids())
            return
        else:
            strike.victims = place[strike.kind]
        for name in strike.victims:
            node = self.cluster.nodes[name]
            assert node.process is not None
            self._signal([node.process.pid, *node.worker_pids()])
            if self._how == "kill":
                node.process.wait()  # on a busy machine it may look alive for a while

    def _signal(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a worker ends with its daemon
                os.kill(pid, signal.SIGKILL if self._how == "kill" else signal.SIGSTOP)
        self._stopped += pids

    def _heal(self) -> None:
        """Everybody is up, and known to the origin."""
        if self._how == "stop":
            for pid in self._stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self._stopped.clear()
        for node in self.cluster.nodes.values():
            if node.process is None or node.process.poll() is not None:
                node.start()
        for node in self.cluster.nodes.values():
            node.wait_ready()
        self.origin.wait_for(self._all_serve, what="all nodes back in the map")

    def _all_serve(self) -> bool:
        with ControlClient(self.origin.socket) as client:
            peers = client.call("peers.list").peers
        return all(peer.state == "connected" and peer.offers for peer in peers)


def resident(node: TestNode) -> int:
    """Bytes that a node's daemon holds in memory."""
    assert node.process is not None
    size: int = psutil.Process(node.process.pid).memory_info().rss
    return size


def rows_of(n_blocks: int) -> list[Row]:
    """Two nodes for each third of the model."""
    one, two = n_blocks // 3, 2 * n_blocks // 3
    spans = (f"embed,0-{one - 1}", f"{one}-{two - 1}", f"{two}-{n_blocks - 1},head")
    return [Row(name, span) for names, span in zip(("ab", "cd", "ef"), spans, strict=True) for name in names]


def measure(strikes: int, how: str, model: Path | None, tokens: int, seed: int) -> tuple[Campaign, float]:
    """The campaign, and by what factor the origin's daemon has grown during it."""
    with tempfile.TemporaryDirectory() as directory:
        path = model or make_tiny_llama(Path(directory) / "model", n_blocks=6, max_positions=4096)
        with Cluster(Path(directory) / "nodes", path) as cluster:
            cluster.full_mesh(rows_of(read_config(path).n_blocks))
            campaign = Campaign(cluster, how, tokens, random.Random(seed))
            campaign.strike()
            before = resident(campaign.origin)
            while len(campaign.strikes) < strikes:
                campaign.strike()
            time.sleep(1.0)
            return campaign, resident(campaign.origin) / before


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strikes", type=int, default=50)
    parser.add_argument("--how", choices=("kill", "stop"), default="kill")
    parser.add_argument("--model", type=Path, help="a model directory; without it a tiny random one")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one strike of each kind, short answers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    if options.quick:
        options.strikes, options.tokens = len(KINDS), 120
    campaign, growth = measure(options.strikes, options.how, options.model, options.tokens, options.seed)
    done = campaign.strikes
    stalls = sorted(strike.stall_s for strike in done)
    kinds = Counter(strike.kind for strike in done)
    wrong = [strike for strike in done if strike.outcome != "same"]
    figures = {
        "strikes": len(done),
        **{f"struck_{kind}": kinds[kind] for kind in KINDS},
        "lost_or_other": len(wrong),
        "stall_median_s": report.median(stalls),
        "stall_p95_s": report.quantile(stalls, 0.95),
        "stall_longest_s": stalls[-1],
        "origin_memory_growth": growth,
    }
    rows = [
        ["strikes", str(len(done)), ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS)],
        ["answers lost or with another token", str(len(wrong)), ""],
        ["stall: median", f"{figures['stall_median_s']:.2f} s", ""],
        ["stall: p95", f"{figures['stall_p95_s']:.2f} s", "goal 2 s (kill), 4 s (stop)"],
        ["stall: longest", f"{stalls[-1]:.2f} s", ""],
        ["memory of the origin's daemon, after over before", f"{growth:.2f}", ""],
    ]
    lines = [f"{s.kind} {s.victims} of {s.route} at token {s.after}: {s.outcome}" for s in wrong]
    report.show(options.json, where, figures, [report.table([options.how, "", ""], rows), *lines])
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
