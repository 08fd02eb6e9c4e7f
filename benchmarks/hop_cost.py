"""What a remote hop adds to the time of a token, on loopback: k+1 hops minus k.

    python benchmarks/hop_cost.py [--hops N] [--tokens N] [--rounds N] [--quick] [--json]

The same model with 8 KB of hidden states a position, on one node and split over 1, 2 and 3 more, on a backend
that computes nothing; the maps take turns in every round. A token's time is from one piece of the answer to
the next, as a client of the control socket sees it. A hop's cost is all of it: codec, encryption, two more
processes to wake, and what one more call of a plugin costs. As that depends on the machine, the echo of 4 KB
through py-libp2p as it comes takes its turn as well.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench_kit import conditions, report
from bench_kit.null_backend import null_site
from bench_kit.shapes import SHAPES, make_model
from bench_kit.stock_echo import echo_times
from cluster import Cluster, Row, TestNode

from dgnd.control import api
from dgnd.control.client import ControlClient

_NAMES = "abcdefgh"
_PROMPT_IDS = tuple(range(10, 26))
#: The first tokens of an answer meet cold caches.
_SKIP = 4


def rows_of(hops: int, blocks: int) -> list[Row]:
    """The map with `hops` remote hops: one block each at the end of the model, the rest at the origin."""
    kept = blocks - hops
    rows = [Row("a", f"embed,0-{kept - 1}" + ("" if hops else ",head"), f"m{hops}")]
    for index in range(hops):
        end = ",head" if index == hops - 1 else ""
        rows.append(Row(_NAMES[index + 1], f"{kept + index}{end}", f"m{hops}"))
    return rows


def token_times(node: TestNode, model: str, tokens: int) -> list[float]:
    """Seconds between the pieces of one answer."""
    arrivals: list[float] = []
    params = api.GenerateParams(
        model=model, token_ids=_PROMPT_IDS, max_tokens=tokens + _SKIP, temperature=0.0
    )
    with ControlClient(node.socket) as client:
        client.generate(
            params, lambda delta: arrivals.append(time.perf_counter()) if delta.token_ids else None
        )
    return [b - a for a, b in zip(arrivals[_SKIP - 1 :], arrivals[_SKIP:], strict=False)]


def measure(directory: Path, hops: int, tokens: int, rounds: int) -> tuple[list[list[float]], list[float]]:
    """Times of tokens with 0, 1, … `hops` remote hops, and of echoes, in seconds."""
    shape = SHAPES["wide"]
    model = make_model(directory / "model", shape, "f32", None, 4096)
    samples: list[list[float]] = [[] for _ in range(hops + 1)]
    echoes: list[float] = []
    environment = null_site(directory / "site")
    with Cluster(directory, model) as cluster:
        names = _NAMES[: hops + 1]
        rows = [row for k in range(hops + 1) for row in rows_of(k, shape.n_blocks)]
        section = {"path": str(model), "backend": "null", "threads": 1}
        for name in names:
            cluster.add(name).extra_env |= environment
        for name in names:
            models = {f"m{k}": section for k in range(hops + 1)}
            cluster.configure(name, rows, [other for other in names if other != name], models=models)
        for node in cluster.nodes.values():
            node.start()
        for node in cluster.nodes.values():
            node.wait_ready(timeout=300)
        for index in range(rounds + 1):
            for turn in range(hops + 1):
                k = (index + turn) % (hops + 1)
                times = token_times(cluster.nodes["a"], f"m{k}", tokens)
                if index:  # the first round warms up
                    samples[k] += times
            if index:
                echoes += echo_times(tokens)
    return samples, echoes


def main() -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--hops", type=int, default=3, choices=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=200, help="of one answer")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--quick", action="store_true", help="one hop, one short answer: only to see that it works"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.hops, options.tokens, options.rounds = 1, 8, 1
    where = conditions.conditions()
    where["request"] = f"{options.rounds} answers of {options.tokens} tokens for each map, in turns"
    with tempfile.TemporaryDirectory(prefix="dgn-bench-") as name:
        samples, echoes = measure(Path(name), options.hops, options.tokens, options.rounds)
    figures: dict[str, dict[str, float]] = {}
    rows = []
    before: dict[str, float] = {}
    for k, times in enumerate(samples):
        now = {
            "p50_ms": 1000 * report.median(times),
            "p99_ms": 1000 * report.quantile(times, 0.99),
            "p10_ms": 1000 * report.quantile(times, 0.1),
        }
        added = {f"added_{name}": value - before[name] for name, value in now.items() if before}
        figures[str(k)] = {**now, **added, "tokens": len(times)}
        added_cells = [f"{added[name]:+.2f}" if added else "" for name in (f"added_{key}" for key in now)]
        rows.append([f"{k} remote hops", *(f"{value:.2f}" for value in now.values()), *added_cells])
        before = now
    echo_ms = 1000 * report.median(echoes)
    added_p50 = [now["added_p50_ms"] for now in figures.values() if "added_p50_ms" in now]
    figures["echo"] = {"p50_ms": echo_ms, "tokens": len(echoes)}
    ratio = report.median(added_p50) / echo_ms
    figures["hop_over_echo"] = {"p50": ratio}
    last = f"py-libp2p as it comes, 4 KB there and back: {echo_ms:.2f} ms; a hop is {ratio:.2f} of it"
    header = ["ms a token", "p50", "p99", "p10", "added p50", "added p99", "added p10"]
    report.show(options.json, where, figures, [report.table(header, rows), "", last])


if __name__ == "__main__":
    main()
