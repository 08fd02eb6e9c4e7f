"""Real daemons with the HTTP API for tests, and official clients of theirs that wait long and never retry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from cluster import Cluster, Row, TestNode, free_port

DEMO = "dgn-demo"
#: Of clients: the machine may be busy.
WAIT_S = 120.0


@dataclass(frozen=True)
class HttpNode:
    """A daemon and where its HTTP API is."""

    node: TestNode
    url: str

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client, as anybody would make it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S, **options)

    def plain(self, **options: Any) -> httpx.Client:
        """HTTP without a client library's help."""
        return httpx.Client(base_url=self.url, timeout=WAIT_S, verify=False, **options)

    def address(self) -> tuple[str, int]:
        """Its host and port."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def sessions(self) -> int:
        """Sessions that the daemon has, and their hops here."""
        status = self.node.status()
        return len(status.sessions) + status.hops


@contextmanager
def http_node(
    directory: Path,
    models: Mapping[str, Mapping[str, Any]],
    spans: Mapping[str, str],
    more: str = "",
    sessions: str = "",
    env: Mapping[str, str] | None = None,
) -> Iterator[HttpNode]:
    """One daemon that serves `spans` of `models`. `more`: further keys of [http]. No session outlives its
    request, unless `more` says so."""
    if "conversations" not in more:
        more += "\nconversations = 0"
    with Cluster(directory, None) as cluster:
        node = cluster.add("a")
        node.extra_env.update(env or {})
        port = free_port()
        tables = f'[http]\nlisten = "127.0.0.1:{port}"\n{more}\n{sessions}'
        cluster.configure(
            "a", [Row("a", span, model) for model, span in spans.items()], models=models, more=tables
        )
        cluster.start()
        yield HttpNode(node, f"http://127.0.0.1:{port}")
