"""Real nodes that are paused while answers run through them, and come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from cluster import Cluster, Row, TestNode
from disturbed import SAMPLINGS, Asked, asked
from load import serving
from tiny_llama import make_endless_llama

from dgnctl.duration import seconds_of
from dgnctl.pause import describe
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import BadRequest, BlocksMissing, NotReady
from dgnd.upkeep.pausing import Pausing

#: After one second nothing is to compute; three, on a busy machine.
STILL_S = 3.0
PARTS = {"embed,0-1": "ab", "2-3,head": "cd"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless_llama(tmp_path_factory.mktemp("model") / "tiny", n_blocks=4)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An origin without blocks, and two replicas for each part."""
    rows = [Row(name, span) for span, names in PARTS.items() for name in names]
    with Cluster(tmp_path_factory.mktemp("five"), model) as cluster:
        cluster.add("origin")
        cluster.full_mesh(rows, node={"drain_s": 30})
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """Nobody is paused, whatever the test before did."""
    for node in running.nodes.values():
        node.ctl("resume")
        node.wait_ready()
    origin = running.nodes["origin"]
    origin.wait_for(lambda: serving(origin) == set("abcd"), what="offers of all")
    return running


def unused_pausing(directory: Path) -> Pausing:
    """One whose node is asked for nothing."""
    none: Any = None
    return Pausing({}, none, none, none, none, none, none, directory / "paused.json", lambda: 1e9)


def ask(origin: TestNode, params: api.GenerateParams) -> api.GenerateResult:
    request = Asked(origin, params, 0, lambda route: None)
    request.ids()
    assert request.result is not None
    return request.result


def computing(node: TestNode) -> list[str]:
    """Its workers, as they were started."""
    commands = [" ".join(child.cmdline()) for child in node.children() if child.is_running()]
    return [command for command in commands if "dgnd.worker" in command]


def paused(node: TestNode, seconds: float | None = None) -> api.Paused:
    """Pauses it; when this returns none of its workers is there any more."""
    workers = [psutil.Process(pid) for pid in node.worker_pids()]
    begun = time.monotonic()
    with ControlClient(node.socket) as client:
        found: api.Paused = client.call("pause", api.PauseParams(seconds=seconds))
    assert time.monotonic() - begun < STILL_S
    for worker in workers:
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    return found


def memory(node: TestNode, alone: bool = False) -> float:
    """MiB of memory in which the node's processes are, shared pages in each; `alone`: dgnd's without its
    workers."""
    assert node.process is not None
    tree = [psutil.Process(node.process.pid), *([] if alone else node.children())]
    return float(sum(each.memory_info().rss for each in tree if each.is_running())) / (1 << 20)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("place", [0, 1], ids=["first", "head"])
def test_with_a_replica_no_token_is_lost(cluster: Cluster, place: int, sampling: dict[str, object]) -> None:
    origin = cluster.nodes["origin"]
    params = asked(**sampling)
    right = ask(origin, params).token_ids
    gone: list[TestNode] = []
    found: list[api.Paused] = []

    def pause(route: list[str]) -> None:
        gone.append(cluster.nodes[route[place]])
        found.append(paused(gone[0]))

    answer = Asked(origin, params, 20, pause)
    assert answer.ids() == right
    assert answer.result is not None
    (node,) = gone
    assert (found[0].left + found[0].closed, found[0].idle) == (
        1,
        0,
    )  # closed if too slow
    assert node.name not in [hop.name for hop in answer.result.route]
    status = node.status()
    assert (status.state, status.why) == ("paused", "it is paused by its user; 'dgnctl resume' ends that")
    assert [(worker.state, worker.weights_bytes) for worker in status.workers] == [("stopped", 0)]
    assert origin.state() == "ready"  # the others cover everything
    assert f"{node.name} is paused by its user" in origin.status().notes


def test_a_session_between_two_turns_goes_on_elsewhere(cluster: Cluster) -> None:
    origin = cluster.nodes["origin"]
    ask(origin, asked(session="plain", max_tokens=20))
    talk = ask(origin, asked(session="talk", max_tokens=20))
    second = {"prompt": "and then", "max_tokens": 20}
    right = ask(origin, asked(session="plain", **second)).token_ids
    found = paused(cluster.nodes[talk.route[1].name])
    assert (found.left, found.closed) == (0, 0)  # it waits for no turn
    assert found.idle >= 1
    assert ask(origin, asked(session="talk", **second)).token_ids == right
    origin.ctl("cache", "clear")


