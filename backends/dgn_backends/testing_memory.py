"""The conformance checks of memory on a CPU: what a sequence takes beyond its KV, while it grows and in one
step.

Each model makes one thing large (see `testing_kit.MODELS`) so that the mistake that is looked for takes
several times the memory that is allowed. Each is measured several times, since
allocators, and code that is used for the first time, take memory too.

Knows nothing of how a backend stores anything.
"""

from __future__ import annotations

from dgn_backends.api import Step
from dgn_backends.tensor import Tensor
from dgn_backends.testing_kit import Bench, MemoryMeter, step_of

_POSITIONS = 4096
_MIB = 1 << 20


def check_kv_in_place(bench: Bench) -> None:
    """A step appends to a long sequence's KV without making any of it anew: while a copy is made, old and
    new exist together, at every step."""
    runner = bench.load("much-kv")
    ids = bench.ids("much-kv", _POSITIONS + 9)
    runner.open(1, runner.span, len(ids))
    for start in range(0, _POSITIONS, 64):
        bench.forward(runner, [step_of(runner.span, 1, start, ids[start : start + 64])])
    taken: list[int] = []
    for position in range(_POSITIONS, len(ids)):
        kv_bytes = runner.kv_bytes()
        meter = MemoryMeter()
        bench.forward(runner, [step_of(runner.span, 1, position, ids[position : position + 1])])
        taken.append(meter.peak() - (runner.kv_bytes() - kv_bytes))
    usual = sorted(taken)[len(taken) // 2]
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
    ids = bench.ids("many-heads", _POSITIONS + 8)
    runner.open(1, runner.span, len(ids))
    for start in range(0, _POSITIONS, 128):
        bench.forward(runner, [step_of(runner.span, 1, start, ids[start : start + 128])])
    taken: list[int] = []
    for position in range(_POSITIONS, len(ids)):
        kv_bytes = runner.kv_bytes()
        meter = MemoryMeter()
        bench.forward(runner, [step_of(runner.span, 1, position, ids[position : position + 1])])
        taken.append(meter.peak() - (runner.kv_bytes() - kv_bytes))
    usual = sorted(taken)[len(taken) // 2]
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
        meter = MemoryMeter()
        bench.forward(runner, [step])
        tries.append(meter.peak() - runner.kv_bytes())
        runner.close(1)
    taken, allowed = min(tries), 15 * _MIB
    bench.require(
        taken <= allowed,
        f"a prompt of {_POSITIONS} positions took {taken:,} bytes beside its KV; at most {allowed:,} are "
        "allowed: masks and scores must be worked in tiles",
    )
