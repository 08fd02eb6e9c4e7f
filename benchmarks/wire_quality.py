"""What `wire = "q8"` costs: in text, in bytes and in time.

    python benchmarks/wire_quality.py [--models DIRECTORY] [--quick] [--json]

Each trained model (those of benchmarks/quality.py) reads held-out text in f32 with the backend `reference`,
cut into spans whose edges are encoded and decoded as between nodes: perplexity over that of the same model
unsplit, and at how many of the positions that count another id is the likeliest. Edges are spread evenly over
the model; the most there can be is one around every block.

Time is that of encoding and decoding one token's row, and a chunk of a prompt, in this process.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_kit import conditions, report
from bench_kit.held_out import Window
from quality import default_models, trained_models, windows_of

from dgn_backends.api import LoadRequest, SpanRunner, Step
from dgn_backends.hf_config import read_config
from dgn_backends.registry import load_backend
from dgn_backends.span import span_of_units
from dgn_backends.tensor import Tensor, tensor_bytes
from dgnd.errors import DgnError
from dgnd.sessions.driver import MAX_CHUNK
from dgnd.wire import q8

WIDTHS = (2048, 4096)
REPEATS = 200


def chain(model: Path, edges: int) -> list[SpanRunner]:
    """The model in `edges` + 1 spans of about equally many units."""
    config = read_config(model)
    units = config.n_blocks + 2
    cuts = [round(units * n / (edges + 1)) for n in range(edges + 2)]
    backend = load_backend("reference")
    return [
        backend.load(
            LoadRequest(
                path=model, config=config, span=span_of_units(range(a, b), config.n_blocks), dtype="f32"
            ),
            lambda done, total: None,
        )
        for a, b in itertools.pairwise(cuts)
    ]


def logits(runners: Sequence[SpanRunner], window: Window) -> npt.NDArray[np.float64]:
    """Those that predict the window's ids from its `first` on, f64 [ids, vocab]."""
    rows = Tensor.from_numpy(np.array(window.ids[:-1], np.int32), "i32")
    wanted = tuple(range(window.first - 1, len(window.ids) - 1))
    for runner in runners:
        runner.open(0, runner.span, len(window.ids))
        (output,) = runner.forward([Step(0, 0, rows, wanted if runner.span.head else ())])
        runner.close(0)
        if output.hidden is not None:
            rows = q8.decode(q8.encode(output.hidden))
    assert output.logits is not None
    return output.logits.to_numpy().astype(np.float64)


def surprise(found: npt.NDArray[np.float64], window: Window) -> float:
    """The sum over the window's ids of how little they were expected, in nats."""
    top = found.max(axis=1)
    everything = top + np.log(np.exp(found - top[:, None]).sum(axis=1))
    return float((everything - found[range(len(found)), window.ids[window.first :]]).sum())


def effects(model: Path, windows: Sequence[Window]) -> dict[str, Any]:
    """By number of edges: the ratio of perplexities, and the share of positions with another likeliest id."""
    whole = chain(model, 0)
    plain = [logits(whole, window) for window in windows]
    count = sum(map(len, plain))
    before = sum(surprise(found, window) for found, window in zip(plain, windows, strict=True))
    figures: dict[str, Any] = {"perplexity": math.exp(before / count), "ids": count, "edges": {}}
    for edges in (1, 2, 3, read_config(model).n_blocks + 1):
        runners = chain(model, edges)
        after, other = 0.0, 0
        for window, expected in zip(windows, plain, strict=True):
            found = logits(runners, window)
            after += surprise(found, window)
            other += int((found.argmax(axis=1) != expected.argmax(axis=1)).sum())
        figures["edges"][edges] = {"ratio": math.exp((after - before) / count), "other": other / count}
    return figures


def took_us(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work`, in µs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def costs(repeats: int) -> dict[str, dict[str, float]]:
    """Of rows of different widths, one alone and a chunk."""
    found = {}
    rng = np.random.default_rng(1)
    for width, count in itertools.product(WIDTHS, (1, MAX_CHUNK)):
        rows = Tensor.from_f32(rng.standard_normal((count, width), np.float32), "bf16")
        sent = q8.encode(rows)
        found[f"{count} x {width}"] = {
            "encode_us": took_us(partial(q8.encode, rows), repeats),
            "decode_us": took_us(partial(q8.check, sent), repeats)
            + took_us(partial(q8.decode, sent), repeats),
            "bytes": len(sent.data),
            "over_bf16": len(sent.data) / tensor_bytes("bf16", rows.shape),
            "over_f32": len(sent.data) / tensor_bytes("f32", rows.shape),
        }
    return found


def main() -> None:
    """Prints a table of effects and one of costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=default_models())
    parser.add_argument("--quick", action="store_true", help="little text: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    limit, repeats = (4, 5) if options.quick else (None, REPEATS)
    found = {
        name: effects(path, windows_of(name, path, limit))
        for name, path in trained_models(options.models).items()
    }
    times = costs(repeats)
    effect_rows = [
        [
            name,
            f"{f['perplexity']:.3f}",
            f"{f['ids']:,}",
            str(edges),
            f"{e['ratio']:.4f}",
            f"{e['other']:.2%}",
        ]
        for name, f in found.items()
        for edges, e in f["edges"].items()
    ]
    cost_rows = [
        [
            what,
            f"{t['encode_us']:.0f}",
            f"{t['decode_us']:.0f}",
            f"{t['bytes']:,}",
            f"{t['over_bf16']:.2f}",
            f"{t['over_f32']:.2f}",
        ]
        for what, t in times.items()
    ]
    tables = [
        report.table(
            ["model", "perplexity", "ids", "edges in q8", "ratio", "another likeliest id"], effect_rows
        ),
        "",
        report.table(
            ["rows x hidden size", "encode, µs", "decode, µs", "bytes", "over bf16", "over f32"], cost_rows
        ),
    ]
    report.show(options.json, where, {"effects": found, "costs": times}, tables)


if __name__ == "__main__":
    try:
        main()
    except DgnError as error:
        raise SystemExit(error.message) from None