def test_a_node_that_is_paused_still_asks_others(cluster: Cluster) -> None:
    """Its own blocks count as little as anybody's there."""
    right = ask(cluster.nodes["origin"], asked(max_tokens=20)).token_ids
    node = cluster.nodes["a"]
    paused(node)
    found = ask(node, asked(max_tokens=20))
    assert found.token_ids == right
    assert "a" not in [hop.name for hop in found.route]


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes without a replica."""
    rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
    with Cluster(tmp_path_factory.mktemp("pair"), model) as cluster:
        cluster.full_mesh(rows, more="[sessions]\nrecover_s = 2")
        yield cluster


@pytest.fixture
def two(pair: Cluster) -> Cluster:
    """Nobody is paused, whatever the test before did."""
    for node in pair.nodes.values():
        node.ctl("resume")
    for node in pair.nodes.values():
        node.wait_ready()
        node.ctl("cache", "clear")
    return pair


@pytest.mark.parametrize("name", ["a", "b"], ids=["the origin itself", "another"])
def test_without_a_replica_the_session_is_kept_and_the_reason_shown(two: Cluster, name: str) -> None:
    origin, node = two.nodes["a"], two.nodes[name]
    right = ask(origin, asked()).token_ids
    told: list[api.Paused] = []
    answer = Asked(origin, asked(session=name), 20, lambda _: told.append(paused(node, 3600)))
    with pytest.raises(BlocksMissing, match=r"its node is paused by its user until \d\d:\d\d") as caught:
        answer.ids()
    assert [(each.left, each.idle, each.closed) for each in told] == [(0, 0, 1)]
    who = "this node" if name == "a" else name
    assert f"now {who} is paused by its user until" in str(caught.value)
    said = [*origin.status().notes, f"{name} {node.status().why.removeprefix('it ')}"]
    assert [line for line in said if line.startswith(f"{name} is paused by its user until")]
    assert node.ctl_json("resume") == {"state": "loading", "was_paused": True}
    for each in two.nodes.values():
        each.wait_ready()
    origin.wait_for(lambda: not origin.status().missing, what="all blocks")
    rest = Asked(origin, api.GenerateParams(session=name, resume=True), 0, lambda _: None)
    assert rest.ids() == right
    origin.ctl("cache", "clear")


def test_a_pause_ends_by_itself_and_outlives_a_restart(two: Cluster) -> None:
    """And the memory is back within 10 s of its begin."""
    node = two.nodes["b"]
    assert node.ctl("pause", "1h").stdout.startswith("paused: it is paused by its user until ")
    assert node.terminate() == 0
    node.start()
    node.wait_ready("paused")
    assert node.worker_pids() == []
    assert computing(node) == []
    assert node.ctl("pause", "2s").stdout.startswith("paused: ")  # another end
    node.wait_ready()
    ask(two.nodes["a"], asked(max_tokens=20))
    loaded, alone = memory(node), memory(node, alone=True)
    begun = time.monotonic()
    paused(node)
    back = memory(node)
    took = time.monotonic() - begun
    print(f"MiB loaded {loaded:.0f}, of them dgnd {alone:.0f}; paused {back:.0f}, after {took:.1f} s")
    assert loaded - alone > 20  # a worker
    assert back - alone < (loaded - alone) / 3  # nothing else has taken its place
    assert took < 30  # ten where nothing else runs
    node.ctl("resume")
    node.wait_ready()
    assert not (node.directory / "state" / "paused.json").exists()
    assert node.ctl("resume").stdout == "ready: it was not paused\n"


def test_what_is_reloaded_in_a_pause_is_loaded_after_it(two: Cluster) -> None:
    node = two.nodes["b"]
    paused(node)
    with pytest.raises(NotReady, match=r"paused by its user; 'dgnctl resume' ends that\)$"):
        ask(node, asked())
    text = node.config.read_text()
    node.config.write_text(text.replace('span = "2-3,head"', 'span = "1-3,head"'))
    node.ctl("reload")
    time.sleep(0.5)
    assert node.state() == "paused"
    assert computing(node) == []
    node.ctl("resume")
    node.wait_for(
        lambda: [w.spans for w in node.status().workers if w.state == "ready"] == ["1-3,head"],
        what="other blocks",
    )
    node.config.write_text(text)
    node.wait_for(lambda: node.ctl("reload", check=False).returncode == 0, what="end of the reload before")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0, 0, 0), ""),
        ((1, 0, 0), "1 answer ended or went on elsewhere\n"),
        ((0, 0, 1), "1 session between two answers let go: computed again when they go on\n"),
        (
            (2, 3, 0),
            "2 answers ended or went on elsewhere; "
            "3 sessions closed here: who asked goes on with other nodes, or is told why\n",
        ),
    ],
)
def test_a_pause_is_told_in_words(numbers: tuple[int, int, int], said: str) -> None:
    left, closed, idle = numbers
    assert describe(api.Paused("paused", "it is", left, closed, idle)) == f"paused: it is\n{said}"


@pytest.mark.parametrize(
    "kept", ['{"until": 1e400}', '{"until": 1e18}', '{"until": NaN}', "[]", "", '{"until": "x"}']
)
def test_a_damaged_pause_does_not_end_the_daemon(
    kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pausing = unused_pausing(tmp_path)
    pausing.path.write_text(kept)
    pausing.begin_as_before()
    assert not pausing.paused
    assert "paused.json is damaged" in caplog.text


def test_an_end_on_another_day_is_shown_with_its_date(tmp_path: Path) -> None:
    pausing = unused_pausing(tmp_path)
    pausing._resumed = trio.Event()
    pausing.until = 1e9 + 86400 - 0.5  # half a second after `pause 1d`
    assert pausing.why.endswith(time.strftime(" until %Y-%m-%d %H:%M", time.localtime(pausing.until)))
    pausing.until = 1e9 + 7200
    assert pausing.why.endswith(time.strftime("user until %H:%M", time.localtime(pausing.until)))


def test_no_pause_is_longer_than_a_year(two: Cluster) -> None:
    with ControlClient(two.nodes["a"].socket) as client:
        for seconds in (0, -1, 1e9):
            with pytest.raises(BadRequest):
                client.call("pause", api.PauseParams(seconds=seconds))
    assert two.nodes["a"].state() != "paused"
    refused = two.nodes["a"].ctl("pause", "soon", check=False)
    assert refused.returncode == 2
    assert "'soon' is no length of time; write it as 90s, 30m, 2h or 1h30m" in refused.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1d", 86400), ("5min", 300)],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "1m1h", "-5m", "0s", "1.5h"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ValueError, match="is no length of time"):
        seconds_of(text)
