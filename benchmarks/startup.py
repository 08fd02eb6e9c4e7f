"""How long dgnctl and dgnd take to start, and what memory dgnd takes without a model.

    python benchmarks/startup.py [--runs N] [--quick] [--json]

`dgnctl --help` and `python -c pass` alternate, so that both meet the same load. CPU is user and system time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench_kit import conditions, report
from cluster import Cluster, TestNode

from dgnd.control.client import ControlClient
from dgnd.errors import DgnError

GOAL_CTL_MS = 100.0
GOAL_READY_S = 1.5
GOAL_MEMORY_MB = 150.0
_POLL_S = 0.005
_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start, in seconds: by the clock, and of CPU, which a busy machine does not stretch."""

    wall_s: float
    cpu_s: float


def run_once(*arguments: str) -> Start:
    """One Python process from start to end."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"python {' '.join(arguments)}: exit code {process.returncode}")
    return Start(wall_s, usage.ru_utime + usage.ru_stime)


def over_bare_python(runs: int) -> tuple[list[Start], list[Start]]:
    """`python -c pass` and `dgnctl --help`, alternating."""
    bare, ctl = [], []
    run_once("-m", "dgnctl", "--help")  # byte code is compiled
    for _ in range(runs):
        bare.append(run_once("-c", "pass"))
        ctl.append(run_once("-m", "dgnctl", "--help"))
    return bare, ctl


def ready_after(node: TestNode) -> Start:
    """From starting dgnd until it says that it is ready on its control socket."""
    began = time.perf_counter()
    node.start()
    while time.perf_counter() - began < _DEADLINE_S:
        try:
            with ControlClient(node.socket) as client:
                if client.call("status").state == "ready":
                    wall_s = time.perf_counter() - began
                    assert node.process is not None
                    used = psutil.Process(node.process.pid).cpu_times()
                    return Start(wall_s, used.user + used.system)
        except DgnError:
            pass  # not listening yet
        time.sleep(_POLL_S)
    raise SystemExit(f"dgnd is not ready after {_DEADLINE_S:.0f} s:\n{node.log}")


def memory_mb(pid: int) -> dict[str, float]:
    """Resident and proportional memory of a process in MB (10**6 bytes), and what it alone holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name.rstrip(":"): int(value) for name, value, *_ in map(str.split, lines)}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"rss": kib["Rss"] * 1.024e-3, "pss": kib["Pss"] * 1.024e-3, "private": private * 1.024e-3}


def measure_daemon(runs: int) -> tuple[list[Start], list[dict[str, float]]]:
    """Starts and the memory when ready, of a dgnd without a model."""
    starts, memory = [], []
    with (
        tempfile.TemporaryDirectory(prefix="dgn-bench-") as directory,
        Cluster(Path(directory), None) as cluster,
    ):
        cluster.add("a")
        node = cluster.configure("a", [], models={})
        for _ in range(runs):
            starts.append(ready_after(node))
            assert node.process is not None
            memory.append(memory_mb(node.process.pid))
            node.terminate()
    return starts, memory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two runs of each: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = 2 if options.quick else options.runs
    where = conditions.conditions()
    bare, ctl = over_bare_python(runs)
    over = [Start(b.wall_s - a.wall_s, b.cpu_s - a.cpu_s) for a, b in zip(bare, ctl, strict=True)]
    ready, memory = measure_daemon(runs if options.quick else max(3, runs // 2))
    starts = {"python": bare, "dgnctl_help": ctl, "dgnctl_help_over_python": over, "dgnd_ready": ready}
    figures: dict[str, float] = {}
    for name, samples in starts.items():
        figures[f"{name}_s"] = report.median([sample.wall_s for sample in samples])
        figures[f"{name}_fastest_s"] = min(sample.wall_s for sample in samples)
        figures[f"{name}_cpu_s"] = report.median([sample.cpu_s for sample in samples])
        figures[f"{name}_runs"] = len(samples)
    for name in ("rss", "pss", "private"):
        figures[f"dgnd_{name}_mb"] = report.median([sample[name] for sample in memory])

    def row(words: str, name: str, goal: str) -> list[str]:
        seconds = [figures[f"{name}{end}_s"] for end in ("", "_fastest", "_cpu")]
        return [words, *(f"{1000 * value:.0f} ms" for value in seconds), goal]

    rows = [
        row("python -c pass", "python", ""),
        row("dgnctl --help", "dgnctl_help", ""),
        row("the second over the first", "dgnctl_help_over_python", f"{GOAL_CTL_MS:.0f} ms"),
        row("dgnd without a model, to ready", "dgnd_ready", f"{1000 * GOAL_READY_S:.0f} ms"),
    ]
    header = [f"start, of {len(ctl)} (dgnd: {len(ready)})", "median", "fastest", "CPU", "goal"]
    memory_rows = [
        ["resident (RSS)", f"{figures['dgnd_rss_mb']:.0f} MB", f"{GOAL_MEMORY_MB:.0f} MB"],
        ["proportional (PSS)", f"{figures['dgnd_pss_mb']:.0f} MB", ""],
        ["private", f"{figures['dgnd_private_mb']:.0f} MB", ""],
    ]
    lines = [
        report.table(header, rows),
        "",
        report.table(["dgnd without a model, memory", "median", "goal"], memory_rows),
    ]
    report.show(options.json, where, figures, lines)


if __name__ == "__main__":
    main()
