"""What metrics cost a token of decode: CPU time of dgnd and its worker, shown against not shown.

    python benchmarks/telemetry.py [--shape tiny|demo|wide|llama-3.2-1b] [--tokens N] [--rounds N]
                                   [--every SECONDS] [--quick] [--json]

Two nodes alike, each with the whole model. One shows metrics, and is asked for them all the time while it
answers, far more often than Prometheus does. They take turns in every round, in another order each time;
ratios are medians of those within a round. CPU time is the scheduler's, of all threads of dgnd and workers:
steadier than time on a machine that does other things too.

A reading is timed by itself, too, as CPU time of an idle dgnd.

Things are counted whether or not metrics are shown, so that is in both sides, and timed by itself: all calls
that one token makes on its way through a node, as a share of the CPU time of a token.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_kit import conditions, report
from bench_kit.shapes import SHAPES, make_model
from cluster import Cluster, Row, TestNode, free_port

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.metrics.counts import Counts
from dgnd.metrics.departures import Departures
from dgnd.wire.messages import Frame, HopKey, StepFrame
from dgnd.worker.tally import Tally

_PROMPT = tuple(range(10, 26))
OFF, ON = "not shown", "shown"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one token."""

    cpu_s: float
    wall_s: float


def cpu_s(node: TestNode) -> float:
    """Of dgnd and its workers until now, in seconds. What a thread took that has ended stays in it, and
    children that come and go are not counted: else it might grow less."""
    assert node.process is not None
    # The clock of another process, in nanoseconds, by its number (clock_getcpuclockid(3)).
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in (node.process.pid, *node.worker_pids()))


def answer(node: TestNode, tokens: int) -> Cost:
    """The cost of a token of one answer."""
    params = api.GenerateParams(token_ids=_PROMPT, max_tokens=tokens, temperature=0.0)
    with ControlClient(node.socket) as client:
        before, begun = cpu_s(node), time.perf_counter()
        client.generate(params, lambda _: None)
        return Cost((cpu_s(node) - before) / tokens, (time.perf_counter() - begun) / tokens)


def read(port: int) -> None:
    """Reads the metrics there once."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        page.read()


def reading_s(node: TestNode, port: int, times: int) -> float:
    """What one reading costs a node that does nothing else."""
    before = cpu_s(node)
    for _ in range(times):
        read(port)
    return (cpu_s(node) - before) / times


@contextmanager
def asked(port: int, every_s: float) -> Iterator[None]:
    """Meanwhile the metrics at `port` are read again and again."""
    over = threading.Event()

    def ask() -> None:
        while True:
            read(port)
            if over.wait(every_s):
                return

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def counting_s(times: int) -> float:
    """What it takes to count a token that is asked for, computed and sent on: the least of some tries."""
    counts, tally = Counts(), Tally()
    departures = Departures(counts, lambda _: 0.001)
    model, key = counts.model("m"), HopKey("origin", "session", 1)
    step = StepFrame(key=key, branch=0, route=0, start=5, count=1, digest_start=0, digest_end=0)
    frame, batch = Frame(step), [Frame(step)]
    tries = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(times):
            tally.put(frame, time.monotonic())
            tally.taken(batch, time.monotonic())
            tally.computed(batch, 0.01)
            departures.at_once("peer", time.perf_counter() - time.perf_counter())
            model.token(0.01, first=False)
        tries.append((time.perf_counter() - begun) / times)
    return min(tries)


def measure(directory: Path, options: argparse.Namespace) -> tuple[dict[str, list[Cost]], float]:
    """`rounds` samples of each side, after one of each that is thrown away; and what a reading costs."""
    context = len(_PROMPT) + options.tokens + 8
    model = make_model(directory / "model", SHAPES[options.shape], "f32", None, context)
    blocks = SHAPES[options.shape].n_blocks
    port = free_port()
    samples: dict[str, list[Cost]] = {OFF: [], ON: []}
    with Cluster(directory / "nodes", model) as cluster:
        for name, more in (("off", ""), ("on", f'[metrics]\nlisten = "127.0.0.1:{port}"')):
            cluster.add(name)
            section = {"path": str(model), "backend": "reference", "threads": 1}
            row = Row(name, f"embed,0-{blocks - 1},head")
            cluster.configure(name, [row], models={"m": section}, more=more)
        cluster.start()
        off, on = cluster.nodes.values()
        answer(off, options.tokens), answer(on, options.tokens)
        for index in range(options.rounds):
            for side in (OFF, ON) if index % 2 else (ON, OFF):
                if side == OFF:
                    samples[OFF].append(answer(off, options.tokens))
                else:
                    with asked(port, options.every):
                        samples[ON].append(answer(on, options.tokens))
        return samples, reading_s(on, port, 3 if options.quick else 50)


def main() -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two readings")
    parser.add_argument("--quick", action="store_true", help="a tiny model once: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.tokens, options.rounds = "tiny", 8, 1
    where = conditions.conditions()
    with tempfile.TemporaryDirectory(prefix="dgn-bench-") as name:
        samples, reading = measure(Path(name), options)
    counting = counting_s(1000 if options.quick else 50_000)
    cpu_off = report.median([cost.cpu_s for cost in samples[OFF]])
    figures = {
        side: {
            "cpu_ms": 1000 * report.median([cost.cpu_s for cost in costs]),
            "cpu_ratio": report.median([a.cpu_s / b.cpu_s for a, b in zip(costs, samples[OFF], strict=True)]),
            "wall_ratio": report.median(
                [a.wall_s / b.wall_s for a, b in zip(costs, samples[OFF], strict=True)]
            ),
        }
        for side, costs in samples.items()
    }
    figures["counting"] = {"us": counting * 1e6, "share": counting / cpu_off}
    figures["reading"] = {"ms": reading * 1e3, "share_of_15_s": reading / 15}
    where["request"] = (
        f"{options.shape}, {options.tokens} tokens, {options.rounds} rounds, read every {options.every:g} s"
    )
    rows = [
        [
            side,
            f"{figures[side]['cpu_ms']:.3f}",
            f"{figures[side]['cpu_ratio']:.4f}",
            f"{figures[side]['wall_ratio']:.4f}",
        ]
        for side in samples
    ]
    lines = [
        report.table(["metrics", "CPU ms/token", "ratio", "time, ratio"], rows),
        "",
        f"counting, in both: {counting * 1e6:.1f} us a token, {counting / cpu_off:.2%} of its CPU time",
        f"one reading: {reading * 1e3:.1f} ms; every 15 s, {reading / 15:.3%} of one core",
    ]
    report.show(options.json, where, figures, lines)


if __name__ == "__main__":
    main()
