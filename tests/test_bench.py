"""`dgnctl bench` and what it stands on: a real worker driven directly, ceilings, no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, Row
from tiny_llama import make_tiny_llama

from dgn_backends.hf_config import read_config
from dgn_backends.weights import span_tensors, whole_model
from dgnctl.cli import run_command
from dgnd.bench.bandwidth import ReadBandwidth
from dgnd.bench.ceiling import parameters, read_bytes
from dgnd.bench.direct_worker import decode
from dgnd.bench.measure import start_worker
from dgnd.bench.memory import memory_of
from dgnd.bench.plan import make_plan
from dgnd.control.bench import BenchRequest
from dgnd.errors import ContextExceeded, ModelError, NotFound

SMALL = [
    "--backend",
    "reference",
    "--prompt-tokens",
    "20",
    "--tokens",
    "4",
    "--rounds",
    "1",
    "--sessions",
    "3",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DGN_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_all_figures_as_one_line(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "--model", str(model), *SMALL, "--json"]) == 0
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")
    figures = json.loads(out)
    assert (figures["prompt_tokens"], figures["tokens"], figures["sessions"]) == (20, 4, 3)
    assert (figures["backend"], figures["dtype"], figures["quant"]) == ("reference", "f32", "none")
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    assert [name for name, value in numbers.items() if value <= 0] == []
    assert figures["weights_bytes"] < figures["rss_bytes"] <= figures["peak_rss_bytes"]
    assert figures["decode_share"] == pytest.approx(figures["decode_tok_s"] / figures["ceiling_tok_s"])
    assert figures["sessions_share"] == pytest.approx(
        figures["sessions_tok_s"] / 3 / figures["ceiling_tok_s"]
    )


def test_a_table_for_people(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "--model", str(model), *SMALL]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for part in (
        "tiny",
        f"taken as    a directory: {model}",
        "prefill, 20 tokens",
        "decode, 3 sessions",
        "of the ceiling",
        "GB/s",
    ):
        assert part in out
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        (["--model", "no-such-model"], "not_found", 2),
        (["--tokens", "100000"], "context_exceeded", 2),
        (["--backend", "nothing"], "backend_unavailable", 2),
        (["--quant", "int3"], "bad_request", 2),
        (["--threads", "4096"], "bad_request", 2),
    ],
    ids=["model", "context", "backend", "quant", "threads"],
)
def test_failures_are_one_line(
    capfd: pytest.CaptureFixture[str], options: list[str], kind: str, code: int
) -> None:
    exit_code = run_command(["bench", *options, "--json"])
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert json.loads(out)["error"]["kind"] == kind
    assert exit_code == code


def test_what_the_name_was_taken_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("a", "embed,0-3,head")]
    with Cluster(tmp_path / "nodes", model) as cluster:
        node = cluster.add("a")
        cluster.configure("a", rows, models={"m": {"path": str(model), "backend": "onnx", "quant": "int8"}})
        cluster.start()
        monkeypatch.setenv("DGN_SOCKET", str(node.socket))

        def taken(*options: str) -> tuple[str, str, str]:
            assert run_command(["bench", "--json", *SMALL[2:], *options]) == 0
            out, err = capfd.readouterr()
            assert err == ""
            found = json.loads(out)
            return found["source"], found["backend"], found["quant"]

        assert taken("--model", "m") == ("dgnd", "onnx", "int8")
        assert taken("--model", "m", "--quant", "none") == ("dgnd", "onnx", "none")
        assert taken("--model", str(model), "--backend", "reference") == ("directory", "reference", "none")
        assert taken("--model", "dgn-demo")[0] == "bundled"
        (tmp_path / "m").symlink_to(model)
        monkeypatch.chdir(tmp_path)
        assert taken("--model", "m")[0] == "directory"


def test_a_worker_that_fails_is_quoted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = make_tiny_llama(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_command(["bench", "--model", str(broken), *SMALL, "--json"]) != 0
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["kind"] == ModelError.kind
    assert str(weights) in error["message"]


def _start(model: Path, tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """An endless bench in a process group of its own, once it measures; and its processes."""
    command = [
        sys.executable,
        "-m",
        "dgnctl",
        "bench",
        "--model",
        str(model),
        "--rounds",
        "1000000",
        *SMALL[:6],
    ]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    bench = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    children: list[psutil.Process] = []
    while len(children) < 2:  # the one that measures and its worker
        assert bench.poll() is None, bench.stderr and bench.stderr.read()
        children = psutil.Process(bench.pid).children(recursive=True)
    return bench, children


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "process"])
def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path, whole_group: bool) -> None:
    bench, children = _start(model, tmp_path)
    if whole_group:
        os.killpg(bench.pid, signal.SIGINT)
    else:
        bench.send_signal(signal.SIGINT)
    _, err = bench.communicate(timeout=60)
    assert bench.returncode == 130
    assert err.strip() == b"dgnctl: interrupted"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert list(tmp_path.glob("dgn-bench-*")) == []


def test_a_killed_client_leaves_nothing(model: Path, tmp_path: Path) -> None:
    bench, children = _start(model, tmp_path)
    bench.kill()
    bench.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_sessions_side_by_side_give_what_each_gives_alone(model: Path, tmp_path: Path) -> None:
    request = BenchRequest(model=str(model), backend="reference", prompt_tokens=40, tokens=6)
    plan = make_plan(request, tmp_path)
    with start_worker(plan) as worker:
        assert worker.load_s > 0
        assert memory_of(worker.process.pid).rss > worker.loaded.weights_bytes
        alone = []
        for seed in range(3):
            with worker.open(64) as session:
                session.prefill(plan.prompt(seed))
                decode([session], 5)
                alone.append(list(session.tokens))
        sessions = [worker.open(64) for _ in range(3)]
        for seed, session in enumerate(sessions):
            session.prefill(plan.prompt(seed))
        decode(sessions, 5)
        assert [session.tokens for session in sessions] == alone
        for session in sessions:  # and again from where the answers began
            session.rewind(41)
        decode(sessions, 5)
        assert [session.tokens for session in sessions] == alone


def test_plans(model: Path, tmp_path: Path) -> None:
    plan = make_plan(BenchRequest(model="dgn-demo"), tmp_path)
    assert plan.prompt_tokens + plan.tokens == plan.config.max_positions  # as much as there is room for
    assert plan.prompt(1) == plan.prompt(1) != plan.prompt(2)
    with pytest.raises(ContextExceeded, match="512"):
        make_plan(BenchRequest(model="dgn-demo", prompt_tokens=512), tmp_path)
    with pytest.raises(NotFound, match="no such directory"):
        make_plan(BenchRequest(model="../models/dgn-demo"), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_decode_step_reads(tmp_path: Path, tied: bool) -> None:
    config = read_config(make_tiny_llama(tmp_path / "m", tied=tied))
    embedding = config.vocab_size * config.block.hidden_size
    held = parameters(config)
    read = held if tied else held - embedding
    assert read_bytes(config, "none", "f32") == 4 * read
    assert read_bytes(config, "none", "bf16") == 2 * read
    shapes = span_tensors(config, whole_model(config))
    vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    rows = {
        name: shape for name, shape in shapes.items() if len(shape) == 2 and (tied or "embed" not in name)
    }
    # No row is longer than a group: 4 bits a weight, 4 bytes of scale and a byte for its zero point.
    groups = sum(shape[0] for shape in rows.values())
    assert read_bytes(config, "int4-fast", "f32") == 4 * vectors + groups * (64 + 4 + 1)


def test_bandwidth_and_memory_are_measured() -> None:
    bandwidth = ReadBandwidth(2, size=1 << 20)
    bandwidth.measure(passes=3)
    bandwidth.close()
    assert len(bandwidth.samples) == 3
    assert min(bandwidth.samples) > 0
    memory = memory_of(os.getpid())
    assert 0 < memory.anonymous <= memory.pss <= memory.rss <= memory.peak_rss
    assert memory_of(2**22 + 1).rss == 0  # no such process
