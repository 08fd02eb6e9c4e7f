"""The conformance checks of memory on a CPU: what a sequence takes beyond its KV, while it grows and in one
step.

Each model makes one thing large (see `testing_kit.MODELS`) so that the mistake that is looked for takes
several times the memory that is allowed. What is measured is done once before, so that code and kernels that
are used for the first time do not count. Knows nothing of how a backend stores anything."""

from __future__ import annotations

from dgn_backends.api import Step
from dgn_backends.tensor import Tensor
from dgn_backends.testing_kit import Bench, MemoryMeter, step_of

_POSITIONS = 4096
_MIB = 1 << 20


def check_kv_in_place(bench: Bench) -> None:
    """A sequence that grows takes its KV once. Where growing copies, old and new exist together for a
    moment, and that shows in the most memory ever held."""
    runner = bench.load("much-kv")
    ids = bench.ids("much-kv", _POSITIONS)
    bench.run(runner, ids[:1024], [16])
    runner.open(1, runner.span, _POSITIONS)
    meter = MemoryMeter()
    for start in range(0, _POSITIONS, 16):
        bench.forward(runner, [step_of(runner.span, 1, start, ids[start : start + 16])])
    taken, kv_bytes = meter.peak(), runner.kv_bytes()
    allowed = kv_bytes + kv_bytes // 5 + 3 * _MIB // 2
    bench.require(
        taken <= allowed,
        f"growing to {_POSITIONS} positions took {taken:,} bytes, of which {kv_bytes:,} are KV; "
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
    bench.forward(runner, [step_of(runner.span, 1, _POSITIONS, ids[_POSITIONS : _POSITIONS + 1])])
    runner.truncate(1, _POSITIONS)
    kv_bytes = runner.kv_bytes()
    meter = MemoryMeter()
    for position in range(_POSITIONS, len(ids)):
        bench.forward(runner, [step_of(runner.span, 1, position, ids[position : position + 1])])
    taken = meter.peak() - (runner.kv_bytes() - kv_bytes)
    allowed = 3 * runner.kv_bytes_per_position * _POSITIONS
    bench.require(
        taken <= allowed,
        f"a decode step took {taken:,} bytes over {kv_bytes:,} bytes of KV; at most {allowed:,} are allowed: "
        "K and V must not be repeated for the heads that share them",
    )
    runner.close(1)


def check_small_masks(bench: Bench) -> None:
    """A long prompt in one step makes no mask and no scores of positions by positions."""
    runner = bench.load("long-prompt")
    ids = bench.ids("long-prompt", _POSITIONS)
    for measured in (False, True):
        runner.open(1, runner.span, _POSITIONS)
        step = Step(1, 0, Tensor.from_numpy(ids, "i32"), (_POSITIONS - 1,))
        meter = MemoryMeter()
        bench.forward(runner, [step])
        if not measured:
            runner.close(1)
    taken, allowed = meter.peak() - runner.kv_bytes(), 13 * _MIB
    bench.require(
        taken <= allowed,
        f"a prompt of {_POSITIONS} positions took {taken:,} bytes beside its KV; at most {allowed:,} are "
        "allowed: masks and scores must be worked in tiles",
    )
    runner.close(1)
