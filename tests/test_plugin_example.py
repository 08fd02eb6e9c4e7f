"""The example plugin, installed as a third party's would be: listed with its distribution, and computing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, Row
from tiny_llama import make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugins" / "dgn-backend-example"

LIST_AND_RUN = """
import json, sys
from pathlib import Path
import numpy as np
from dgn_backends.api import LoadRequest, Step
from dgn_backends.hf_config import read_config
from dgn_backends.registry import list_backends, load_backend
from dgn_backends.span import Span
from dgn_backends.tensor import Tensor

entry, = [entry for entry in list_backends() if entry.name == "example"]
listed_without_import = not any(name.startswith("dgn_backend_example") for name in sys.modules)
path = Path(sys.argv[1])
results = []
for name in ("example", "reference"):
    request = LoadRequest(path, read_config(path), Span(1, 3), "cpu", "f32")
    runner = load_backend(name).load(request, lambda done, total: None)
    runner.open(1, runner.span, 10)
    hidden = Tensor.from_f32(np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32), "f32")
    output, = runner.forward([Step(1, 0, hidden)])
    results.append(output.hidden.to_f32())
print(json.dumps({
    "entry": [entry.distribution, entry.version, entry.target],
    "listed_without_import": listed_without_import,
    "worst": float(abs(results[0] - results[1]).max()),
    "size": float(abs(results[1]).max()),
}))
"""

REFUSE = """
import sys
from pathlib import Path
from dgn_backends.api import LoadRequest
from dgn_backends.errors import BackendUnavailable
from dgn_backends.hf_config import read_config
from dgn_backends.registry import load_backend
from dgn_backends.span import Span

path = Path(sys.argv[1])
try:
    load_backend("example").load(LoadRequest(path, read_config(path), Span(0, 1), quant="int4"), print)
except BackendUnavailable as error:
    print(error)
"""

CONFORM = """
from dgn_backends.registry import load_backend
from dgn_backends.testing import check_backend
check_backend(load_backend("example"))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plugin installed; nothing is fetched."""
    pytest.importorskip("hatchling", reason="hatchling, the plugin's build backend, is not installed")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
    ]
    done = subprocess.run([*pip, str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = os.pathsep.join([str(target), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def python(environment: dict[str, str], code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_listed_and_computes_a_span(installed: dict[str, str], tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", tokenizer=False)
    found = json.loads(python(installed, LIST_AND_RUN, str(model)))
    assert found["entry"] == ["dgn-backend-example", "0.1.0", "dgn_backend_example.backend:ExampleBackend"]
    assert found["listed_without_import"]
    assert found["worst"] < 1e-4 < found["size"]


def test_it_refuses_quantisation_by_name(installed: dict[str, str], tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", tokenizer=False)
    said = python(installed, REFUSE, str(model))
    assert said == 'the example backend has no quant "int4"; set quant = "none"\n'


def test_it_conforms(installed: dict[str, str]) -> None:
    python(installed, CONFORM)


def test_reference_plugin_and_torch_serve_one_model_together(
    installed: dict[str, str], tmp_path: Path
) -> None:
    """Three daemons, a backend each; the ids are those of the reference alone."""
    pytest.importorskip("torch")
    model = str(make_tiny_llama(tmp_path / "model", n_blocks=6, max_positions=256))
    backends = {"a": "reference", "b": "example", "c": "torch"}
    rows = [Row("a", "embed,0-1"), Row("b", "2-3"), Row("c", "4-5,head"), Row("a", "embed,0-5,head", "alone")]
    with Cluster(tmp_path / "nodes", None) as cluster:
        for name in backends:
            cluster.add(name)
        cluster.nodes["b"].extra_env["PYTHONPATH"] = installed["PYTHONPATH"]
        for name, backend in backends.items():
            peers = [other for other in backends if other != name]
            mixed, alone = {"path": model, "backend": backend}, {"path": model, "backend": "reference"}
            cluster.configure(name, rows, peers, models={"m": mixed, "alone": alone})
        cluster.start()
        (worker,) = cluster.nodes["b"].ctl_json("status")["workers"]
        assert (worker["backend"], worker["state"]) == ("example", "ready")
        for prompt in ("one", "another prompt"):
            answers = [
                cluster.nodes["a"].run(prompt, "--model", name, "--max-tokens", "60")
                for name in ("m", "alone")
            ]
            assert answers[0]["token_ids"] == answers[1]["token_ids"]
            assert [hop["name"] for hop in answers[0]["route"]] == ["a", "b", "c"]
