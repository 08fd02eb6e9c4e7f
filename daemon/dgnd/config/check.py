"""What the values of a configuration must be, beyond their types: addresses, ids, words, ranges,
references.

What needs a model's number of blocks is checked by `dgnd.models.blocksmap`. Knows nothing of files or of
positions in them: a finding names its key.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Collection
from typing import get_args

from dgn_backends.api import Quant
from dgn_backends.span import SpanSyntaxError, parse_units
from dgnd.config.amount import AmountError, parse_amount
from dgnd.config.build import KeyProblem, did_you_mean
from dgnd.config.http_address import HttpAddressError, parse_http_address
from dgnd.config.locate import KeyPath
from dgnd.config.metrics_address import MetricsAddressError, parse_metrics_address
from dgnd.config.multiaddr import MultiaddrError, TcpAddress, parse_multiaddr
from dgnd.config.schema import (
    AUTO,
    LOG_FORMATS,
    BlocksRow,
    Config,
    ModelSection,
    PeerSection,
)
from dgnd.control.api import LOG_LEVELS
from dgnd.errors import BadRequest, ConfigError
from dgnd.identity import public_key_of
from dgnd.text import templates
from dgnd.wire.messages import WIRES

#: The name of this node in [[blocks]].
SELF = "self"

DTYPES = ("auto", "f32", "bf16", "f16")
QUANTS: tuple[str, ...] = get_args(Quant)
#: A node that takes longer to leave than this is not leaving.
MOST_DRAIN_S = 3600.0
#: More than any node can hold in memory.
MOST_SESSIONS = 10_000
MOST_HTTP_REQUESTS = 10_000
MOST_HTTP_CONVERSATIONS = 512
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f/]{1,64}")
#: More blocks than any model has, for reading a span before the model is known.
_MANY_BLOCKS = 10**6
#: What fits in sockaddr_un with its closing NUL.
_SOCKET_PATH_BYTES = 107


def check_values(config: Config, backends: Collection[str]) -> None:
    """Raises KeyProblem at the first value that can't be meant. `backends` are the installed names."""
    _check_node(config)
    _check_http(config)
    _check_metrics(config)
    _check_log(config)
    _check_limits(config)
    for name, model in config.models.items():
        _check_name(name, ("models", name))
        _check_model(model, ("models", name), backends)
    first_with_id: dict[str, str] = {}
    for name, peer in config.peers.items():
        _check_name(name, ("peers", name))
        _check_peer(name, peer, ("peers", name))
        if peer.id in first_with_id:
            raise KeyProblem(
                ("peers", name, "id"), f'peers.{first_with_id[peer.id]} has the same id "{peer.id}"'
            )
        first_with_id[peer.id] = name
    for index, row in enumerate(config.blocks):
        _check_row(row, ("blocks", index), config)
        earlier = [
            other for other in config.blocks[:index] if other.model == row.model and other.peer == SELF
        ]
        if row.peer == SELF and any(AUTO in (row.span, other.span) for other in earlier):
            raise KeyProblem(
                ("blocks", index, "span"),
                f'this node has a row for "{row.model}" already; span = "{AUTO}" chooses all that it has of '
                "a model, and stands alone",
            )


