"""Prefill and decode in tokens a second: the worker alone, through dgnctl, and split over two daemons.

    python benchmarks/line.py [--model DIR | --shape tiny|demo|wide|llama-3.2-1b] [--blocks N] [--dtype f32]
                              [--quant none] [--backend reference] [--threads 1] [--prompt N]
                              [--tokens N] [--rounds N] [--sessions N] [--pin] [--quick] [--json]

The three take turns in every round, in another order each time, so that all meet the same load of the
machine; the ratios are medians of the ratios within a round. A random model has a small vocabulary: blocks
are measured, not the head. The worker alone is driven over its socketpair, with the same frames and chunks
and without a dgnd. All processes share this machine, the daemons over loopback.

With --sessions the figures of decode are those of so many answers side by side, from when the last of them
has begun to when the first has ended. With --pin a node has one core for itself: the first core the worker
alone, the daemon of the whole model and the lower half, the second the upper half.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_kit import conditions, report
from bench_kit.sessions import together
from bench_kit.shapes import SHAPES, make_model
from cluster import Cluster, Row, TestNode

from dgn_backends.hf_config import read_config
from dgn_backends.quant_plan import SCHEMES
from dgn_backends.weights import whole_model
from dgnd.bench.direct_worker import DirectWorker, Timed, decode
from dgnd.sessions.driver import MAX_CHUNK
from dgnd.wire.messages import LoadSpans

WORKER, THROUGH, SPLIT = "worker alone", "through dgnctl", "split over two"
_TEXT = "Once upon a time there was a little dog who wanted to see the sea. "


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured."""

    model: Path
    backend: str
    dtype: str
    quant: str
    threads: int
    prompt: str
    tokens: int
    sessions: int
    pin: bool

    @property
    def environment(self) -> dict[str, str]:
        """Of every process."""
        return {"OMP_NUM_THREADS": str(self.threads)}

    def section(self) -> dict[str, object]:
        """The model's section in the daemons' configuration."""
        return {
            "path": str(self.model),
            "backend": self.backend,
            "device": "cpu",
            "dtype": self.dtype,
            "quant": self.quant,
            "threads": self.threads,
        }


def through_dgnctl(node: TestNode, setting: Setting) -> tuple[list[int], Timed]:
    """The prompt's ids and the times of one `dgnctl run --json`."""
    result = node.run(setting.prompt, "--max-tokens", str(setting.tokens), "--temperature", "0", timeout=600)
    times, ids = result["timings"], result["token_ids"]
    timed = Timed(len(result["prompt_token_ids"]), len(ids), times["prefill_s"], times["decode_s"])
    return result["prompt_token_ids"], timed


def side_by_side(node: TestNode, setting: Setting, ids: Sequence[int]) -> Timed:
    """As `through_dgnctl`, with the decode of several sessions together."""
    prompts = [(*ids[:-1], 5 + number) for number in range(setting.sessions)]
    prefill_s, speed = together(node.socket, prompts, setting.tokens)
    return Timed(len(ids) * len(prompts), setting.tokens, prefill_s, (setting.tokens - 1) / speed)


