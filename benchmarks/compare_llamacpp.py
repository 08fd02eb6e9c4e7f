"""Ours against llama.cpp, side by side on this machine: load, prefill, decode, several sessions.

    python benchmarks/compare_llamacpp.py [--shape Llama-3.2-1B | --model DIR] [--blocks N]
        [--formats int4,int8,bf16] [--backends auto] [--schemes default,fast]
        [--output-tensor-type same|default] [--measure load,prefill,decode,sessions] [--threads N]
        [--prompt 512] [--tokens 64] [--pairs 20] [--prefills 5] [--sessions 8] [--session-rounds 5]
        [--work DIR] [--quick] [--json]

Needs the extra `bench`: pip install '.[bench]' with CMAKE_ARGS=-DGGML_NATIVE=ON. The GGUF files are made of
the same random safetensors, by llama.cpp's own quantiser (int4: q4_0, int8: q8_0), and kept in --work beside
the model and our caches. By default the output tensor has the format of the rest (`same`); llama.cpp's own
choice for q4_0 is q6_K (`default`). All sides are loaded at once and take turns, the order changing from
round to round; each is rewound to the same prompt before it decodes. Ratios are medians of the ratios within
a round. With --backends none llama.cpp is measured alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_kit import conditions, report
from bench_kit.random_model import REAL_SHAPES, make_real_shape
from bench_kit.sides import LlamaSide, OurSide, Side

from dgn_backends.hf_config import read_config
from dgnd.bench.plan import make_plan
from dgnd.control.bench import BenchRequest
from dgnd.errors import DgnError

GGUF = {"int4": "q4_0", "int8": "q8_0", "bf16": "bf16"}
MEASURES = ("load", "prefill", "decode", "sessions")
#: Between two sides: threads of the one that was measured stop spinning.
_PAUSE_S = 0.3


def files(options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The model's directory and the GGUF of each format; made where they aren't there yet."""
    from bench_kit.gguf_model import quantise_gguf, write_gguf

    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    blocks = f"-{options.blocks}" if options.blocks else ""
    model = options.model or work / f"{options.shape}{blocks}"
    if not (model / "model.safetensors").exists():
        make_real_shape(model, options.shape, "bf16", options.blocks)
    base = work / f"{model.name}-bf16.gguf"
    if not base.exists():
        write_gguf(model, base)
    found = {}
    for name in options.formats:
        kind = GGUF[name]
        path = base if kind == "bf16" else work / f"{model.name}-{kind}-{options.output_tensor_type}.gguf"
        if not path.exists():
            output = kind if options.output_tensor_type == "same" else None
            quantise_gguf(base, path, kind, output, options.threads)
        found[name] = path
    return model, found


def request_of(
    name: str, scheme: str, backend: str, model: Path, options: argparse.Namespace
) -> BenchRequest:
    """What of ours is compared with llama.cpp's format."""
    quant = "none" if name == "bf16" else name + ("-fast" if scheme == "fast" else "")
    return BenchRequest(
        model=str(model),
        source="directory",
        backend=backend,
        quant=quant,
        dtype="bf16" if name == "bf16" else options.dtype,
        threads=options.threads,
        prompt_tokens=options.prompt,
        tokens=options.tokens,
        sessions=options.sessions,
    )


def rounds(sides: list[Side], count: int, sample: Callable[[Side], float]) -> dict[str, list[float]]:
    """`count` samples of each side, in turns."""
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for index in range(count):
        for turn in range(len(sides)):
            side = sides[(index + turn) % len(sides)]
            samples[side.name].append(sample(side))
            time.sleep(_PAUSE_S)
    return samples


