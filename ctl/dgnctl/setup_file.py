"""A configuration from what was answered to a few questions. Pure; what keys mean, dgnd knows."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEMO_MODEL = "dgn-demo"
DEMO_BLOCKS = 8
PORT = 4001
HTTP_ADDRESS = "127.0.0.1:11435"
MAX_NAME = 64
_HOST = re.compile(r"(?=.{1,253}$)[\w-]+(\.[\w-]+)*\.?")
_MULTIADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/\d{1,5}(/p2p/[1-9A-HJ-NP-Za-km-z]+)?")
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """Another PC: `span` is what it serves; empty where it says that itself."""

    name: str
    id: str
    address: str
    span: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What was answered. `model_dir` None: the model that comes with dgn."""

    name: str
    state_dir: Path
    model: str
    model_dir: Path | None
    quant: str
    span: str
    peers: Sequence[PeerAnswer]
    http: bool


def table_name(text: str) -> str:
    """A name for a table of the configuration, made of a directory's or a PC's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-").lower() or "model"


def is_peer_id(text: str) -> bool:
    """Whether it looks like what `dgnd init` prints."""
    return _PEER_ID.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether a PC may be called so."""
    return 0 < len(text) <= MAX_NAME and text.isprintable() and not re.search(r"[\s/]", text)


def is_host(text: str) -> bool:
    """Whether a PC may be reached there: an IP address, a name, or the begin of a multiaddress."""
    if text.startswith("/"):
        return _MULTIADDRESS.fullmatch(text) is not None
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None and not text.rpartition(".")[2].isdigit()
    return True


def span_problem(span: str, n_blocks: int) -> str:
    """What is wrong with a comma list of blocks of a model that has so many; empty: nothing."""
    for part in span.split(","):
        if part in ("embed", "head"):
            continue
        found = _RANGE.fullmatch(part)
        if found is None:
            return f"{part!r} is no block; write a list such as embed,0-{n_blocks - 1},head, or auto, or none"
        first, last = int(found[1]), int(found[2] or found[1])
        if last >= n_blocks or first > last:
            return f"{part}: the blocks are 0 to {n_blocks - 1}"
    return ""


def multiaddress(host: str) -> str:
    """Where a PC is reached, from its IP address or name; a multiaddress stays as it is."""
    if host.startswith("/"):
        return host
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return f"/dns4/{host}/tcp/{PORT}"
    return f"/ip{version}/{host}/tcp/{PORT}"


def everything(n_blocks: int) -> str:
    """The span of a whole model."""
    return f"embed,0-{n_blocks - 1},head"


def configuration(answers: Answers) -> str:
    """The file's text."""
    lines = [
        "# Written by 'dgnctl setup'. docs/config.md explains every key, dgn.toml.example shows them;",
        "# 'dgnd check --config FILE' says what a changed file means, 'dgnctl reload' has dgnd take it.",
        "",
        "[node]",
        f"name = {_text(answers.name)}",
        f"state_dir = {_text(str(answers.state_dir))}",
        f'listen = ["/ip4/{"0.0.0.0" if answers.peers else "127.0.0.1"}/tcp/{PORT}"]',
        "",
        f"[models.{answers.model}]",
    ]
    if answers.model_dir is not None:
        lines.append(f"path = {_text(str(answers.model_dir))}")
    lines.append(f"quant = {_text(answers.quant)}")
    for peer in answers.peers:
        lines += ["", f"[peers.{peer.name}]", f"id = {_text(peer.id)}"]
        lines += [f"addrs = [{_text(multiaddress(peer.address))}]"] if peer.address else []
    rows = [("self", answers.span), *((peer.name, peer.span) for peer in answers.peers if peer.span)]
    for peer_name, span in rows:
        if span:
            lines += ["", "[[blocks]]", f"model = {_text(answers.model)}", f"peer = {_text(peer_name)}"]
            lines.append(f"span = {_text(span)}")
    if answers.http:
        lines += ["", "[http]", f"listen = {_text(HTTP_ADDRESS)}"]
    return "\n".join(lines) + "\n"


def introduction(name: str, peer_id: str) -> str:
    """What the other PCs' files need to know of this one."""
    return (
        f'[peers.{table_name(name)}]\nid = {_text(peer_id)}\naddrs = ["/ip4/ADDRESS-OF-THIS-PC/tcp/{PORT}"]\n'
    )


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
