"""The conformance checks of results, one function each. A check's docstring is the promise it looks at.

Knows nothing of any particular backend. See `testing` for how they are run, `testing_memory` for those of
memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dgn_backends.api import SpanRunner
from dgn_backends.span import Span
from dgn_backends.testing_kit import F32, Bench, Ids, step_of

_RESULTS = ("grouped", "biased", "dynamic", "windowed", "head-norms", "part-rotary")
#: Those whose results depend on where a row lies, not on the row alone.
_POSITIONED = ("grouped", "dynamic", "windowed", "part-rotary")
_POSITIONS = 200


def check_description(bench: Bench) -> None:
    """A backend and its runners say what they are, truthfully and in the API's types."""
    devices = bench.backend.devices()
    bench.require(devices and all(isinstance(device, str) for device in devices), "devices() lists no device")
    calls: list[tuple[int, int]] = []
    request = bench.request("grouped")
    runner = bench.backend.load(request, lambda done, total: calls.append((done, total)))
    bench.require(isinstance(runner, SpanRunner), "what load() returns has not the shape of a SpanRunner")
    bench.require(calls and calls[-1][0] == calls[-1][1] > 0, "load() did not report progress to its end")
    bench.require(calls == sorted(calls), "progress ran backwards")
    bench.require(runner.span == request.span, f'loaded "{runner.span}" instead of "{request.span}"')
    wanted = {bench.dtype} if bench.dtype != "auto" else {"f32", "bf16", "f16"}
    bench.require(runner.dtype in wanted, f"runs in {runner.dtype} instead of {bench.dtype}")
    bench.require(runner.weights_bytes > 0, "weights_bytes is not positive")
    bench.require(runner.kv_bytes_per_position > 0, "kv_bytes_per_position is not positive")
    bench.require(runner.kv_bytes() == 0, "kv_bytes() is not 0 before any sequence is open")
    bench.require(
        runner.numerics and runner.numerics.isprintable(), "numerics is not one line of printable text"
    )
    bench.require(
        bench.quant == "none" or bench.quant in runner.numerics,
        f"numerics does not name the quantisation {bench.quant}",
    )
    bench.require(
        bench.load("grouped").numerics == runner.numerics, "two loads of one span differ in numerics"
    )


def check_reference(bench: Bench) -> None:
    """Logits are near those of the reference backend, at the start and after a cached prefix."""
    for name in _RESULTS:
        runner = bench.load(name)
        ids = bench.ids(name, _POSITIONS)
        wanted = bench.reference_logits(name, ids)
        bench.near(bench.run(runner, ids, [len(ids)]), wanted, f'model "{name}", in one step')
        bench.near(bench.run(runner, ids, [64, 1, 7]), wanted, f'model "{name}", after a prefix')


def check_split(bench: Bench) -> None:
    """A model cut into spans, at any place, computes what it computes whole; and so does a part of what is
    loaded."""
    for name in _RESULTS:
        _, config = bench.model(name)
        whole = bench.load(name)
        ids = bench.ids(name, 70)
        wanted = bench.run(whole, ids, [len(ids)])
        for cut in range(config.n_blocks + 1):
            front = bench.load(name, Span(0, cut, embed=True))
            back = bench.load(name, Span(cut, config.n_blocks, head=True))
            got = bench.run(back, bench.run(front, ids, [30, 40]), [len(ids)])
            bench.same(whole, got, wanted, f'model "{name}", cut before block {cut}')
        parts = [
            Span(0, 1, embed=True),
            Span(1, config.n_blocks),
            Span(config.n_blocks, config.n_blocks, head=True),
        ]
        carried: Ids | F32 = ids
        last = wanted
        for number, part in enumerate(parts, start=1):
            whole.open(number, part, len(ids))
            step = step_of(part, number, 0, carried)
            (output,) = whole.forward([step])
            tensor = output.logits if part.head else output.hidden
            bench.require(tensor is not None, f'span "{part}" of a loaded model gave nothing')
            assert tensor is not None
            carried = last = np.array(tensor.to_f32())
        bench.same(whole, last, wanted, f'model "{name}", through parts of the loaded span')
        for number in (1, 2, 3):
            whole.close(number)


def check_chunks(bench: Bench) -> None:
    """A prompt cut into steps of any sizes gives what it gives in one step."""
    for name in _POSITIONED:
        runner = bench.load(name)
        ids = bench.ids(name, 310)
        wanted = bench.run(runner, ids, [len(ids)])
        for sizes in ([180, 1], [5], [128], [129], [300], [1, 2, 3, 63, 64, 65]):
            got = bench.run(runner, ids, sizes)
            bench.same(runner, got, wanted, f'model "{name}", steps of {sizes}')


def check_batch(bench: Bench) -> None:
    """Steps of different sequences in one batch, decode and prefill, loud and quiet, give what each gives
    alone."""
    _, config = bench.model("grouped")
    runner = bench.load("grouped", Span(0, config.n_blocks))
    # Sizes differ by 1000: a scale that is shared between rows would drown the quiet ones.
    inputs = {
        number: bench.hidden("grouped", 40 + number, seed=number, size=10.0 ** (number % 4 - 1))
        for number in range(1, 7)
    }
    alone = {number: bench.run(runner, rows, [len(rows)], sequence=number) for number, rows in inputs.items()}
    for number, rows in inputs.items():
        runner.open(number, runner.span, len(rows))
    cuts = {number: [0, 30 + number, 31 + number, 33 + number, 40 + number] for number in inputs}
    parts: dict[int, list[F32]] = {number: [] for number in inputs}
    for turn in range(4):
        steps = [
            step_of(
                runner.span, number, cuts[number][turn], rows[cuts[number][turn] : cuts[number][turn + 1]]
            )
            for number, rows in sorted(inputs.items(), key=lambda item: (item[0] * 5 + turn) % 7)
        ]
        for step, result in zip(steps, bench.forward(runner, steps), strict=True):
            parts[step.sequence].append(result)
    for number, results in parts.items():
        bench.same(runner, np.concatenate(results), alone[number], f"sequence {number} of a batch")
        runner.close(number)


