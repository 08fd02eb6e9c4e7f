"""Conversations that never stop, from one node, while others are restarted or reconfigured: what failed, and
what was wrong."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from cluster import Cluster, Row, TestNode

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError

#: Three nodes of which any two have the whole model of 6 blocks.
TWO_OF_THREE = [
    Row("a", "embed,0-3"),
    Row("b", "embed,0-1,4-5,head"),
    Row("c", "2-5,head"),
]
TURNS = ("hello there", " and then", " what else")


@dataclass
class Load:
    """`sessions` conversations at `origin` side by side, each again and again under a new name.

    A context manager. The first time is undisturbed, before `__enter__` returns: all later answers must be
    the same.
    """

    origin: TestNode
    sessions: int = 4
    max_tokens: int = 60
    done: int = 0  #: requests that were answered
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_s: float = 0.0  #: between two tokens, or from the request to the first

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self.right = [self._talk(number, "first") for number in range(self.sessions)]
        assert not self.errors, self.errors
        self.longest_s = 0.0
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(self.sessions)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, requests: int = 8, timeout: float = 180.0) -> None:
        """Waits until so many further requests were answered."""
        goal, deadline = self.done + requests, time.monotonic() + timeout
        while self.done < goal and not self.errors:
            assert time.monotonic() < deadline, "the answers do not go on"
            time.sleep(0.05)

    def _run(self, number: int) -> None:
        for repeat in itertools.count():
            if self._stop.is_set():
                return
            found = self._talk(number, str(repeat))
            if found and found != self.right[number]:
                self.wrong.append(f"session {number}, repeat {repeat}: {found}, not {self.right[number]}")

    def _talk(self, number: int, repeat: str) -> list[list[int]]:
        """One conversation; its answers, none where one failed."""
        session, answers = f"{number}-{repeat}", list[list[int]]()
        sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
        with ControlClient(self.origin.socket) as client:
            try:
                for turn in TURNS:
                    params = api.GenerateParams(
                        prompt=f"{number}{turn}",
                        raw=True,
                        session=session,
                        max_tokens=self.max_tokens,
                        **sampling,  # type: ignore[arg-type]
                    )
                    answers.append(self._answer(client, params))
                    self.done += 1
                client.call("cache.clear", api.CacheClearParams(session=session))
            except DgnError as error:
                self.errors.append(f"{time.strftime('%X')} {error.kind}: {error.message}")
                return []
        return answers

    def _answer(self, client: ControlClient, params: api.GenerateParams) -> list[int]:
        last = time.monotonic()

        def delta(_: api.GenerateDelta) -> None:
            nonlocal last
            now = time.monotonic()
            self.longest_s, last = max(self.longest_s, now - last), now

        return client.generate(params, delta).token_ids


def serving(node: TestNode) -> set[str]:
    """The names of nodes whose blocks it can use now."""
    with ControlClient(node.socket) as client:
        return {row.name for row in client.call("map.show").rows if row.state == "ready"}


def restart(cluster: Cluster, origin: TestNode, name: str) -> None:
    """Stops a node with SIGTERM, starts it again, and waits until `origin` can use it."""
    node = cluster.nodes[name]
    code = node.terminate(60.0)
    assert code == 0, f"{name} ended with {code}:\n{node.log}"
    node.start()
    node.wait_ready()
    origin.wait_for(lambda: name in serving(origin), what=f"offer of {name}")
