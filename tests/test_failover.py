"""Real processes that die in mid-answer: another node, or the same one again, goes on with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster import Cluster, Row, TestNode
from tiny_llama import make_tiny_llama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import BlocksMissing

TOKENS = 300
#: Longer than any recovery on a busy machine.
END_S = 90.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a long context, so that an answer can be interrupted."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=6, max_positions=4096)


@dataclass
class Asked:
    """A request in a thread; `then` is called once, when `after` tokens have come, with the nodes beside the
    origin that the answer's route runs through at that moment."""

    node: TestNode
    params: api.GenerateParams
    after: int
    then: Callable[[list[str]], None]
    result: api.GenerateResult | None = None
    error: Exception | None = None
    came: int = 0
    longest_s: float = 0.0  # between two tokens
    _last: float = field(default_factory=time.monotonic)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with ControlClient(self.node.socket) as client:
                self.result = client.generate(self.params, self._delta)
        except Exception as error:  # noqa: BLE001 - shown by `ids`
            self.error = error

    def _delta(self, delta: api.Delta) -> None:
        before, self.came = self.came, self.came + len(delta.token_ids)
        now = time.monotonic()
        self.longest_s, self._last = max(self.longest_s, now - self._last), now
        if before < self.after <= self.came:
            self.then(self._route())

    def _route(self) -> list[str]:
        with ControlClient(self.node.socket) as client:
            (session,) = client.call("status").sessions
        return list(dict.fromkeys(hop.name for hop in session.route if hop.name != self.node.name))

    def ids(self) -> list[int]:
        """The whole answer's ids."""
        self._thread.join(END_S)
        assert not self._thread.is_alive(), "the answer does not end"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result.token_ids


def asked(**fields: object) -> api.GenerateParams:
    values = {"prompt": "hello there", "raw": True, "max_tokens": TOKENS, **fields}
    return api.GenerateParams(**values)  # type: ignore[arg-type]


def long_answer(origin: TestNode, sampling: dict[str, object]) -> tuple[api.GenerateParams, list[int]]:
    """A request whose answer has TOKENS ids, and these."""
    for number in range(100):
        params = asked(prompt=f"x{number}", **sampling)
        ids = Asked(origin, params, 0, lambda _: None).ids()
        if len(ids) == TOKENS:
            return params, ids
    raise AssertionError("every answer ends early")


SAMPLINGS = [{}, {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5}]


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    rows = [
        Row("a", "embed"),
        *(Row(name, "0-2") for name in "bc"),
        *(Row(name, "3-5,head") for name in "de"),
    ]
    with Cluster(tmp_path_factory.mktemp("five"), model) as cluster:
        cluster.full_mesh(rows)
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """Everyone is up, whatever the test before did to them."""
    for node in running.nodes.values():
        if node.process is None or node.process.poll() is not None:
            node.start()
    for node in running.nodes.values():
        node.wait_ready()
    return running


def kill_worker(node: TestNode) -> None:
    os.kill(node.worker_pids()[0], signal.SIGKILL)


@pytest.fixture
def stopped() -> Iterator[list[int]]:
    """Processes to be let go on at the end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("how", ["node", "worker", "two nodes"])
@pytest.mark.parametrize("after", [1, 60])
def test_an_answer_survives(cluster: Cluster, sampling: dict[str, object], how: str, after: int) -> None:
    origin = cluster.nodes["a"]
    params, right = long_answer(origin, sampling)

    def strike(names: list[str]) -> None:
        assert len(names) == 2
        for name in names if how == "two nodes" else names[-1:]:
            node = cluster.nodes[name]
            kill_worker(node) if how == "worker" else node.kill()

    assert Asked(origin, params, after, strike).ids() == right


@pytest.mark.parametrize("what", ["node", "daemon", "worker"])
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_an_answer_survives_what_hangs(cluster: Cluster, stopped: list[int], what: str, which: int) -> None:
    """SIGSTOP: no connection ends, nobody says anything. `Asked.ids` has a deadline."""
    params, right = long_answer(cluster.nodes["a"], {})

    def strike(names: list[str]) -> None:
        victim = cluster.nodes[names[which]]
        assert victim.process is not None
        daemon = [victim.process.pid] if what != "worker" else []
        for pid in daemon + (victim.worker_pids() if what != "daemon" else []):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)

    request = Asked(cluster.nodes["a"], params, 60, strike)
    assert request.ids() == right
    print(f"longest wait: {request.longest_s:.2f} s")


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes without a replica."""
    with Cluster(tmp_path_factory.mktemp("pair"), model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-2"), Row("b", "3-5,head")], more="[sessions]\nrecover_s = 60")
        yield cluster


@pytest.mark.parametrize("victim", ["a", "b"])
def test_without_a_replica_an_answer_waits_for_the_worker_to_be_back(pair: Cluster, victim: str) -> None:
    params, right = long_answer(pair.nodes["a"], {})
    strike = lambda _: kill_worker(pair.nodes[victim])  # noqa: E731
    assert Asked(pair.nodes["a"], params, 20, strike).ids() == right


def test_without_a_replica_an_answer_waits_for_the_node_to_be_back(pair: Cluster) -> None:
    params, right = long_answer(pair.nodes["a"], {})
    node = pair.nodes["b"]

    def strike(_: list[str]) -> None:
        node.kill()
        node.start()

    assert Asked(pair.nodes["a"], params, 20, strike).ids() == right


def test_what_nobody_covers_in_time_is_named_with_who_had_it(model: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path, model) as cluster:
        cluster.full_mesh([Row("a", "embed,0-2"), Row("b", "3-5,head")], more="[sessions]\nrecover_s = 1")
        origin = cluster.nodes["a"]
        params, _ = long_answer(origin, {})
        with pytest.raises(
            BlocksMissing, match="nobody reachable serves 3-5,head of model m within 1 s; b had them"
        ):
            Asked(origin, params, 20, lambda _: cluster.nodes["b"].kill()).ids()