def check_interleaved(bench: Bench) -> None:
    """Two sequences that take turns give what each gives alone; closing one leaves the other; an id that is
    opened again begins empty."""
    runner = bench.load("grouped")
    ids = {1: bench.ids("grouped", 40, seed=1), 2: bench.ids("grouped", 40, seed=2)}
    alone = {number: bench.run(runner, ids[number], [40]) for number in ids}
    for number in ids:
        runner.open(number, runner.span, 40)
    for position in range(30):
        for number in ids:
            _step_matches(bench, runner, number, position, ids[number], alone[number])
    runner.close(2)
    _step_matches(bench, runner, 1, 30, ids[1], alone[1])
    runner.open(2, runner.span, 40)
    bench.require(runner.length(2) == 0, "a sequence that was opened again is not empty")
    for position in range(9):
        _step_matches(bench, runner, 2, position, ids[2], alone[2])
        _step_matches(bench, runner, 1, 31 + position, ids[1], alone[1])
    runner.close(1)
    runner.close(2)


def check_rollback(bench: Bench) -> None:
    """After `truncate`, another continuation gives what it gives in a new sequence: nothing of the old one
    is left, and nothing that a sliding window had left behind is missing."""
    for name in ("grouped", "windowed"):
        runner = bench.load(name)
        first, second = bench.ids(name, 330, seed=3), bench.ids(name, 330, seed=4)
        runner.open(1, runner.span, 330)
        bench.forward(runner, [step_of(runner.span, 1, 0, first)])
        kept: Ids = first
        for length in (329, 300, 257, 256, 64, 63, 1, 0):
            runner.truncate(1, length)
            bench.require(
                runner.length(1) == length, f"length is {runner.length(1)} after truncation to {length}"
            )
            kept = np.concatenate([kept[:length], second[length : length + 9]])
            (got,) = bench.forward(runner, [step_of(runner.span, 1, length, kept[length:])])
            wanted = bench.run(runner, kept, [len(kept)], sequence=2)[length:]
            bench.same(runner, got, wanted, f'model "{name}", continued after truncation to {length}')
        runner.close(1)


def check_row_invariance(bench: Bench) -> None:
    """Where `row_invariant` is declared, a row's bits depend on its own input and KV alone, in many random
    cuts and companies. (Other checks compare bits as well where it is declared.)"""
    random = np.random.default_rng(7)
    for name in ("grouped", "biased", "windowed", "head-norms"):
        _, config = bench.model(name)
        runner = bench.load(name, Span(0, config.n_blocks, head=True))
        if not runner.row_invariant:
            return
        rows = bench.hidden(name, 90, seed=8)
        alone = bench.run(runner, rows, [len(rows)])
        for _ in range(12):
            others = int(random.integers(0, 5))
            runner.open(1, runner.span, len(rows))
            for other in range(2, 2 + others):
                runner.open(other, runner.span, 1000)
            position = 0
            while position < len(rows):
                count = int(random.choice([1, 1, 2, 3, 8, 17, 40]))
                steps = [step_of(runner.span, 1, position, rows[position : position + count])]
                for other in range(2, 2 + others):
                    company = bench.hidden(name, int(random.integers(1, 20)), seed=other, size=3.0)
                    steps.append(step_of(runner.span, other, runner.length(other), company))
                steps = [steps[index] for index in random.permutation(len(steps))]
                results = dict(zip([s.sequence for s in steps], bench.forward(runner, steps), strict=True))
                wanted = alone[position : position + count]
                bench.require(
                    np.array_equal(results[1], wanted),
                    f'model "{name}": bits of {len(wanted)} rows from {position} on depend on a step of '
                    f"{count} rows beside {others} other sequences",
                )
                position += len(wanted)
            for sequence in range(1, 2 + others):
                runner.close(sequence)


def check_kept_weights(bench: Bench) -> None:
    """Quantised weights that were kept on disk compute bit for bit what fresh ones do. (Nothing is looked at
    without quantisation.)"""
    if bench.quant == "none":
        return
    for name in ("grouped", "biased"):
        ids = bench.ids(name, 40)
        fresh = bench.run(bench.load(name), ids, [len(ids)])
        for start in ("first", "second"):
            request = replace(bench.request(name), cache_dir=bench.cache_dir)
            runner = bench.backend.load(request, lambda done, total: None)
            bench.require(
                np.array_equal(bench.run(runner, ids, [len(ids)]), fresh),
                f'model "{name}": bits of the {start} load with a place to keep weights differ',
            )


def check_large_values(bench: Bench) -> None:
    """Hidden states of the size that real models have in places (thousands) give finite results near the
    reference's."""
    _, config = bench.model("grouped")
    span = Span(0, config.n_blocks, head=True)
    rows = bench.hidden("grouped", 40, seed=5)
    rows[:, 3] *= 8000.0
    rows[::3] *= 2.0
    wanted = bench.run(bench.load_reference("grouped", span), rows, [len(rows)])
    bench.near(bench.run(bench.load("grouped", span), rows, [len(rows)]), wanted, "large hidden states")


def _step_matches(bench: Bench, runner: SpanRunner, number: int, position: int, ids: Ids, alone: F32) -> None:
    (got,) = bench.forward(runner, [step_of(runner.span, number, position, ids[position : position + 1])])
    bench.same(runner, got, alone[position : position + 1], f"sequence {number} at position {position}")