def _check_node(config: Config) -> None:
    node = config.node
    if node.name:
        _check_name(node.name, ("node", "name"))
    socket = config.control.socket
    if socket is not None and len(os.fsencode(socket)) > _SOCKET_PATH_BYTES:
        raise KeyProblem(("control", "socket"), f"a socket's path has at most {_SOCKET_PATH_BYTES} bytes")
    before: list[tuple[str, TcpAddress]] = []
    for index, text in enumerate(node.listen):
        at: KeyPath = ("node", "listen", index)
        address = _address(text, at)
        if address.kind not in ("ip4", "ip6"):
            raise KeyProblem(at, f'"{text}" is no address to listen on; /ip4/0.0.0.0/tcp/4001 listens on all')
        if address.peer_id is not None:
            raise KeyProblem(at, f'"{text}": an address to listen on ends after the port')
        for other, earlier in before:
            if _is_the_same(earlier, address):
                raise KeyProblem(at, f'"{text}" is listened on already, by "{other}"; leave one of them out')
        before.append((text, address))
    if not 0 <= node.drain_s <= MOST_DRAIN_S:
        raise KeyProblem(("node", "drain_s"), f"node.drain_s must be from 0 to {MOST_DRAIN_S:.0f} seconds")
    if not (config.sessions.idle_s > 0 and math.isfinite(config.sessions.idle_s)):
        raise KeyProblem(("sessions", "idle_s"), "sessions.idle_s must be a number of seconds above 0")
    if not (config.sessions.recover_s >= 0 and math.isfinite(config.sessions.recover_s)):
        raise KeyProblem(("sessions", "recover_s"), "sessions.recover_s must be 0 seconds or more")
    if config.sessions.journal_bytes < 0:
        raise KeyProblem(("sessions", "journal_bytes"), "sessions.journal_bytes must be 0 or more")
    if not 1 <= config.sessions.max_sessions <= MOST_SESSIONS:
        message = f"sessions.max_sessions must be from 1 to {MOST_SESSIONS}"
        raise KeyProblem(("sessions", "max_sessions"), message)


def _check_limits(config: Config) -> None:
    limits = config.limits
    try:
        parse_amount(limits.memory)
    except AmountError as error:
        raise KeyProblem(("limits", "memory"), str(error)) from None
    if not 0 <= limits.waiting <= MOST_SESSIONS:
        raise KeyProblem(("limits", "waiting"), f"limits.waiting must be from 0 to {MOST_SESSIONS}")
    if not (limits.wait_s >= 0 and math.isfinite(limits.wait_s)):
        raise KeyProblem(("limits", "wait_s"), "limits.wait_s must be 0 seconds or more")


def _check_http(config: Config) -> None:
    http = config.http
    if not 1 <= http.max_requests <= MOST_HTTP_REQUESTS:
        message = f"http.max_requests must be from 1 to {MOST_HTTP_REQUESTS}"
        raise KeyProblem(("http", "max_requests"), message)
    if not 0 <= http.conversations <= MOST_HTTP_CONVERSATIONS:
        message = f"http.conversations must be from 0 to {MOST_HTTP_CONVERSATIONS}"
        raise KeyProblem(("http", "conversations"), message)
    if not http.listen:
        return
    try:
        address = parse_http_address(http.listen)
    except HttpAddressError as error:
        raise KeyProblem(("http", "listen"), str(error)) from None
    if not address.is_loopback and http.keys_file is None:
        raise KeyProblem(
            ("http", "listen"),
            f'"{http.listen}" can be reached from other machines: name a keys_file with API keys, or listen '
            f"on 127.0.0.1:{address.port}",
        )


def _check_metrics(config: Config) -> None:
    if config.metrics.listen:
        try:
            parse_metrics_address(config.metrics.listen)
        except MetricsAddressError as error:
            raise KeyProblem(("metrics", "listen"), str(error)) from None


def _check_log(config: Config) -> None:
    for key, known in (("level", LOG_LEVELS), ("format", LOG_FORMATS)):
        if (value := getattr(config.log, key)) not in known:
            raise KeyProblem(("log", key), f'"{value}" is no {key} of logs; one of {", ".join(known)}')


def _is_the_same(one: TcpAddress, other: TcpAddress) -> bool:
    """Whether only one of two addresses to listen on can be had. Port 0 is another one each time."""
    if one.port == 0 or (one.kind, one.port) != (other.kind, other.port):
        return False
    hosts = [ipaddress.ip_address(address.host) for address in (one, other)]
    return hosts[0] == hosts[1] or any(host.is_unspecified for host in hosts)


