"""What a node costs while nobody asks: processor time and memory of its daemon and its worker.

    python benchmarks/idle.py [--seconds N] [--quick] [--json]

A node with all of the demo model and two connected peers that hold halves of it; all three rest. Time is
what the kernel counts for the processes, so other work on the machine disturbs it little; memory is
anonymous, and looked at after a third of the time and at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench_kit import conditions, report
from cluster import Cluster, Row

MODEL = "dgn-demo"


@dataclass(frozen=True)
class Rest:
    """One process at rest. cpu: share of one core; bytes: anonymous memory."""

    name: str
    cpu: float
    wakes_s: float
    bytes_before: int
    bytes_after: int


def anonymous(pid: int) -> int:
    """Bytes of memory that a process has for itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def used_s(process: psutil.Process) -> float:
    """Processor time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def wakes(process: psutil.Process) -> int:
    """How often its threads went to sleep so far."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/status")
    lines = (line for task in tasks for line in task.read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def measure(seconds: float) -> list[Rest]:
    """The daemon and the worker of the node in the middle, at rest for `seconds`."""
    rows = [Row("a", "embed,0-7,head", MODEL), Row("b", "embed,0-3", MODEL), Row("c", "4-7,head", MODEL)]
    with tempfile.TemporaryDirectory() as directory, Cluster(Path(directory), None, "onnx") as cluster:
        cluster.full_mesh(rows, models={MODEL: {"backend": "onnx"}})
        node = cluster.nodes["a"]
        node.run("What is dgn?", "--max-tokens", "8")
        time.sleep(10.0)  # what an answer leaves to be done is done
        assert node.process is not None
        processes = {"dgnd": psutil.Process(node.process.pid), "worker": psutil.Process(*node.worker_pids())}
        begun = time.monotonic()
        at_first = {name: (used_s(process), wakes(process)) for name, process in processes.items()}
        time.sleep(seconds / 3)
        before = {name: anonymous(process.pid) for name, process in processes.items()}
        time.sleep(seconds * 2 / 3)
        took = time.monotonic() - begun
        return [
            Rest(
                name,
                (used_s(process) - at_first[name][0]) / took,
                (wakes(process) - at_first[name][1]) / took,
                before[name],
                anonymous(process.pid),
            )
            for name, process in processes.items()
        ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--quick", action="store_true", help="three seconds: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    rests = measure(3.0 if options.quick else options.seconds)
    cpu = sum(rest.cpu for rest in rests)
    figures: dict[str, object] = {
        rest.name: {
            "cpu": rest.cpu,
            "wakes_s": rest.wakes_s,
            "bytes_before": rest.bytes_before,
            "bytes_after": rest.bytes_after,
        }
        for rest in rests
    }
    figures["cpu"] = cpu
    rows = [
        [
            rest.name,
            f"{100 * rest.cpu:.2f} %",
            f"{rest.wakes_s:.1f}",
            f"{rest.bytes_before / 2**20:.1f} MiB",
            f"{rest.bytes_after / 2**20:.1f} MiB",
        ]
        for rest in rests
    ]
    header = ["at rest", "of one core", "wakes a second", "memory, after a third", "at the end"]
    last = f"together {100 * cpu:.2f} % of one core; goal: less than 0.5 %"
    report.show(options.json, where, figures, [report.table(header, rows), "", last])


if __name__ == "__main__":
    main()
