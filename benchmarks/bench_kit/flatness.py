"""What the processes of a cluster take, and whether it is more than before. Knows nothing of what they do."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, fields

import psutil
from cluster import TestNode

#: Memory may grow by so much without counting as growth: allocators, caches of code.
SHARE, BYTES = 0.05, 2 << 20
#: Tasks come and go with what a node is about: a peer may have been dialled when the first sample was taken.
TASKS = 3
#: For what is done with to be given back: idle threads, closed connections.
SETTLE_S = 45.0


@dataclass(frozen=True, slots=True)
class Taken:
    """By one process. `tasks` of dgnd's event loop; 0 for a worker."""

    memory: int  #: resident bytes
    fds: int
    threads: int
    tasks: int


#: By the name and pid of each process.
Sample = dict[str, Taken]


def sample(nodes: Iterable[TestNode]) -> Sample:
    """All daemons and workers, as they are now."""
    found = {}
    for node in nodes:
        status = node.status()
        ours = status.process
        found[f"{node.name} dgnd {status.pid}"] = Taken(
            ours.resident_bytes, ours.fds, ours.threads, ours.tasks
        )
        for worker in status.workers:
            if worker.pid is not None:
                process = psutil.Process(worker.pid)
                taken = Taken(process.memory_info().rss, process.num_fds(), process.num_threads(), 0)
                found[f"{node.name} worker {worker.pid}"] = taken
    return found


def growth(before: Sample, after: Sample) -> list[str]:
    """A line for each figure of each process of both that has grown."""
    lines = []
    for name in before.keys() & after.keys():
        for item in fields(Taken):
            old, new = getattr(before[name], item.name), getattr(after[name], item.name)
            allowed = {"memory": old * (1 + SHARE) + BYTES, "tasks": old + TASKS}.get(item.name, old)
            if new > allowed:
                lines.append(f"{name}: {item.name} {old:,} -> {new:,}")
    return sorted(lines)


def settled(nodes: list[TestNode], before: Sample) -> tuple[Sample, list[str]]:
    """A sample once nothing has grown, or else after SETTLE_S; and what has grown."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = sample(nodes)
        grown = growth(before, after)
        if not grown or time.monotonic() > deadline:
            return after, grown
        time.sleep(1.0)
