"""The example plugin, installed as a third party's would be: listed with its distribution, and computing.

And docs/backend-plugins.md: all its commands run, in their order, in one shell.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from cluster import Cluster, Row
from tiny_llama import make_tiny_llama

from dgn_backends.bundled import bundled_model
from dgn_backends.testing import CHECKS

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugins" / "dgn-backend-example"
DOCUMENT = (ROOT / "docs/backend-plugins.md").read_text()
#: What the document's `pip` is told besides, so that nothing is fetched.
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
#: The document's commands take some ten seconds; the machine may be busy.
PATIENCE_S = 200.0

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plugin installed; nothing is fetched."""
    pytest.importorskip("hatchling", reason="hatchling, the plugin's build backend, is not installed")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", *OFFLINE, "--target"]
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


def environment_of_its_own(directory: Path) -> dict[str, str]:
    """A virtual environment that has what this one has, where pip installs without touching this one. Its
    commands are those that the document uses."""
    venv.create(directory, with_pip=False)
    bin_dir = directory / "bin"
    (packages,) = directory.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in paths]
    (packages / "outer.pth").write_text("".join(lines))
    for name in ("dgnd", "dgnctl", "pip", "pytest"):
        script = bin_dir / name
        script.write_text(f'#!/bin/sh\nexec "{bin_dir}/python" -m {name} "$@"\n')
        script.chmod(0o755)
    ours = ("PYTHON", "PYTEST", "DGN_", "XDG_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def commands() -> list[str]:
    """The document's shell blocks, but for the first, which prepares .venv: see test_infra_bootstrap.py."""
    first, *others = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, flags=re.M | re.S)
    assert first == "scripts/bootstrap.sh test\n. .venv/bin/activate\n"
    assert len(others) == len(re.findall(r"^```(?:sh|shell|bash|console)\b", DOCUMENT, flags=re.M)) - 1
    return others


def run_in_one_shell(blocks: list[str], directory: Path, environ: dict[str, str]) -> list[str]:
    """Runs them; what each printed. A command that fails ends the shell, but where the block says so."""
    lines = ["set -e", "trap 'jobs -p | xargs -r kill' EXIT"]
    for block in blocks:
        block = block.replace("pip install ", f"pip install {' '.join(OFFLINE)} ")
        block = block.replace("pip wheel ", f"pip wheel {' '.join(OFFLINE)} ")
        if "# fails" in block:
            block = f"set +e\n{block}test $? -eq 1 || exit 99\nset -e\n"
        lines += [block, "echo '=== block ==='"]
    command = ["bash", "-c", "\n".join(lines)]
    with subprocess.Popen(
        command,
        cwd=directory,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            printed, _ = shell.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            raise
    *outputs, rest = printed.split("=== block ===\n")
    assert (shell.returncode, len(outputs)) == (0, len(blocks)), printed + rest
    return outputs


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each block of the document printed, by the block's text."""
    pytest.importorskip("hatchling", reason="hatchling, the plugin's build backend, is not installed")
    if bundled_model("dgn-demo") is None:
        pytest.skip("the bundled model dgn-demo is absent")
    directory = tmp_path_factory.mktemp("doc")
    checkout = directory / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PLUGIN, checkout / "plugins" / PLUGIN.name, ignore=ignore)
    blocks = commands()
    outputs = run_in_one_shell(blocks, checkout, environment_of_its_own(directory / "venv"))
    left = [
        path for path in (directory / "dgn-backend-mine/src").rglob("*.py") if "xample" in path.read_text()
    ]
    assert left == []
    return dict(zip(blocks, outputs, strict=True))


def printed_by(walked: dict[str, str], command: str) -> str:
    """What the one block with this command printed."""
    (output,) = [output for block, output in walked.items() if command in block]
    return output


def test_the_document_installs_and_lists_the_example(walked: dict[str, str]) -> None:
    printed = printed_by(walked, "pip install ./plugins").splitlines()
    shown = [line for line in DOCUMENT.splitlines() if line.startswith(("BACKEND  ", "example  "))]
    assert len(shown) == 2
    assert {tuple(line.split()) for line in shown} <= {tuple(line.split()) for line in printed}


def test_the_document_runs_a_model_with_it(walked: dict[str, str]) -> None:
    printed = printed_by(walked, "dgnctl run")
    assert "peer" in printed
    assert re.search(r"^dgn-demo +embed,0-7,head +ready +example ", printed, flags=re.M), printed


def test_the_document_tests_the_copy_and_finds_the_mistake(walked: dict[str, str]) -> None:
    assert f"{len(CHECKS)} passed" in printed_by(walked, "mkdir tests")
    assert "ConformanceError: reference: " in printed_by(walked, "# fails")


def test_the_document_shows_a_broken_plugin_with_its_reason(walked: dict[str, str]) -> None:
    printed = printed_by(walked, "import no_such_driver")
    assert re.search(r"^mine +broken +dgn-backend-mine 0\.1\.0 ", printed, flags=re.M), printed
    (reason,) = re.findall(r"^it needs the Python module .+$", DOCUMENT, flags=re.M)
    assert reason in " ".join(printed.split())


def test_the_document_makes_a_wheel(walked: dict[str, str]) -> None:
    assert "dist/dgn_backend_mine-0.1.0-py3-none-any.whl" in printed_by(walked, "pip wheel").splitlines()


def test_the_document_leaves_only_the_copy(walked: dict[str, str]) -> None:
    printed = printed_by(walked, "pip uninstall")
    listed = re.findall(r"^(\w+) +usable ", printed, flags=re.M)
    assert "reference" in listed
    assert not {"example", "mine"} & set(listed)


def test_the_messages_in_the_document_are_those_of_the_tests_of_faults() -> None:
    tested = (ROOT / "tests/test_plugin_faults.py").read_text()
    shown = re.findall(r"^\| [\w ]+ \| `…([^`]+)`", DOCUMENT, flags=re.M)
    assert len(shown) == 7
    assert [message for message in shown if f'"{{LABEL}}{message}' not in tested] == []


def test_the_document_has_every_check() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", DOCUMENT, flags=re.M) == list(CHECKS)
