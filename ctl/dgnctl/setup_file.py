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