def compare(makers: list[Callable[[], Side]], options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """All figures of one format, by side; the first side is llama.cpp's."""
    import random

    def prompt(seed: int) -> list[int]:
        return random.Random(seed).choices(range(vocabulary), k=options.prompt)

    figures: dict[str, Any] = {}
    speeds: dict[str, dict[str, list[float]]] = {}
    steps = options.tokens - 1  # the first token comes with the prompt
    with ExitStack() as stack:
        sides: list[Side] = []
        for maker in makers:
            if "load" in options.measure:
                side = maker()
                first_s, first = side.load_s, side.memory()
                side.close()
            side = maker()
            stack.callback(side.close)
            sides.append(side)
            figures[side.name] = {"load_again_s": side.load_s, **side.memory()}
            if "load" in options.measure:
                figures[side.name] |= {"load_first_s": first_s, "peak_first_mb": first["peak_mb"]}
        for side in sides:  # warms up, and is the prompt of the decode steps
            side.prefill(0, prompt(0))
            side.decode([0], 2)
        if "prefill" in options.measure:
            speeds["prefill"] = rounds(
                sides, options.prefills, lambda side: options.prompt / side.prefill(0, prompt(0))
            )
        if "decode" in options.measure:

            def alone(side: Side) -> float:
                side.rewind(options.prompt + 1)
                return steps / side.decode([0], steps)

            speeds["decode"] = rounds(sides, options.pairs, alone)
        if "sessions" in options.measure:
            everyone = range(options.sessions)
            for side in sides:
                for sequence in everyone:
                    side.prefill(sequence, prompt(sequence))

            def together(side: Side) -> float:
                side.rewind(options.prompt + 1)
                return options.sessions * steps / side.decode(everyone, steps)

            speeds["sessions"] = rounds(sides, options.session_rounds, together)
    against = sides[0].name
    for what, samples in speeds.items():
        for name, values in samples.items():
            ratios = [ours / theirs for ours, theirs in zip(values, samples[against], strict=True)]
            figures[name] |= {
                f"{what}_tok_s": report.median(values),
                f"{what}_best_tok_s": max(values),
                f"{what}_ratio": report.median(ratios),
            }
    return figures


def rows_of(figures: dict[str, Any]) -> list[list[str]]:
    """One row a side."""
    rows = []
    for name, found in figures.items():
        cells = [name]
        for what in ("prefill", "decode", "sessions"):
            speed = found.get(f"{what}_tok_s")
            cells += ["", ""] if speed is None else [f"{speed:.1f}", f"{found[f'{what}_ratio']:.2f}"]
        first = found.get("load_first_s")
        cells += ["" if first is None else f"{first:.2f}", f"{found['load_again_s']:.2f}"]
        cells += [f"{found[key]:,.0f}" for key in ("weights_mb", "resident_mb", "anonymous_mb", "peak_mb")]
        rows.append(cells)
    return rows


def parse() -> argparse.Namespace:
    """The command line."""

    def words(text: str) -> list[str]:
        return text.split(",")

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, help="a directory with bf16 weights, instead of a random model")
    parser.add_argument("--shape", choices=list(REAL_SHAPES), default="Llama-3.2-1B")
    parser.add_argument("--blocks", type=int, help="of the random model")
    parser.add_argument("--formats", type=words, default=list(GGUF))
    parser.add_argument("--backends", type=words, default=["auto"])
    parser.add_argument("--schemes", type=words, default=["default", "fast"])
    parser.add_argument("--dtype", default="auto", help="of ours, beside int8 and int4")
    parser.add_argument("--output-tensor-type", choices=["same", "default"], default="same")
    parser.add_argument("--measure", type=words, default=list(MEASURES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--prefills", type=int, default=5)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--session-rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "dgn" / "compare")
    parser.add_argument("--quick", action="store_true", help="one block, short: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = (set(options.formats) - set(GGUF)) | (set(options.measure) - set(MEASURES))
    if unknown:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    if options.quick:
        options.blocks, options.prompt, options.tokens, options.sessions = 1, 16, 4, 2
        options.pairs = options.prefills = options.session_rounds = 1
    return options


def main() -> None:
    """Prints one table for each format."""
    options = parse()
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} is not installed; "
            f"CMAKE_ARGS=-DGGML_NATIVE=ON {sys.executable} -m pip install '.[bench]' builds it"
        )
    from bench_kit.gguf_model import output_type

    model, ggufs = files(options)
    config = read_config(model)
    where = conditions.conditions()
    where["model"] = f"{options.model or options.shape}, {config.n_blocks} blocks with head"
    where["request"] = (
        f"{options.prompt} tokens of prompt, {options.tokens} of answer, {options.threads} thread(s); "
        f"{options.prefills} prefills, {options.pairs} pairs of decode, {options.session_rounds} rounds of "
        f"{options.sessions} sessions"
    )
    figures: dict[str, Any] = {}
    tables = []
    for name, path in ggufs.items():
        label = f"llama.cpp {GGUF[name]}, head {output_type(path)}"
        context = options.prompt + options.tokens
        makers: list[Callable[[], Side]] = [
            lambda label=label, path=path, context=context: LlamaSide(
                label, path, options.threads, options.sessions, context
            )
        ]
        for backend in options.backends if options.backends != ["none"] else []:
            for scheme in options.schemes if name != "bf16" else ["default"]:
                request = request_of(name, scheme, backend, model, options)
                plan = make_plan(request, options.work / f"cache-{model.name}")
                makers.append(lambda plan=plan: OurSide(plan))
        figures[name] = compare(makers, options, config.vocab_size)
        header = [name, "prefill", "x", "decode", "x", f"{options.sessions} sessions", "x"]
        header += ["load s", "again", "weights MB", "resident", "anonymous", "peak"]
        tables += [report.table(header, rows_of(figures[name])), ""]
    report.show(options.json, where, figures, tables)


if __name__ == "__main__":
    try:
        main()
    except DgnError as error:
        raise SystemExit(error.message) from None