def _check_model(model: ModelSection, at: KeyPath, backends: Collection[str]) -> None:
    if model.backend != "auto" and model.backend not in backends:
        hint = did_you_mean(model.backend, {"auto", *backends})
        raise KeyProblem((*at, "backend"), f'no backend "{model.backend}" is installed{hint}')
    if not _DEVICE.fullmatch(model.device):
        raise KeyProblem((*at, "device"), f'"{model.device}" is no device; one of auto, cpu, cuda, cuda:1')
    if model.dtype not in DTYPES:
        raise KeyProblem((*at, "dtype"), f'"{model.dtype}" is no dtype; one of {", ".join(DTYPES)}')
    if model.quant not in QUANTS:
        raise KeyProblem((*at, "quant"), f'"{model.quant}" is no quantisation; one of {", ".join(QUANTS)}')
    if model.wire not in WIRES:
        raise KeyProblem((*at, "wire"), f'"{model.wire}" is no encoding; one of {", ".join(WIRES)}')
    try:
        templates.check_name(model.chat_template)
    except ConfigError as error:
        raise KeyProblem((*at, "chat_template"), error.message) from None
    if model.kv_bytes is not None and model.kv_bytes < 1:
        raise KeyProblem((*at, "kv_bytes"), "kv_bytes must be at least 1; without it the budget is automatic")
    if model.threads is not None and not 1 <= model.threads <= 4096:
        raise KeyProblem((*at, "threads"), "threads must be from 1 to 4096")


def _check_peer(name: str, peer: PeerSection, at: KeyPath) -> None:
    if name == SELF:
        raise KeyProblem(at, 'no peer may be named "self", which in [[blocks]] means this node')
    try:
        public_key_of(peer.id)
    except BadRequest as error:
        raise KeyProblem((*at, "id"), f"{error}; `dgnd init` prints it on that machine") from None
    for index, text in enumerate(peer.addrs):
        address = _address(text, (*at, "addrs", index))
        if address.port == 0:
            raise KeyProblem((*at, "addrs", index), f'"{text}" has port 0, which nobody can dial')
        if address.peer_id not in (None, peer.id):
            message = f'"{text}" ends in another peer id than peers.{name}.id'
            raise KeyProblem((*at, "addrs", index), message)


def _check_row(row: BlocksRow, at: KeyPath, config: Config) -> None:
    if row.model not in config.models:
        hint = did_you_mean(row.model, config.models)
        raise KeyProblem((*at, "model"), f"there is no [models.{row.model}]{hint}")
    if row.peer != SELF and row.peer not in config.peers:
        hint = did_you_mean(row.peer, {SELF, *config.peers})
        raise KeyProblem((*at, "peer"), f"there is no [peers.{row.peer}]{hint}")
    if row.span == AUTO and row.peer != SELF:
        raise KeyProblem(
            (*at, "span"),
            f'span = "{AUTO}" is for this node\'s own rows; a peer that chooses needs none: its offer counts',
        )
    if row.max_bytes is not None and row.span != AUTO:
        raise KeyProblem((*at, "max_bytes"), f'max_bytes goes with span = "{AUTO}" alone')
    if row.max_bytes is not None and row.max_bytes < 1:
        raise KeyProblem((*at, "max_bytes"), "max_bytes must be at least 1")
    if row.span == AUTO:
        return
    try:
        parse_units(row.span, _MANY_BLOCKS)
    except SpanSyntaxError as error:
        raise KeyProblem((*at, "span"), str(error)) from None


def _check_name(name: str, at: KeyPath) -> None:
    if not _NAME.fullmatch(name):
        raise KeyProblem(at, f"{name!r} is no name: 1 to 64 characters without blanks and slashes")


def _address(text: str, at: KeyPath) -> TcpAddress:
    try:
        return parse_multiaddr(text)
    except MultiaddrError as error:
        raise KeyProblem(at, str(error)) from None
