"""The conformance checks of what is refused and of what is counted. See `testing` for how they are run.

Knows nothing of any particular backend.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dgn_backends.api import SpanRunner, Step
from dgn_backends.errors import BackendError, DgnError, LimitError
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgn_backends.testing_kit import Bench, step_of
from dgn_backends.weights import whole_model


def check_limits(bench: Bench) -> None:
    """What does not fit is refused with a typed error before anything changes, and the runner goes on."""
    _, config = bench.model("grouped")
    span, vocab = whole_model(config), config.vocab_size
    runner = bench.load("grouped", Span(0, 2, embed=True))
    whole = bench.load("grouped")
    ids = bench.ids("grouped", 12)
    for each in (runner, whole):
        each.open(1, each.span, 12)
        bench.forward(each, [step_of(each.span, 1, 0, ids[:8])])
    alone = bench.run(whole, ids, [12], sequence=9)[8:]

    def token_ids(*values: int) -> Tensor:
        return Tensor.from_numpy(np.array(values, np.int32), "i32")

    def refused(what: str, *steps: Step, by: SpanRunner = whole, kind: type[DgnError] = BackendError) -> None:
        try:
            by.forward(list(steps))
        except kind:
            bench.require(
                by.length(1) == 8, f"{what} was refused, but the sequence has length {by.length(1)}"
            )
            return
        bench.require(False, f"{what} was not refused with a {kind.__name__}")

    good = Step(1, 8, token_ids(1, 2))
    refused("a step beyond the positions opened for", Step(1, 8, token_ids(*[1] * 5)), kind=LimitError)
    refused("a step that leaves a gap", Step(1, 9, token_ids(1)))
    refused("a step that begins before the end", Step(1, 7, token_ids(1)))
    refused("a step of no positions", Step(1, 8, token_ids()))
    refused("a step of a sequence that is not open", Step(5, 0, token_ids(1)))
    refused("a batch with a sequence twice", good, Step(1, 10, token_ids(1)))
    refused("a batch of which one step is wrong", good, Step(5, 0, token_ids(1)))
    refused("a token id beyond the vocabulary", Step(1, 8, token_ids(vocab)))
    refused("a negative token id", Step(1, 8, token_ids(-1)))
    refused(
        "hidden states where token ids are due",
        Step(1, 8, Tensor.from_f32(bench.hidden("grouped", 1), "f32")),
    )
    refused("token ids of a wrong shape", Step(1, 8, Tensor.from_numpy(np.zeros((1, 1), np.int32), "i32")))
    refused("logits of a row beyond the step", Step(1, 8, token_ids(1), (1,)))
    refused("logits of a span without head", Step(1, 8, token_ids(1), (0,)), by=runner)
    _refused_calls(bench, whole, runner, span)
    (got,) = bench.forward(whole, [step_of(span, 1, 8, ids[8:])])
    bench.same(whole, got, alone, "a sequence that went on after refusals")
    for each in (runner, whole):
        each.close(1)


def check_kv_accounting(bench: Bench) -> None:
    """`kv_bytes` counts what sequences hold, grows with them and not at their opening, and is 0 when all
    are closed."""
    runner = bench.load("grouped")
    runner.open(1, runner.span, 500_000)
    runner.open(2, runner.span, 500)
    bench.require(
        runner.kv_bytes() < 50_000 * runner.kv_bytes_per_position,
        f"opening a sequence took {runner.kv_bytes():,} bytes of KV at once",
    )
    ids = bench.ids("grouped", 400)
    held = 0
    for start in range(0, 400, 50):
        steps = [step_of(runner.span, number, start, ids[start : start + 50]) for number in (1, 2)]
        bench.forward(runner, steps)
        used = 2 * (start + 50) * runner.kv_bytes_per_position
        bench.require(
            runner.length(1) == start + 50, f"length is {runner.length(1)} after {start + 50} positions"
        )
        bench.require(
            runner.kv_bytes() >= max(used, held),
            f"kv_bytes is {runner.kv_bytes():,} where {used:,} are in use",
        )
        held = runner.kv_bytes()
    runner.close(1)
    bench.require(
        400 * runner.kv_bytes_per_position <= runner.kv_bytes() < held,
        "closing one sequence did not free its KV",
    )
    runner.truncate(2, 0)
    bench.require(runner.length(2) == 0, "truncation to 0 left positions")
    runner.close(2)
    bench.require(
        runner.kv_bytes() == 0, f"{runner.kv_bytes():,} bytes of KV are left when all sequences are closed"
    )


def _refused_calls(bench: Bench, whole: SpanRunner, part: SpanRunner, span: Span) -> None:
    calls: dict[str, Callable[[], object]] = {
        "opening a sequence that is open": lambda: whole.open(1, span, 12),
        "opening a span that is not loaded": lambda: part.open(3, span, 12),
        "truncation beyond the length": lambda: whole.truncate(1, 9),
        "truncation to a negative length": lambda: whole.truncate(1, -1),
        "the length of a sequence that is not open": lambda: whole.length(5),
        "closing a sequence that is not open": lambda: whole.close(5),
    }
    for what, call in calls.items():
        try:
            call()
        except BackendError:
            continue
        bench.require(False, f"{what} was not refused with a BackendError")
