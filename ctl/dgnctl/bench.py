"""`dgnctl bench`: has a process of its own measure a model on this machine, and shows the figures.

No daemon is needed; one that runs is asked for the path of a model that its configuration names. Knows
nothing of how anything is measured.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from dgnctl.child import child_running
from dgnctl.completion import model_names
from dgnctl.options import connect_client, json_option, socket_option
from dgnctl.output import emit, emit_json, size
from dgnd.control.api import ModelInfo
from dgnd.control.bench import BenchLine, BenchRequest, BenchResult, Source
from dgnd.errors import NoDaemon, SocketDenied, WorkerDied, error_from

DEMO_MODEL: Final = "dgn-demo"
_PATIENCE_S: Final = 15
_QUANTS: Final = ("none", "int8", "int4", "int8-fast", "int4-fast")
#: How the table says what the model's name was taken for.
_SOURCES: Final[dict[Source, str]] = {
    "directory": "a directory",
    "dgnd": "a model of the running dgnd",
    "bundled": "a model that comes along",
}


def _no_more_than_processors(ctx: click.Context, param: click.Parameter, threads: int | None) -> int | None:
    processors = os.cpu_count() or 1
    if threads is not None and threads > processors:
        raise click.BadParameter(
            f"{threads} threads would wait for each other: this machine has {processors}; give no more."
        )
    return threads


@click.command()
@click.option(
    "--model",
    default=DEMO_MODEL,
    metavar="PATH|NAME",
    shell_complete=model_names,
    help="A Hugging Face directory, a model of the running dgnd, or one that comes along.",
)
@click.option("--backend", help="The backend; auto takes the one that dgnd would.")
@click.option("--quant", type=click.Choice(_QUANTS), help="How weights are stored.")
@click.option("--dtype", type=click.Choice(("auto", "f32", "bf16", "f16")), help="Of the rest.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    callback=_no_more_than_processors,
    help="Compute threads; else the backend's choice.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), help="512, or what the context has room for.")
@click.option("--tokens", default=64, type=click.IntRange(2), show_default=True, help="Of one answer.")
@click.option("--sessions", default=8, type=click.IntRange(1, 64), show_default=True, help="Side by side.")
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True, help="Medians are of these.")
@json_option
@socket_option
@click.pass_context
def bench(ctx: click.Context, /, model: str, as_json: bool, **options: Any) -> None:
    """Measure how fast a model runs on this machine.

    A worker like dgnd's loads the model twice and answers random prompts; the speed of decoding is also given
    as a share of what the machine's memory allows. Ctrl-C ends it. What is not given of backend,
    quant and dtype is as the running dgnd has it for a model of its own, else auto, none and auto.
    """
    given = {name: value for name, value in options.items() if value is not None}
    request = BenchRequest(**{**find_model(ctx, model), **given})
    result = run(request, quiet=as_json)
    if as_json:
        emit_json(result)
    else:
        emit(describe(result))


def find_model(ctx: click.Context, model: str) -> dict[str, Any]:
    """What a name says of the request: a directory, a model that the running dgnd knows, with how it is
    loaded there, or else the name as it stands."""
    path = Path(model)
    if path.is_dir():
        return {"model": str(path.resolve()), "source": "directory"}
    found: list[ModelInfo] = []
    with contextlib.suppress(NoDaemon, SocketDenied), connect_client(ctx) as client:
        found = client.call("models.list")
    for info in found:
        if info.name == model:
            how = {"backend": info.backend, "quant": info.quant, "dtype": info.dtype}
            return {"model": info.path, "source": "dgnd", **how}
    return {"model": model, "source": "bundled"}


def run(request: BenchRequest, quiet: bool) -> BenchResult:
    """Measures in a child, which is gone when this returns; says on stderr what it does, unless `quiet`.

    Raises:
        DgnError: what the child reports; WorkerDied where it ends without a word.
    """
    show = not quiet and sys.stderr.isatty()
    last = BenchLine()
    asked = msgspec.json.encode(request).decode()
    with child_running("dgnd.bench", asked, patience_s=_PATIENCE_S) as child:
        assert child.stdout is not None
        for raw in child.stdout:  # to its end, so that it ends by itself
            last = msgspec.json.decode(raw, type=BenchLine)
            if show:
                click.echo(
                    f"\r\x1b[K{last.progress.what} ..." if last.progress else "\r\x1b[K", err=True, nl=False
                )
    if last.failure is not None:
        raise error_from(last.failure.kind, last.failure.message, {})
    if last.result is None:
        raise WorkerDied(f"the process that measures ended with exit code {child.returncode}")
    return last.result


def describe(result: BenchResult) -> str:
    """For people, in 80 columns."""
    threads = "threads of the backend's choice" if result.threads is None else f"{result.threads} thread(s)"
    gigabytes = (
        f"{result.bandwidth_bytes_s / 1e9:.1f} GB/s, {result.best_bandwidth_bytes_s / 1e9:.1f} at best"
    )
    rows = [
        ("taken as", f"{_SOURCES[result.source]}: {result.path}"),
        ("backend", f"{result.backend}, {result.dtype}, quant {result.quant}, {threads}"),
        ("parameters", f"{result.parameters:,} in {result.blocks} blocks"),
        ("load", f"{result.load_first_s:.2f} s, again {result.load_second_s:.2f} s"),
        ("weights", f"{size(result.weights_bytes)}; {size(result.read_bytes)} read for a token"),
        ("memory", f"{size(result.rss_bytes)} resident, {size(result.pss_bytes)} proportional"),
        (
            "at most",
            f"{size(result.first_peak_rss_bytes)} while loading, again {size(result.peak_rss_bytes)}",
        ),
        ("bandwidth", gigabytes),
        ("ceiling", f"{result.ceiling_tok_s:.1f} tok/s of decode"),
    ]
    speeds = [
        (f"prefill, {result.prompt_tokens} tokens", result.prefill_tok_s, ""),
        (f"decode, {result.tokens} tokens", result.decode_tok_s, f"{result.decode_share:.0%}"),
        (f"decode, {result.sessions} sessions", result.sessions_tok_s, f"{result.sessions_share:.0%}"),
    ]
    lines = [f"{result.model}", *(f"  {name:<11} {value}" for name, value in rows), ""]
    lines.append(f"  {'median of ' + str(result.rounds):<24}{'tok/s':>10}{'of the ceiling':>18}")
    lines += [f"  {name:<24}{speed:>10.1f}{share:>18}" for name, speed, share in speeds]
    return "\n".join(lines) + "\n"
