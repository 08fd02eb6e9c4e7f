"""Three nodes with replicas are restarted in turn, again and again, while a fourth talks through them.

    python benchmarks/rolling.py [--seconds N] [--sessions N] [--quick] [--json]

Any two of the three have the whole model. Each is ended by SIGTERM, started again, and the next one follows
once the origin can use it. Every conversation is repeated, and must give the same token ids each time. The
exit code is 1 where a request failed or an answer was another one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

from bench_kit import conditions, report
from cluster import Cluster
from load import TWO_OF_THREE, Load, restart
from tiny_llama import make_tiny_llama


def measure(seconds: float, sessions: int) -> tuple[Load, list[float]]:
    """The load, and how long each restart took until the node was used again. Each node at least once."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_llama(Path(directory) / "model", n_blocks=6, max_positions=4096)
        with Cluster(Path(directory) / "nodes", model) as cluster:
            origin = cluster.add("origin")
            cluster.full_mesh(TWO_OF_THREE)
            took = []
            with Load(origin, sessions) as load:
                begun = time.monotonic()
                for name in itertools.cycle("abc"):
                    if len(took) >= 3 and time.monotonic() - begun >= seconds:
                        break
                    start = time.monotonic()
                    restart(cluster, origin, name)
                    took.append(time.monotonic() - start)
            return load, took


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="each node once: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    load, took = measure(0.0 if options.quick else options.seconds, options.sessions)
    figures = {
        "requests": load.done,
        "failed": len(load.errors),
        "wrong": len(load.wrong),
        "restarts": len(took),
        "restart_s": report.median(took),
        "longest_pause_s": load.longest_s,
    }
    rows = [
        ["requests answered", f"{load.done:,}"],
        ["failed", str(len(load.errors))],
        ["other tokens than undisturbed", str(len(load.wrong))],
        ["restarts", str(len(took))],
        ["a restart, until it serves again, median", f"{report.median(took):.1f} s"],
        ["longest pause of an answer", f"{load.longest_s:.1f} s"],
    ]
    header = [f"{options.sessions} conversations, 3 nodes restarted in turn", ""]
    report.show(options.json, where, figures, [report.table(header, rows), *load.errors, *load.wrong])
    sys.exit(1 if load.errors or load.wrong else 0)


if __name__ == "__main__":
    main()
