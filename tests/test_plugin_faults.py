"""Plugins that go wrong while they load and compute, in real workers of a real dgnd: contained, and named."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from cluster import Cluster, Row, TestNode
from plugin_site import Site
from tiny_llama import make_tiny_llama
from user_kit import byte_ids

SPAN = "embed,0-2,head"
LABEL = 'backend "faulty" of their-plugin 1.5'

#: What a plugin does when a step holds the letter, and what is said of it.
FAULTS: dict[str, tuple[str, str]] = {
    "a": ("ctypes.string_at(8)", f"{LABEL} crashed: SIGSEGV"),
    "b": ("os.abort()", f"{LABEL} crashed: SIGABRT"),
    "c": ("os._exit(3)", f"{LABEL} ended the process, with exit code 3"),
    "d": ("sys.exit('enough')", f"{LABEL} raised sys.exit(enough)"),
    "e": ("raise ZeroDivisionError('why')", f"{LABEL} raised ZeroDivisionError: why"),
    "f": ("raise BaseException", f"{LABEL} raised BaseException"),
    "g": ("return outputs * 2", f"{LABEL}: it returned 2 outputs for 1 steps"),
    "h": ("return None", f"{LABEL}: it returned NoneType, not a list of StepOutput"),
    "i": ("array[0, 7] = np.nan", f"{LABEL}: the logit of token 7 at position"),
    "j": ("array = array[:, 1:]", f"{LABEL}: it returned logits f32["),
    "k": ("dtype = 'f16'", f"{LABEL}: it returned logits f16["),
    "l": ("raise BackendError('mine')", f"{LABEL}: mine"),
    "m": ("os.kill(os.getpid(), 40)", "killed by signal 40"),
    "n": ("if os.fork(): raise OSError('forked')", f"{LABEL} raised OSError: forked"),
    "o": ("self.kv_bytes = lambda: 'many'", f"{LABEL}: its runner's kv_bytes() is 'many'"),
}
#: Those that end the worker.
DEADLY = "abcmo"

PLUGIN = """
import ctypes, os, sys, time
import numpy as np
from dgn_backends.api import StepOutput
from dgn_backends.errors import BackendError
from dgn_backends.reference import ReferenceBackend
from dgn_backends.tensor import Tensor
from dgnd.worker import process

class Runner:
    def __init__(self, inner):
        self.__dict__.update(inner=inner, **{name: getattr(inner, name) for name in (
            "span", "dtype", "weights_bytes", "kv_bytes_per_position", "numerics", "row_invariant",
            "open", "truncate", "length", "close", "kv_bytes")})
    def forward(self, steps):
        outputs = self.inner.forward(steps)
        ids = set(steps[0].inputs.to_numpy().tolist())
        if not steps[0].logits_rows:
            return outputs
        array, dtype = outputs[0].logits.to_f32().copy(), "f32"
@FAULTS@
        return [StepOutput(logits=Tensor.from_f32(array, dtype))]

class Faulty:
    name = "faulty"
    def devices(self): return ["cpu"]
    def load(self, request, progress):
        progress(np.int64(1), np.int64(2))
        process.HUNG_S = 15.0  # a minute, outside of tests
        return Runner(ReferenceBackend().load(request, progress))

class Poisoned(Faulty):
    def load(self, request, progress):
        inner = ReferenceBackend().load(request, progress)
        forward = inner.forward
        def crashing(steps):
            if any(step.inputs.to_numpy().tolist().count(@A@) > 1 for step in steps):
                ctypes.string_at(8)
            return forward(steps)
        inner.forward = crashing
        return inner

class Loading(Faulty):
    def load(self, request, progress):
        inner = ReferenceBackend().load(request, progress)
        @LOADING@
        return inner
