"""The conformance checks of memory on a CPU: what a sequence takes beyond its KV, while it grows and in one
step.

Each model makes one thing large (see `testing_cases.MODELS`) so that the mistake that is looked for takes
several times the memory that is allowed. Each is measured several times, since
allocators, and code that is used for the first time, take memory too.

Knows nothing of how a backend stores anything.
"""

from __future__ import annotations

from dgn_backends.api import SpanRunner, Step
from dgn_backends.tensor import Tensor
from dgn_backends.testing_kit import Bench, Ids, step_of
from dgn_backends.testing_memory_meter import MemoryMeter

_POSITIONS = 4096
_MIB = 1 << 20


def _usual_step_bytes(bench: Bench, runner: SpanRunner, ids: Ids, chunk: int) -> int:
    """The median, over the positions after a long prefill in chunks, of what a decode step takes at its peak
    beside the KV that it adds. The sequence, number 1, stays open."""
    runner.open(1, runner.span, len(ids))
    for start in range(0, _POSITIONS, chunk):
        bench.forward(runner, [step_of(runner.span, 1, start, ids[start : start + chunk])])
    taken: list[int] = []
    for position in range(_POSITIONS, len(ids)):
        kv_bytes = runner.kv_bytes()
        with MemoryMeter() as meter:
            bench.forward(runner, [step_of(runner.span, 1, position, ids[position : position + 1])])
            taken.append(meter.peak() - (runner.kv_bytes() - kv_bytes))
    return sorted(taken)[len(taken) // 2]


def check_kv_in_place(bench: Bench) -> None:
    """A step appends to a long sequence's KV without making any of it anew: while a copy is made, old and
    new exist together, at every step."""
    runner = bench.load("much-kv")
    usual = _usual_step_bytes(bench, runner, bench.ids("much-kv", _POSITIONS + 9), chunk=64)
    allowed = runner.kv_bytes_per_position * _POSITIONS // 3
    bench.require(
        usual <= allowed,
        f"a decode step took {usual:,} bytes over {runner.kv_bytes():,} bytes of KV; "
        f"at most {allowed:,} are allowed: KV pages must not be copied",
    )
    runner.close(1)


def check_no_repeat(bench: Bench) -> None:
    """One decode step over a long context does not repeat K and V for the query heads that share them."""
    runner = bench.load("many-heads")
    usual = _usual_step_bytes(bench, runner, bench.ids("many-heads", _POSITIONS + 8), chunk=128)
    allowed = 3 * runner.kv_bytes_per_position * _POSITIONS
    bench.require(
        usual <= allowed,
        f"a decode step took {usual:,} bytes over {runner.kv_bytes():,} bytes of KV; "
        f"at most {allowed:,} are allowed: K and V must not be repeated for the heads that share them",
    )
    runner.close(1)


def check_small_masks(bench: Bench) -> None:
    """A long prompt in one step makes no mask and no scores of positions by positions."""
    runner = bench.load("long-prompt")
    ids = bench.ids("long-prompt", _POSITIONS)
    tries: list[int] = []
    for _ in range(4):
        runner.open(1, runner.span, _POSITIONS)
        step = Step(1, 0, Tensor.from_numpy(ids, "i32"), (_POSITIONS - 1,))
        with MemoryMeter() as meter:
            bench.forward(runner, [step])
            tries.append(meter.peak() - runner.kv_bytes())
        runner.close(1)
    taken, allowed = min(tries), 15 * _MIB
    bench.require(
        taken <= allowed,
        f"a prompt of {_POSITIONS} positions took {taken:,} bytes beside its KV; at most {allowed:,} are "
        "allowed: masks and scores must be worked in tiles",
    )
