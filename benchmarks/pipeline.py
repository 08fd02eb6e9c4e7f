"""Three remote hops that are far away: time per token, and how much of a prompt's work they do at once.

    python benchmarks/pipeline.py [--delay MS] [--rate MS] [--rounds N] [--quick] [--json]

The origin has the embedding, three nodes a third of the blocks each, and every byte between two nodes is on
its way for the delay. Their compute is simulated: a backend that sleeps for a fixed time for each position,
and does next to nothing else. So three of them are three machines, also on one.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from bench_kit import conditions, report
from bench_kit.delayed import DelayedPorts
from cluster import Cluster, Row
from slow_backend import NAME as SLOW
from slow_backend import slow_site
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient

HOPS = 3
PROMPT, ANSWER = 1024, 32
ROWS = [Row("a", "embed"), Row("b", "0-1"), Row("c", "2-3"), Row("d", "4-5,head")]


def ask(cluster: Cluster, rounds: int) -> list[api.Timings]:
    """What `rounds` answers to a long prompt took."""
    found = []
    with ControlClient(cluster.nodes["a"].socket) as client:
        for number in range(rounds):
            params = api.GenerateParams(token_ids=[5 + number % 7] * PROMPT, max_tokens=ANSWER)
            result = client.generate(params, lambda _: None)
            assert len(result.token_ids) == ANSWER, "an answer ended early: another model is needed"
            found.append(result.timings)
    return found


def measure(delay_s: float, rate_s: float, rounds: int) -> dict[str, float]:
    """Medians, in seconds."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        folder = Path(directory)
        environment = slow_site(folder / "site", rate_s)
        model = make_tiny_llama(folder / "model", n_blocks=6, max_positions=2048, eos=[])
        cluster = stack.enter_context(Cluster(folder / "nodes", model, backend=SLOW))
        ports = stack.enter_context(DelayedPorts(delay_s)) if delay_s else None
        for row in ROWS:
            node = cluster.add(row.peer)
            node.extra_env |= environment
            node.dialled_at = ports.to(node.port) if ports is not None else None
        cluster.full_mesh(ROWS)
        ask(cluster, 1)
        timings = ask(cluster, rounds)
        return {
            "prefill_s": report.median([timing.prefill_s for timing in timings]),
            "token_s": report.median([timing.decode_s / (ANSWER - 1) for timing in timings]),
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delay", type=float, default=20.0, help="one way, in ms")
    parser.add_argument("--rate", type=float, default=2.0, help="ms of simulated compute for a position")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    rate_s, rounds = options.rate / 1000, 1 if options.quick else options.rounds
    near, far = measure(0.0, rate_s, rounds), measure(options.delay / 1000, rate_s, rounds)
    serial_s = HOPS * PROMPT * rate_s
    bound_s = near["token_s"] + (HOPS + 1) * options.delay / 1000
    figures = {
        "near": near | {"speedup": serial_s / near["prefill_s"]},
        "far": far | {"speedup": serial_s / far["prefill_s"], "token_over_bound": far["token_s"] / bound_s},
    }
    header = ["", "no delay", f"{options.delay:g} ms one way"]
    rows = [
        [f"prefill of {PROMPT} tokens", *(f"{side['prefill_s']:.2f} s" for side in (near, far))],
        ["one hop after the other would be", f"{serial_s:.2f} s", ""],
        ["times as fast (goal 2.4)", *(f"{figures[side]['speedup']:.2f}" for side in figures)],
        ["a token", *(f"{1000 * side['token_s']:.1f} ms" for side in (near, far))],
        ["over compute and 4 ways (goal 1.05)", "", f"{figures['far']['token_over_bound']:.3f}"],
    ]
    report.show(options.json, where, figures, [report.table(header, rows)])


if __name__ == "__main__":
    main()
