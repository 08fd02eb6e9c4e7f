"""Metrics of a node under test: asked for over a socket, and read as Prometheus' own client reads them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

#: Deadlines are generous: the machine may be busy.
WAIT_S = 60.0


def ask(where: Path | int, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") -> bytes:
    """What comes back for a request, at a Unix socket or a port of 127.0.0.1, up to the end."""
    family, address = (
        (socket.AF_UNIX, str(where)) if isinstance(where, Path) else (socket.AF_INET, ("127.0.0.1", where))
    )
    with socket.socket(family) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(address)
        sock.sendall(request)
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    return answer


def page(where: Path | int) -> str:
    """The page of metrics."""
    head, _, body = ask(where).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n"), head
    return body.decode()


class Scrape:
    """One page, parsed."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """One sample's."""
        return self._samples[name, frozenset(labels.items())]

    def labels(self, name: str) -> set[str]:
        """Names of labels of a metric's samples."""
        return {
            label
            for (sample, labels) in self._samples
            for label, _ in labels
            if sample.startswith(name) and label != "le"
        }


def scrape_until(where: Path | int, good: Callable[[Scrape], bool]) -> Scrape:
    """The first scrape that is as wanted: what workers count comes a little later."""
    deadline = time.monotonic() + WAIT_S
    while True:
        scrape = Scrape(page(where))
        if good(scrape):
            return scrape
        assert time.monotonic() < deadline, "never as wanted"
        time.sleep(0.1)
