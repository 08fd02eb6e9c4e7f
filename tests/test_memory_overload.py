"""A node in a control group, asked for more than it can hold, all the time: it is never killed for lack of
memory, finishes what it admitted with the right tokens, and refuses the rest with the numbers.

Some seconds of it run with every suite, minutes with `make test-memory`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from cluster import Cluster, Row, TestNode
from large_llama import make_large_llama
from memory_groups import Group, memory_group
from tiny_llama import TinyLlama

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError, LimitError, NoRoomNow

MIB = 1 << 20
LIMIT = 230 * MIB
LASTS_S = 300.0 if os.environ.get("DGN_TEST_MEMORY") else 20.0
CLIENTS = 12
#: KV of a position takes 32 KiB, so that a few answers are more than the group holds.
MODEL = TinyLlama(
    hidden_size=256,
    intermediate_size=256,
    n_blocks=16,
    n_heads=4,
    n_kv_heads=4,
    dtype="bf16",
    max_positions=2048,
)
#: Prompts of several lengths, the longest of which needs a third of the room.
PROMPTS = [
    [5 + (7 * number + position) % 250 for position in range(40 + 120 * number)] for number in range(4)
]
TOKENS = 24


@dataclass
class Seen:
    """What came of the requests of all clients."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: list[DgnError] = field(default_factory=list)
    other: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestNode, Group]]:
    directory = tmp_path_factory.mktemp("overload")
    model = make_large_llama(directory / "model", MODEL)
    with memory_group("overload", LIMIT) as group, Cluster(directory, model) as cluster:
        cluster.add("a").before = group.before
        limits = "[limits]\nwaiting = 6\nwait_s = 90"
        cluster.configure("a", [Row("a", f"embed,0-{MODEL.n_blocks - 1},head")], more=limits)
        cluster.start()
        yield cluster.nodes["a"], group


def ask(node: TestNode, number: int, session: str | None = None) -> list[int]:
    with ControlClient(node.socket) as client:
        params = api.GenerateParams(token_ids=PROMPTS[number], max_tokens=TOKENS, session=session)
        return client.generate(params, lambda _: None).token_ids


def test_more_than_it_holds(capped: tuple[TestNode, Group]) -> None:
    node, group = capped
    wanted = [ask(node, number) for number in range(len(PROMPTS))]
    pids = [node.process.pid if node.process else 0, *node.worker_pids()]
    seen, until = Seen(), time.monotonic() + LASTS_S

    def client(name: int) -> None:
        turn = name
        while time.monotonic() < until:
            turn += 1
            number = turn % len(PROMPTS)
            kept = f"kept-{name}" if name % 3 == 0 else None  # its KV stays, and has to give way
            try:
                found = ask(node, number, kept)
            except LimitError as error:
                with seen.lock:
                    seen.refused.append(error)
                time.sleep(0.2)
            except Exception as error:  # noqa: BLE001 - told below
                with seen.lock:
                    seen.other.append(error)
            else:
                with seen.lock:
                    seen.right += found == wanted[number]
                    seen.wrong += (
                        [] if found == wanted[number] else [f"{number}: {found}, not {wanted[number]}"]
                    )

    threads = [threading.Thread(target=client, args=(name,)) for name in range(CLIENTS)]
    for thread in threads:
        thread.start()
    waiting: set[str] = set()
    most = 0
    while any(thread.is_alive() for thread in threads):
        status = node.status()
        waiting |= {each.waiting.why for each in status.sessions if each.waiting is not None}
        most = max(most, status.memory.used)
        assert status.memory.used <= status.memory.budget
        time.sleep(0.2)
    found = f"{seen.right} answers, {len(seen.refused)} refused, most used {most:,} of {LIMIT:,}"
    print(f"{found}; {sorted(waiting)}")
    assert seen.wrong == []
    assert [repr(error) for error in seen.other] == []
    assert seen.right >= 3  # of some ten on two busy cores
    assert group.oom_kills == 0
    assert pids == [node.process.pid if node.process else 0, *node.worker_pids()]
    assert any(re.fullmatch(r"waiting for memory: \d ahead", why) for why in waiting)
    for error in seen.refused:
        assert isinstance(error, NoRoomNow)
        assert re.search(
            r"positions need [\d,]+ bytes of KV cache; of the [\d,]+ bytes .* [\d,]+ are free", error.message
        )
