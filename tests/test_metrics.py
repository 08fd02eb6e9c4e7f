"""Metrics as Prometheus has them: two real nodes, an answer through both, a peer that goes, the documents."""

from __future__ import annotations

import json
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from cluster import Cluster, Row, TestNode, free_port
from metrics_kit import WAIT_S, Scrape, ask, page, scrape_until
from user_kit import readable_model

from dgnd.config.load import load_config
from dgnd.control import api
from dgnd.errors import Cancelled, ConfigError, NoRoomNow
from dgnd.http.desk import Desk
from dgnd.metrics.catalogue import CATALOGUE
from dgnd.metrics.counts import MOST_APART, OTHERS, Counts, HttpCounts
from dgnd.metrics.histogram import SIZES, Histogram
from dgnd.wire.messages import Cancel, Frame, HopKey, StepFrame
from dgnd.worker.tally import Tally

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 12
SECRET = "xylophone quicksilver"


class Pair:
    """Two nodes that share a model; a shows metrics on a port, b on a Unix socket."""

    def __init__(self, a: TestNode, b: TestNode, port: int, socket: Path, prompt: int) -> None:
        self.a, self.b, self.port, self.socket = a, b, port, socket
        self.prompt = prompt  #: its tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """After one answer of TOKENS tokens."""
    folder = tmp_path_factory.mktemp("metrics")
    model = readable_model(folder / "m", max_positions=512)
    port, socket = free_port(), folder / "b.sock"
    rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
    with Cluster(folder / "nodes", model) as cluster:
        for name in "ab":
            cluster.add(name)
        cluster.configure("a", rows, ["b"], more=f'[metrics]\nlisten = "127.0.0.1:{port}"')
        cluster.configure("b", rows, ["a"], more=f'[metrics]\nlisten = "unix:{socket}"')
        cluster.start()
        a, b = cluster.nodes.values()
        answer = a.run(SECRET, "--max-tokens", str(TOKENS))
        assert len(answer["token_ids"]) == TOKENS
        yield Pair(a, b, port, socket, len(answer["prompt_token_ids"]))


def counted(scrape: Scrape) -> bool:
    return scrape.value("dgn_decode_steps_total", model="m") >= TOKENS - 1


# --- what is counted ---


def test_an_answer_through_two_nodes_is_counted_at_both(pair: Pair) -> None:
    at_a, at_b = scrape_until(pair.port, counted), scrape_until(pair.socket, counted)
    prompt = pair.prompt
    assert at_a.value("dgn_tokens_total", model="m") == TOKENS
    assert at_a.value("dgn_prompt_tokens_total", model="m") == prompt
    assert at_a.value("dgn_answers_total", model="m", outcome="length") == 1
    assert at_a.value("dgn_first_token_seconds_count", model="m") == 1
    assert at_a.value("dgn_next_token_seconds_count", model="m") == TOKENS - 1
    assert at_b.value("dgn_tokens_total", model="m") == 0
    for scrape, other in ((at_a, "b"), (at_b, "a")):
        assert scrape.value("dgn_prompt_positions_total", model="m") == prompt
        assert scrape.value("dgn_decode_steps_total", model="m") == TOKENS - 1
        for part in ("queue", "compute"):
            assert scrape.value("dgn_hop_seconds_count", model="m", part=part) == TOKENS
            assert scrape.value("dgn_hop_seconds_sum", model="m", part=part) > 0
        for part in ("serialise", "wire"):
            assert scrape.value("dgn_edge_seconds_count", peer=other, part=part) >= 1
            assert scrape.value("dgn_edge_seconds_sum", peer=other, part=part) > 0
        assert scrape.value("dgn_batch_steps_sum", model="m") == TOKENS
        assert scrape.value("dgn_peer_up", peer=other) == 1
        assert scrape.value("dgn_peer_round_trip_seconds", peer=other) > 0
        assert scrape.value("dgn_workers_ready", model="m") == 1
        assert scrape.value("dgn_ready") == 1
        assert scrape.value("dgn_state", state="ready") == 1


def test_the_account_of_memory_is_that_of_status(pair: Pair) -> None:
    scrape, memory = Scrape(page(pair.port)), pair.a.status().memory
    assert memory is not None
    assert scrape.value("dgn_memory_bytes", what="weights") == memory.weights
    assert scrape.value("dgn_memory_budget_bytes") == memory.budget


