"""Measures one model: both loads, memory, prefill, decode alone and of several sessions side by side.

The worker process is the real one; between the rounds the machine's bandwidth is read again, as it changes.
Knows nothing of how figures are shown.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import cast

from dgn_backends.tensor import DType
from dgn_backends.weights import whole_model
from dgnd.bench.bandwidth import ReadBandwidth
from dgnd.bench.ceiling import parameters, read_bytes
from dgnd.bench.direct_worker import DirectSession, DirectWorker, decode
from dgnd.bench.memory import Memory, memory_of
from dgnd.bench.plan import Plan, make_plan
from dgnd.control.bench import BenchRequest, BenchResult
from dgnd.sessions.driver import MAX_CHUNK

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A worker just after it has loaded: seconds, memory."""

    seconds: float
    memory: Memory


@dataclass(slots=True)
class _Speeds:
    """Tokens a second, one sample of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    sessions: list[float] = field(default_factory=list)


def measure(request: BenchRequest, progress: Progress) -> BenchResult:
    """Does what is asked; raises DgnError. Quantised weights lie in a temporary folder until the end."""
    with tempfile.TemporaryDirectory(prefix="dgn-bench-", dir=_cache_root()) as cache:
        plan = make_plan(request, Path(cache))
        progress("loading for the first time")
        with start_worker(plan) as worker:
            first = _Loaded(worker.load_s, memory_of(worker.process.pid))
        progress("loading again")
        with start_worker(plan) as worker:
            second = _Loaded(worker.load_s, memory_of(worker.process.pid))
            bandwidth = ReadBandwidth(request.threads or len(os.sched_getaffinity(0)))
            try:
                speeds = _rounds(worker, plan, bandwidth, progress)
            finally:
                bandwidth.close()
    return _result(plan, worker, first, second, speeds, bandwidth.samples)


def start_worker(plan: Plan) -> DirectWorker:
    """A worker that has loaded; libraries' thread pools are as large as the plan says."""
    threads = {} if plan.load.threads is None else {"OMP_NUM_THREADS": str(plan.load.threads)}
    return DirectWorker(plan.load, whole_model(plan.config), {**os.environ, **threads}, MAX_CHUNK)


def _cache_root() -> Path | None:
    """Where gigabytes may lie for a while: $TMPDIR where set, else the user's cache, which is no tmpfs."""
    if os.environ.get("TMPDIR"):
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgn"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return root if os.access(root, os.W_OK) else None


def _rounds(worker: DirectWorker, plan: Plan, bandwidth: ReadBandwidth, progress: Progress) -> _Speeds:
    """The samples; one short answer warms up."""
    speeds = _Speeds()
    steps = plan.tokens - 1  # the first token of an answer comes with the prompt
    context = plan.prompt_tokens + plan.tokens
    worker.generate(plan.prompt(0)[:32], 2, context)
    with ExitStack() as stack:
        sessions: list[DirectSession] = []
        for index in range(plan.rounds):
            progress(f"prefill and decode, round {index + 1} of {plan.rounds}")
            bandwidth.measure()
            session = stack.enter_context(worker.open(context))
            speeds.prefill.append(plan.prompt_tokens / session.prefill(plan.prompt(index)))
            speeds.decode.append(steps / decode([session], steps))
            sessions.append(session)
        del sessions[plan.sessions :]
        while len(sessions) < plan.sessions:
            progress(f"prompt of session {len(sessions) + 1} of {plan.sessions}")
            session = stack.enter_context(worker.open(context))
            session.prefill(plan.prompt(len(sessions)))
            sessions.append(session)
        for index in range(plan.rounds):
            progress(f"{plan.sessions} sessions, round {index + 1} of {plan.rounds}")
            bandwidth.measure()
            for session in sessions:
                session.rewind(plan.prompt_tokens + 1)
            speeds.sessions.append(plan.sessions * steps / decode(sessions, steps))
    return speeds


def _result(
    plan: Plan,
    worker: DirectWorker,
    first: _Loaded,
    second: _Loaded,
    speeds: _Speeds,
    bandwidths: list[float],
) -> BenchResult:
    load, loaded = plan.load, worker.loaded
    read = read_bytes(plan.config, load.quant, cast(DType, loaded.dtype))
    ceiling = median(bandwidths) / read
    return BenchResult(
        model=load.model,
        path=load.path,
        source=plan.source,
        blocks=plan.config.n_blocks,
        parameters=parameters(plan.config),
        backend=load.backend,
        dtype=loaded.dtype,
        quant=load.quant,
        threads=load.threads,
        numerics=loaded.numerics,
        prompt_tokens=plan.prompt_tokens,
        tokens=plan.tokens,
        sessions=plan.sessions,
        rounds=plan.rounds,
        load_first_s=first.seconds,
        load_second_s=second.seconds,
        weights_bytes=loaded.weights_bytes,
        kv_bytes_per_position=loaded.kv_bytes_per_position,
        rss_bytes=second.memory.rss,
        pss_bytes=second.memory.pss,
        anonymous_bytes=second.memory.anonymous,
        peak_rss_bytes=second.memory.peak_rss,
        first_peak_rss_bytes=first.memory.peak_rss,
        prefill_tok_s=median(speeds.prefill),
        decode_tok_s=median(speeds.decode),
        sessions_tok_s=median(speeds.sessions),
        bandwidth_bytes_s=median(bandwidths),
        best_bandwidth_bytes_s=max(bandwidths),
        read_bytes=read,
        ceiling_tok_s=ceiling,
        decode_share=median(speeds.decode) / ceiling,
        sessions_share=median(speeds.sessions) / plan.sessions / ceiling,
    )
