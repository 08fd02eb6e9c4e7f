"""How much later the first byte of an answer comes over HTTP than over the control socket.

    python benchmarks/http_first_byte.py [--runs N] [--quick] [--json]

One daemon with the demo model, one short prompt, both sides in turns on connections that stay open. The time
is from before the request is written until the first piece of text is read: over the socket the first
notification with text, over HTTP the first event with content. The client speaks HTTP/1.1 on a bare
socket, so that no client library's time counts.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from bench_kit import conditions, report
from http_kit import DEMO, HttpNode, http_node

from dgnd.control.api import GenerateParams, GenerateResult
from dgnd.control.client import ControlClient

GOAL_MS = 5.0
PROMPT = "What is dgn?"
_TOKENS = 4
_TIMEOUT_S = 60.0


class PlainHttp:
    """One connection that stays open."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        assert where.hostname is not None
        self._host = where.netloc
        self._sock = socket.create_connection((where.hostname, where.port or 80), _TIMEOUT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def first_text_s(self) -> float:
        """Seconds until the first piece of text of one streamed answer; the rest is read, too."""
        messages = [{"role": "user", "content": PROMPT}]
        asked = {"model": DEMO, "messages": messages, "max_tokens": _TOKENS, "stream": True}
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        began = time.perf_counter()
        self._sock.sendall(head.encode() + body)
        came, first_s = b"", 0.0
        while not came.endswith(b"0\r\n\r\n"):
            piece = self._sock.recv(1 << 16)
            if not piece:
                raise SystemExit(f"the HTTP API closed the connection: {came.decode(errors='replace')}")
            came += piece
            if not first_s and _text_in(came):
                first_s = time.perf_counter() - began
        if not first_s:
            raise SystemExit(f"no text came over HTTP: {came.decode(errors='replace')}")
        return first_s

    def close(self) -> None:
        """Ends it."""
        self._sock.close()


def _text_in(came: bytes) -> bool:
    """Whether an event with text is there as a whole."""
    events = [line[6:] for line in came.split(b"\n")[:-1] if line.startswith(b"data: {")]
    return any(choice["delta"].get("content") for event in events for choice in json.loads(event)["choices"])


def over_socket_s(client: ControlClient) -> float:
    """The same over the control socket."""
    params = GenerateParams(model=DEMO, prompt=PROMPT, max_tokens=_TOKENS)
    first_s = 0.0
    began = time.perf_counter()
    stream, ended = client.start_generate(params), False
    while not ended:
        for item in stream.wait():
            ended = isinstance(item, GenerateResult)
            if not first_s and not ended and item.text:
                first_s = time.perf_counter() - began
    if not first_s:
        raise SystemExit("no text came over the control socket")
    return first_s


def measure(node: HttpNode, runs: int) -> tuple[list[float], list[float]]:
    """The control socket and HTTP, in turns."""
    ours, theirs = [], []
    http = PlainHttp(node.url)
    with ControlClient(node.node.socket) as client:
        over_socket_s(client), http.first_text_s()
        for _ in range(runs):
            ours.append(over_socket_s(client))
            theirs.append(http.first_text_s())
    http.close()
    return ours, theirs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="5 runs of each: only to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = conditions.conditions()
    models = {DEMO: {"backend": "onnx"}}
    with (
        tempfile.TemporaryDirectory(prefix="dgn-bench-") as directory,
        http_node(Path(directory), models, {DEMO: "embed,0-7,head"}) as node,
    ):
        ours, theirs = measure(node, 5 if options.quick else options.runs)
    later = [b - a for a, b in zip(ours, theirs, strict=True)]
    samples = {"socket": ours, "http": theirs, "later": later}
    figures = {
        f"{name}_{end}_ms": 1000 * report.quantile(values, q)
        for name, values in samples.items()
        for end, q in (("p50", 0.5), ("p90", 0.9))
    }
    words = {
        "socket": "over the control socket",
        "http": "over HTTP",
        "later": "HTTP over the socket, of each turn",
    }
    rows = [
        [
            words[name],
            *(f"{figures[f'{name}_{end}_ms']:.1f} ms" for end in ("p50", "p90")),
            f"{GOAL_MS:.0f} ms" if name == "later" else "",
        ]
        for name in samples
    ]
    lines = [report.table([f"first text, of {len(ours)}", "p50", "p90", "goal"], rows)]
    report.show(options.json, where, figures, lines)


if __name__ == "__main__":
    main()