def worker_side_by_side(worker: DirectWorker, setting: Setting, ids: Sequence[int], context: int) -> Timed:
    """The same of the worker alone: all sessions in one batch."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(worker.open(context)) for _ in range(setting.sessions)]
        prefill_s = sum(session.prefill([*ids[:-1], 5 + number]) for number, session in enumerate(sessions))
        decode_s = decode(sessions, setting.tokens - 1)
    return Timed(len(ids) * len(sessions), setting.tokens, prefill_s, decode_s / len(sessions))


@contextmanager
def daemons(directory: Path, setting: Setting, spans: dict[str, str]) -> Iterator[TestNode]:
    """Daemons that serve these spans by name, ready; the first is the origin."""
    with Cluster(directory, setting.model) as cluster:
        for name in spans:
            cluster.add(name).extra_env.update(setting.environment)
        rows = [Row(name, span) for name, span in spans.items()]
        for name in spans:
            peers = [other for other in spans if other != name]
            cluster.configure(name, rows, peers, models={"m": setting.section()})
        for index, node in enumerate(cluster.nodes.values()):
            with on_core(index if setting.pin else None):
                node.start()
        for node in cluster.nodes.values():
            node.wait_ready(timeout=300)
        yield next(iter(cluster.nodes.values()))


@contextmanager
def on_core(index: int | None) -> Iterator[None]:
    """Processes started meanwhile stay on one core, the `index`-th of those allowed here."""
    allowed = os.sched_getaffinity(0)
    if index is not None:
        os.sched_setaffinity(0, {sorted(allowed)[index]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def measure(setting: Setting, rounds: int, directory: Path) -> dict[str, list[Timed]]:
    """`rounds` samples of each way, after one that is thrown away."""
    blocks = read_config(setting.model).n_blocks
    half = blocks // 2
    load = LoadSpans(
        model="m",
        path=str(setting.model),
        spans=(f"embed,0-{blocks - 1},head",),
        backend=setting.backend,
        device="cpu",
        dtype=setting.dtype,
        quant=setting.quant,
        threads=setting.threads,
    )
    context = read_config(setting.model).max_positions
    with ExitStack() as stack:
        whole = {"whole": f"embed,0-{blocks - 1},head"}
        halves = {"lower": f"embed,0-{half - 1}", "upper": f"{half}-{blocks - 1},head"}
        one = stack.enter_context(daemons(directory / "one", setting, whole))
        two = stack.enter_context(daemons(directory / "two", setting, halves))
        span = whole_model(read_config(setting.model))
        environment = {**os.environ, **setting.environment}
        with on_core(0 if setting.pin else None):
            alone = stack.enter_context(DirectWorker(load, span, environment, MAX_CHUNK))
        ids, _ = through_dgnctl(one, setting)
        ways: list[tuple[str, Callable[[], Timed]]] = [
            (WORKER, lambda: alone.generate(ids, setting.tokens, context)),
            (THROUGH, lambda: through_dgnctl(one, setting)[1]),
            (SPLIT, lambda: through_dgnctl(two, setting)[1]),
        ]
        if setting.sessions > 1:
            ways = [
                (WORKER, lambda: worker_side_by_side(alone, setting, ids, context)),
                (THROUGH, lambda: side_by_side(one, setting, ids)),
                (SPLIT, lambda: side_by_side(two, setting, ids)),
            ]
        for _, way in ways:
            way()
        samples: dict[str, list[Timed]] = {name: [] for name, _ in ways}
        for index in range(rounds):
            for turn in range(len(ways)):
                name, way = ways[(index + turn) % len(ways)]
                samples[name].append(way())
    return samples


def prefill_speed(timed: Timed) -> float:
    """Tokens of the prompt a second, to the first token of the answer."""
    return timed.prompt_tokens / timed.prefill_s


def decode_speed(timed: Timed) -> float:
    """Tokens a second after the first."""
    return (timed.tokens - 1) / timed.decode_s


def summary(samples: dict[str, list[Timed]]) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Medians of each way and its ratio to the worker alone, as figures and as rows."""
    figures: dict[str, dict[str, float]] = {}
    rows = []
    for name, timed in samples.items():
        found: dict[str, float] = {}
        cells = [name]
        for what, speed in (("prefill", prefill_speed), ("decode", decode_speed)):
            speeds = [speed(sample) for sample in timed]
            ratios = [a / speed(b) for a, b in zip(speeds, samples[WORKER], strict=True)]
            found[f"{what}_tok_s"] = report.median(speeds)
            found[f"{what}_best_tok_s"] = max(speeds)
            found[f"{what}_ratio"] = report.median(ratios)
            cells += [f"{report.median(speeds):.1f}", f"{max(speeds):.1f}", f"{report.median(ratios):.2f}"]
        found["decode_ms"] = 1000 / found["decode_tok_s"]
        figures[name] = found
        rows.append([*cells, f"{found['decode_ms']:.2f}"])
    return figures, rows


def main() -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory, instead of a random model")
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--blocks", type=int, help="of the random model")
    parser.add_argument("--quant", choices=["none", *SCHEMES], default="none")
    parser.add_argument("--dtype", choices=["f32", "bf16", "f16"], default="f32")
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--prompt", type=int, default=256, help="characters; one token each in a random model"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sessions", type=int, default=1, help="answers side by side")
    parser.add_argument("--pin", action="store_true", help="one core for each node")
    parser.add_argument("--quick", action="store_true", help="a tiny model once: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.prompt, options.tokens, options.rounds = "tiny", 20, 4, 1
    where = conditions.conditions()
    with tempfile.TemporaryDirectory(prefix="dgn-bench-") as name:
        directory = Path(name)
        model = options.model
        if model is None:
            context = options.prompt + options.tokens + 8
            shape = SHAPES[options.shape]
            model = make_model(directory / "model", shape, options.dtype, options.blocks, context)
        prompt = (_TEXT * (options.prompt // len(_TEXT) + 1))[: options.prompt]
        setting = Setting(
            model.resolve(),
            options.backend,
            options.dtype,
            options.quant,
            options.threads,
            prompt,
            options.tokens,
            options.sessions,
            options.pin,
        )
        blocks = read_config(model).n_blocks
        samples = measure(setting, options.rounds, directory)
    first = samples[WORKER][0]
    where["model"] = (
        f"{options.model or options.shape}, {blocks} blocks, {options.dtype}, quant {options.quant}, "
        f"backend {options.backend}, "
        f"{options.threads} thread(s)"
    )
    where["request"] = (
        f"{first.prompt_tokens} tokens of prompt, {first.tokens} of answer, greedy; {options.rounds} rounds; "
        f"{options.sessions} session(s){', one core for each node' if options.pin else ''}"
    )
    figures, rows = summary(samples)
    header = ["tok/s", "prefill", "best", "ratio", "decode", "best", "ratio", "ms/token"]
    report.show(options.json, where, figures, [report.table(header, rows)])


if __name__ == "__main__":
    main()