"""


def plugin(site: Site, loading: str = "", name: str = "") -> None:
    faults = [*((letter, source) for letter, (source, _) in FAULTS.items()), ("z", "time.sleep(1009)")]
    lines = [f"        if {byte_ids(letter)[0]} in ids:\n            {source}" for letter, source in faults]
    source = PLUGIN.replace("@FAULTS@", "\n".join(lines)).replace("@LOADING@", loading or "pass")
    source = source.replace("@A@", str(byte_ids("a")[0]))
    name = name or ("Loading" if loading else "Faulty")
    site.add("their-plugin", {"faulty": f"their_plugin:{name}"}, {"their_plugin": source})


def node(tmp_path: Path, cluster: Cluster, site: Site, more: str = "") -> TestNode:
    """A daemon with two models, one of them with the plugin; not started."""
    path = str(make_tiny_llama(tmp_path / "model", n_blocks=3, max_positions=4096))
    models = {"m": {"path": path, "backend": "faulty"}, "other": {"path": path, "backend": "reference"}}
    cluster.add("a").extra_env |= site.environment
    return cluster.configure("a", [Row("a", SPAN), Row("a", SPAN, "other")], models=models, more=more)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestNode]:
    path = tmp_path_factory.mktemp("faults")
    site = Site(path / "site")
    plugin(site)
    with Cluster(path / "nodes", None) as cluster:
        found = node(path, cluster, site)
        cluster.start()
        yield found


def workers(found: TestNode) -> dict[str, dict[str, Any]]:
    return {worker.model: msgspec.to_builtins(worker) for worker in found.status().workers}


def computing(found: TestNode) -> list[psutil.Process]:
    return [child for child in found.children() if child.status() != psutil.STATUS_ZOMBIE]


def answer(found: TestNode, model: str) -> list[int]:
    ids: list[int] = found.run("XYZ", "--model", model, "--max-tokens", "5", "--wait", "100")["token_ids"]
    return ids


def long_answer(found: TestNode, model: str, prompt: str) -> list[int]:
    ids: list[int] = found.run(prompt, "--model", model, "--max-tokens", "500")["token_ids"]
    return ids


def answering(found: TestNode) -> int:
    """How many sessions have an answer well under way."""
    return sum(session.position > 50 for session in found.status().sessions)


def refused(found: TestNode, letter: str, timeout: float = 60.0) -> str:
    """The one line that whoever asks is told."""
    options = ("--model", "m", "--max-tokens", "5", "--wait", "100")
    done = found.ctl("run", "--raw", *options, letter, check=False, timeout=timeout)
    assert done.returncode in (1, 7), (done, found.log)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("letter", FAULTS)
def test_a_fault_is_named_and_the_next_answer_is_right(running: TestNode, letter: str) -> None:
    right = answer(running, "other")
    running.wait_ready()  # after the test before
    before = workers(running)
    line = refused(running, letter)
    assert FAULTS[letter][1] in line
    assert f"a ({SPAN}): " in line
    assert answer(running, "m") == right == answer(running, "other")
    after = workers(running)
    assert after["other"]["pid"] == before["other"]["pid"]
    assert (after["m"]["pid"] != before["m"]["pid"]) == (letter in DEADLY)
    if letter == "a":
        assert 'their_plugin.py", line' in running.log  # where it crashed
    if letter == "n":
        running.wait_for(lambda: len(computing(running)) == 2, what="end of the copy")


def test_a_step_that_kills_its_worker_twice_ends_its_own_session_alone(tmp_path: Path) -> None:
    """Others of that worker go on with the answers that they would have given."""
    site = Site(tmp_path / "site")
    plugin(site, name="Poisoned")
    with Cluster(tmp_path / "nodes", None) as cluster:
        found = node(tmp_path, cluster, site, "[sessions]\nrecover_s = 60")
        cluster.start()
        prompts = ("XYZ", "PQR", "STU")
        right = [long_answer(found, "other", prompt) for prompt in prompts]
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(long_answer, found, "m", prompt) for prompt in prompts]
            found.wait_for(lambda: answering(found) == len(prompts), what="answers under way")
            line = refused(found, "aaaa")
            assert "was running at 2 deaths of workers" in line
            assert FAULTS["a"][1] in line
            assert answering(found) > 0, "nobody was there to be hurt"
            assert [other.result() for other in others] == right
        assert found.log.count("crashed: SIGSEGV; starting it again") == 2


def test_one_that_hangs_is_ended_and_named(running: TestNode) -> None:
    right = answer(running, "other")
    line = refused(running, "z", timeout=300)
    documented = f"{LABEL} hung: a batch took more than 60 s"
    assert documented.replace("60 s", "15 s") in line
    assert answer(running, "m") == right
    assert 'their_plugin.py", line' in running.log  # where it hung


@pytest.mark.parametrize(
    ("loading", "words"),
    [
        ("ctypes.string_at(8)", f"{LABEL} crashed: SIGSEGV"),
        ("os._exit(9)", f"{LABEL} ended the process, with exit code 9"),
        ("sys.exit(2)", f"{LABEL} raised sys.exit(2)"),
        ("raise KeyboardInterrupt", f"{LABEL} raised KeyboardInterrupt"),
        ("return 5", f"{LABEL}: its load() returned int, which has not all of a SpanRunner"),
        ("inner.numerics = 7", f"{LABEL}: its runner's numerics is not one line"),
        ("inner.weights_bytes = np.int64(7)", f"{LABEL}: its runner's weights_bytes is "),
        ("inner.dtype = ['f32']", f"{LABEL}: its runner's dtype is ['f32'], not one of"),
        ("progress('x', None)", f"{LABEL} raised TypeError: unsupported operand"),
        (
            "import dgnd.worker.load_watch as watch; watch.PATIENCE_S = 1; time.sleep(1009)",
            f"{LABEL} hung: nothing of it moved while it loaded",
        ),
    ],
)
def test_a_fault_while_loading_is_named_and_hurts_no_other_model(
    tmp_path: Path, loading: str, words: str
) -> None:
    site = Site(tmp_path / "site")
    plugin(site, loading)
    with Cluster(tmp_path / "nodes", None) as cluster:
        found = node(tmp_path, cluster, site)
        found.start()
        assert len(answer(found, "other")) == 5
        found.wait_for(lambda: words in workers(found)["m"]["detail"], what=words)
        pid = workers(found)["other"]["pid"]
        found.wait_for(lambda: found.log.count(words) >= 3, what="two more attempts")
        assert workers(found)["other"]["pid"] == pid
        assert len(answer(found, "other")) == 5