def test_promtool_accepts_the_page(pair: Pair) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on this machine (Debian: prometheus)")
    for where in (pair.port, pair.socket):
        done = subprocess.run(
            [promtool, "check", "metrics"], input=page(where), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_text_and_no_id_of_anybody_is_shown(pair: Pair) -> None:
    text = page(pair.port) + page(pair.socket)
    assert not any(word in text for word in [*SECRET.split(), pair.a.peer_id, pair.b.peer_id])


def test_a_lost_peer_is_counted_and_comes_back(pair: Pair) -> None:
    before = Scrape(page(pair.port))
    pair.a.ctl("disconnect", "b")
    gone = scrape_until(pair.port, lambda scrape: scrape.value("dgn_peer_up", peer="b") == 0)
    assert (
        gone.value("dgn_peer_losses_total", peer="b") == before.value("dgn_peer_losses_total", peer="b") + 1
    )
    failed = pair.a.ctl("run", "--raw", "hi", "--max-tokens", "1", check=False)
    assert failed.returncode != 0
    assert Scrape(page(pair.port)).value("dgn_answers_total", model="m", outcome="blocks_missing") == 1
    pair.a.ctl("connect", pair.b.address)
    back = scrape_until(pair.port, lambda scrape: scrape.value("dgn_peer_up", peer="b") == 1)
    assert back.value("dgn_peer_reconnects_total", peer="b") >= 1


# --- what is asked and how ---


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics HTTP/1.1\r\nHost: rebound.example\r\n\r\n", b"403 Forbidden"),
        (b"HELO\r\n\r\n", b"400 Bad Request"),
        (b"HEAD /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\n\r\n", b"200 OK"),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET /metrics HTTP/1.1\r\nHost: [::1]:9464\r\n\r\n", b"200 OK"),
    ],
)
def test_requests(pair: Pair, request_: bytes, status: bytes) -> None:
    assert ask(pair.port, request_).startswith(b"HTTP/1.1 " + status + b"\r\n")


