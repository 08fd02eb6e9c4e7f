"""Real daemons on a network of their own, with delays, losses, cuts, stops: answers go on with the same ids.

The origin has the first half of the model, two others have the second.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from cluster import Cluster, Row, TestNode
from disturbed import Asked, long_answer
from lan import Lan, why_not
from load import serving
from tiny_llama import make_tiny_llama

from dgnd.control import api

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

TOKENS = 120
AFTER = 20
ROWS = [Row("a", "embed,0-1"), Row("b", "2-3,head"), Row("c", "2-3,head")]
#: Seconds until an answer must go on: three times what it takes on a machine of its own.
SOON_S = 18.0


@dataclass
class Place:
    """The network, the nodes on it, and an answer that nothing disturbed."""

    lan: Lan
    cluster: Cluster
    params: api.GenerateParams
    right: list[int]

    def node(self, name: str) -> TestNode:
        return self.cluster.nodes[name]

    @property
    def origin(self) -> TestNode:
        return self.node("a")

    def disturbed(self, then: Callable[[str], None]) -> Asked:
        """The same answer, with something done when it is under way, told which node has the second half."""
        asked = Asked(self.origin, self.params, AFTER, lambda route: then(route[-1]))
        assert asked.ids() == self.right
        assert asked.came == len(self.right)
        return asked

    def lost(self) -> int:
        """How many connections were given up so far, by anybody."""
        return sum(node.log.count(" is gone: ") for node in self.cluster.nodes.values())

    def whole(self) -> None:
        """Waits until everybody serves, as seen by the origin."""
        self.origin.wait_for(lambda: serving(self.origin) == set("abc"), what="everybody in the map")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("lan")
    model = make_tiny_llama(directory / "model", n_blocks=4, max_positions=2048)
    with Lan("abc") as lan, Cluster(directory / "nodes", model) as cluster:
        for name in "abc":
            node = cluster.add(name)
            node.host, node.before = lan.addresses[name], lan.inside(name)
        cluster.full_mesh(ROWS, more="[sessions]\nrecover_s = 60")
        yield Place(lan, cluster, *long_answer(cluster.nodes["a"], {}, TOKENS))


@pytest.fixture(autouse=True)
def healed(place: Place) -> Iterator[None]:
    place.whole()
    yield
    for wire in place.lan.wires():
        wire.delay_s, wire.loss, wire.cut = 0.0, 0.0, False


@pytest.fixture
def alone(place: Place) -> Iterator[str]:
    """The one node that has the second half while the other has left."""
    place.node("c").ctl("drain")
    yield "b"
    place.node("c").ctl("drain", "--undo")


def processes(node: TestNode) -> list[int]:
    assert node.process is not None
    return [node.process.pid, *(child.pid for child in node.children())]


def test_delays_and_losses(place: Place) -> None:
    before = place.lost()
    for wire in place.lan.wires():
        wire.delay_s, wire.loss = 0.01, 0.01
    place.disturbed(lambda hop: None)
    assert place.lost() == before


def test_a_cut_link_where_another_has_the_blocks(place: Place) -> None:
    def cut(hop: str) -> None:
        place.lan.wire("a", hop).cut = True

    assert place.disturbed(cut).longest_s < SOON_S


def test_a_link_that_is_cut_and_heals(place: Place, alone: str) -> None:
    def cut(hop: str) -> None:
        assert hop == alone
        wire = place.lan.wire("a", hop)
        wire.cut = True
        threading.Timer(4.0, lambda: setattr(wire, "cut", False)).start()

    asked = place.disturbed(cut)
    assert 3.5 <= asked.longest_s < 4.0 + SOON_S
    # Neither end is avoided for it.
    begun = time.monotonic()
    place.disturbed(lambda hop: None)
    assert time.monotonic() - begun < SOON_S


def test_a_node_whose_address_changes(place: Place, alone: str) -> None:
    new = "10.77.0.77"
    asked = place.disturbed(lambda hop: place.lan.move(hop, new))
    assert asked.longest_s < 2 * SOON_S
    place.disturbed(lambda hop: None)
    # It dialled in, and is known at its new address from now on.
    state = place.origin.directory / "state" / "addresses.json"
    assert f"/ip4/{new}/tcp/" in state.read_text()
    # The origin begins anew, with a configuration that has the old one.
    place.origin.terminate()
    place.origin.start()
    place.origin.wait_ready()
    place.disturbed(lambda hop: None)


def test_a_hop_that_stands_still(place: Place) -> None:
    stopped: list[int] = []

    def stop(hop: str) -> None:
        stopped.extend(processes(place.node(hop)))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    try:
        assert place.disturbed(stop).longest_s < SOON_S
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_everybody_stands_still_for_a_while(place: Place) -> None:
    before = place.lost()

    def stop(hop: str) -> None:
        everybody = [pid for name in "abc" for pid in processes(place.node(name))]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(8.0)
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)

    asked = place.disturbed(stop)
    assert 8.0 <= asked.longest_s < 8.0 + SOON_S
    assert place.lost() == before