def test_openmetrics_where_it_is_asked_for(pair: Pair) -> None:
    accept = b"Accept: application/openmetrics-text;version=1.0.0\r\n"
    answer = ask(pair.port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n" + accept + b"\r\n")
    assert b"\r\nContent-Type: application/openmetrics-text" in answer
    assert answer.endswith(b"# EOF\n")


def test_clients_that_hold_on_or_send_without_end_harm_nobody(pair: Pair) -> None:
    held = [socket.create_connection(("127.0.0.1", pair.port)) for _ in range(20)]
    try:
        held[0].sendall(b"x" * (1 << 20))
    except OSError:
        pass  # it has hung up
    try:  # while they hold on
        scrape_until(pair.port, lambda scrape: scrape.value("dgn_ready") == 1)
    finally:
        for sock in held:
            sock.close()


def test_the_socket_is_for_owner_and_group(pair: Pair) -> None:
    assert stat.S_IMODE(pair.socket.stat().st_mode) == 0o660


def test_off_by_default_and_without_the_library(tmp_path: Path) -> None:
    config = tmp_path / "dgn.toml"
    config.write_text("")
    assert load_config(config, []).config.metrics.listen == ""
    code = "import sys, dgnd.app; print('dgnd.exposition.collect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("0.0.0.0:9464", '2:1: "0.0.0.0:9464" can be reached from other machines'),
        ("192.168.1.5:9464", '2:1: "192.168.1.5:9464" can be reached from other machines'),
        ("[::]:9464", '2:1: "[::]:9464" can be reached from other machines'),
        ("9464", '2:1: "9464" is no address for metrics; one such as 127.0.0.1:9464'),
        ("unix:here.sock", '2:1: "unix:here.sock" names no socket by its whole path'),
        ("unix:/" + "x" * 120, "2:1: a socket's path has at most"),
    ],
)
def test_where_it_may_not_listen(listen: str, words: str, tmp_path: Path) -> None:
    config = tmp_path / "dgn.toml"
    config.write_text(f'[metrics]\nlisten = "{listen}"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(config, [])
    assert caught.value.message.startswith(f"{config}:{words}")
    assert "\n" not in caught.value.message


def test_a_socket_that_cannot_be_made_is_told_with_its_place(tmp_path: Path) -> None:
    config = tmp_path / "dgn.toml"
    state, socket = tmp_path / "state", tmp_path / "s"
    listen = f"unix:{tmp_path}/nowhere/m.sock"
    config.write_text(
        f'[node]\nstate_dir = "{state}"\nlisten = []\n[control]\nsocket = "{socket}"\n'
        f'[metrics]\nlisten = "{listen}"\n'
    )
    command = [sys.executable, "-m", "dgnd", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{config}:7:1: {tmp_path}/nowhere/m.sock")


# --- the counts themselves ---


def test_names_are_bounded() -> None:
    counts = Counts()
    for number in range(2 * MOST_APART):
        counts.model(f"m{number}").tokens += 1
        counts.peer(f"p{number}").connections += 1
    assert len(counts.models) == len(counts.peers) == MOST_APART + 1
    assert counts.model(OTHERS).tokens == MOST_APART
    assert sum(count.tokens for count in counts.models.values()) == 2 * MOST_APART


def test_requests_over_http_are_counted_while_they_last_and_where_they_are_too_many() -> None:
    counts = HttpCounts()
    desk = Desk(None, 0, 1, counts=counts)  # type: ignore[arg-type]  # no place: nothing is asked of a node
    seen: list[HttpCounts] = []

    async def piece(*_: object) -> None:
        raise AssertionError("nothing answers")

    async def work() -> None:
        gone = trio.Event()

        async def look() -> None:
            await trio.testing.wait_all_tasks_blocked()
            seen.append(replace(counts))
            gone.set()

        with desk.request():
            with pytest.raises(NoRoomNow, match="1 requests"), desk.request():
                pass
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                with pytest.raises(Cancelled):
                    await desk.answers([api.GenerateParams(prompt="x")], piece, gone)

    trio.run(work)
    assert seen == [HttpCounts(requests=1, waiting=1, refused=1)]
    assert counts == HttpCounts(requests=0, waiting=0, refused=1)


def test_a_histogram_counts_each_value_in_all_bounds_above_it() -> None:
    histogram = Histogram(SIZES)
    histogram.add(1)
    histogram.add(3, 2)
    histogram.add(1000)
    assert list(histogram.cumulative())[:3] == [("1.0", 1), ("2.0", 1), ("4.0", 3)]
    assert list(histogram.cumulative())[-1] == ("+Inf", 4)
    assert histogram.total == 1007


def step(key: HopKey, start: int, count: int = 1) -> Frame:
    return Frame(
        StepFrame(key=key, branch=0, route=0, start=start, count=count, digest_start=0, digest_end=0)
    )


def test_a_worker_counts_how_long_steps_waited_and_forgets_those_that_were_dropped() -> None:
    tally, one, other = Tally(), HopKey("o", "s", 1), HopKey("o", "t", 1)
    tally.put(step(one, 0, 5), 10.0)
    tally.put(step(other, 0), 11.0)
    tally.put(step(one, 5), 12.0)
    tally.put(Frame(Cancel(key=other, branch=0)), 12.5)
    tally.taken([step(one, 0, 5), step(one, 5)], 14.0)
    tally.computed([step(one, 0, 5), step(one, 5)], 0.5)
    done = tally.said()
    assert (done.decode_steps, done.prompt_positions) == (1, 5)
    assert done.queue.total == 4.0 + 2.0
    assert done.compute.total == 1.0
    assert done.batch.total == sum(done.batch.counts) * 2 == 2
    assert not tally._came


def test_a_worker_that_begins_anew_takes_nothing_away() -> None:
    counts, tally = Counts().model("m"), Tally()
    nothing = tally.said()
    tally.computed([step(HopKey("o", "s", 1), 0)], 0.5)
    done = tally.said()
    counts.worked(nothing, done)
    counts.worked(nothing, done)  # of the process after it
    assert counts.decode_steps == 2
    assert counts.compute.total == 1.0


# --- documents ---


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \|([^|]*)\|",
        (ROOT / "docs/metrics.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_metric_is_documented_and_no_other() -> None:
    ours = {metric.name: (metric.kind, frozenset(metric.labels)) for metric in CATALOGUE.values()}
    assert {name: row for name, row in documented().items() if name.startswith("dgn_")} == ours


def test_the_dashboard_shows_every_metric_of_ours_and_none_that_is_not_there() -> None:
    dashboard = json.loads((ROOT / "packaging/grafana/dgn.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [each.get("definition", "") for each in dashboard["templating"]["list"]]
    known = {
        f"{name}{suffix}"
        for name, (kind, _) in documented().items()
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }
    named = set(re.findall(r"\b(?:dgn|process)_\w+", " ".join(asked)))
    assert named
    assert named <= known
    assert {name for name in CATALOGUE if not any(each.startswith(name) for each in named)} == set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_every_metric_that_a_node_shows_is_documented(pair: Pair) -> None:
    scrape = scrape_until(pair.port, counted)
    rows = documented()
    for name, family in scrape.families.items():
        full = f"{name}_total" if family.type == "counter" else name
        assert rows[full][0] == family.type
        assert scrape.labels(name) <= rows[full][1]
    shown = {f"{name}_total" if each.type == "counter" else name for name, each in scrape.families.items()}
    assert set(rows) - shown <= {"dgn_refusals_total"}  # which has a sample once there was one
