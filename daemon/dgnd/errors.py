"""Every error that dgnd, dgnctl and peers may see, with its kind, JSON-RPC code, exit code and retry advice.

    DgnError (dgn_backends.errors)
    ├── ModelError, BackendError, LimitError and theirs      see there
    ├── ConfigError           the configuration; message begins with file:line:column
    ├── BadRequest            what the caller sent can't be done as it stands
    │   ├── ContextExceeded   a prompt longer than the context
    │   └── NotFound          no such model, session, peer
    ├── NotReady              may succeed later: loading, connecting
    │   ├── BlocksMissing     nobody serves some blocks; data["missing"]
    │   └── Draining          a node, or some of its blocks, are about to leave
    ├── Cancelled             by the caller or by shutdown
    │   └── ShuttingDown
    ├── WorkerDied            a worker process ended during the request
    │   └── StepCrashesBackend  more than once over the same step
    ├── PeerError             the other side's fault or the link's
    │   ├── PeerGone          the connection ended or timed out
    │   ├── PeerSilent        it answers pings, and nothing else
    │   ├── PeerRefused       it closed the connection: it does not list this node
    │   ├── ProtocolError     bytes or messages against the protocol
    │   │   └── UnknownMessage  a kind of message not known here; the connection goes on
    │   ├── TicketRefused     no valid ticket, or not allowed
    │   ├── IdentityMismatch  another peer id than expected
    │   └── ManifestMismatch  same model name, other weights
    ├── StaleState            a hop's KV is not what the sender believes: PositionGap, StalePrefix, NotYet,
    │                         JournalGone
    ├── ListenFailed          an address can't be listened on
    ├── RpcError              JSON-RPC itself: ParseError, InvalidRequest, MethodNotFound, InternalError
    └── Client side: NoDaemon, StaleSocket, DaemonSilent, SocketDenied, AlreadyRunning

Knows nothing of transports; `to_wire`-like conversions live with each transport.
"""

from __future__ import annotations

from dgn_backends.errors import (
    BackendError,
    BackendUnavailable,
    DataValue,
    DgnError,
    LimitError,
    ModelError,
    NonFiniteOutput,
    NoRoomNow,
)


class ConfigError(DgnError):
    """The configuration can't be used; the message begins with file:line:column."""

    kind = "config"
    code = -32001
    exit_code = 2


class BadRequest(DgnError):
    """What was asked can't be done as it stands."""

    kind = "bad_request"
    code = -32602
    exit_code = 2


class ContextExceeded(BadRequest):
    """The prompt is longer than the model's context; nothing was computed."""

    kind = "context_exceeded"
    code = -32013


class NotFound(BadRequest):
    """There is no such model, session or peer."""

    kind = "not_found"
    code = -32014


class NotReady(DgnError):
    """Not now, maybe later: something is loading, connecting or restarting."""

    kind = "not_ready"
    code = -32020
    exit_code = 5
    retryable = True


class BlocksMissing(NotReady):
    """Nobody that can be reached serves some blocks; data["missing"] names them."""

    kind = "blocks_missing"
    code = -32021


class Draining(NotReady):
    """The node, or the blocks asked for, are about to leave: nothing new begins there; others may serve."""

    kind = "draining"
    code = -32026


class Cancelled(DgnError):
    """The request was cancelled."""

    kind = "cancelled"
    code = -32022
    exit_code = 130


class ShuttingDown(Cancelled):
    """The daemon is stopping."""

    kind = "shutting_down"
    code = -32023
    exit_code = 5
    retryable = True


class WorkerDied(DgnError):
    """A worker process ended during the request; it is restarted."""

    kind = "worker_died"
    code = -32024
    exit_code = 7
    retryable = True


class StepCrashesBackend(WorkerDied):
    """Workers died more than once over the same step of a session; it is not sent to a third."""

    kind = "step_crashes_backend"
    code = -32025
    retryable = False


class WorkerSilent(WorkerDied):
    """A worker process neither answers nor computes: it is stopped, or hangs."""

    kind = "worker_silent"
    code = -32027


class Inexact(DgnError):
    """The answer was to be exact, and can't be on these nodes."""

    kind = "inexact"
    code = -32028
    exit_code = 5


class PeerError(DgnError):
    """A peer, or the link to it, failed."""

    kind = "peer"
    code = -32030
    exit_code = 7
    retryable = True


class PeerGone(PeerError):
    """The connection to a peer ended or timed out."""

    kind = "peer_gone"
    code = -32031


class PeerSilent(PeerError):
    """The peer's connection lives, but it does not answer what it is asked for a session."""

    kind = "peer_silent"
    code = -32039


class PeerRefused(PeerError):
    """The peer closed the connection at once: it probably does not list this node."""

    kind = "peer_refused"
    code = -32032
    retryable = False


class ProtocolError(PeerError):
    """Bytes or messages against the peer protocol."""

    kind = "protocol"
    code = -32033
    retryable = False


class UnknownMessage(ProtocolError):
    """A message of a kind that this software does not know; data["tag"] names it. The connection goes on."""

    kind = "unknown_message"
    code = -32038


class TicketRefused(PeerError):
    """A hop was asked for without a valid ticket, or by an origin that is not allowed."""

    kind = "ticket_refused"
    code = -32034
    retryable = False


class IdentityMismatch(PeerError):
    """Another peer id answered than the one expected."""

    kind = "identity_mismatch"
    code = -32035
    retryable = False


class ManifestMismatch(PeerError):
    """Two nodes hold different weights, configuration or tokenizer under one model name."""

    kind = "manifest_mismatch"
    code = -32036
    retryable = False


class ListenFailed(DgnError):
    """An address can't be listened on: the message names it and what holds it."""

    kind = "listen_failed"
    code = -32037
    exit_code = 2


class StaleState(DgnError):
    """A hop's KV is not what the sender believes."""

    kind = "stale_state"
    code = -32040
    retryable = True


class PositionGap(StaleState):
    """A frame starts beyond what the hop has; data["expected"] is where to start."""

    kind = "position_gap"
    code = -32041


class StalePrefix(StaleState):
    """The token ids before the frame are not those that the hop's KV was computed from."""

    kind = "stale_prefix"
    code = -32042


class JournalGone(StaleState):
    """A hop no longer has the results that it was asked to send again; data["begins"] is where they begin."""

    kind = "journal_gone"
    code = -32044


class NotYet(StaleState):
    """A frame of a route or branch that the hop has not been told of."""

    kind = "not_yet"
    code = -32043


class RpcError(DgnError):
    """The JSON-RPC conversation itself went wrong."""

    kind = "rpc"
    code = -32002


class ParseError(RpcError):
    """A line on the control socket that is not JSON, or is too long."""

    kind = "parse_error"
    code = -32700


class InvalidRequest(RpcError):
    """JSON on the control socket that is not one JSON-RPC 2.0 request."""

    kind = "invalid_request"
    code = -32600


class MethodNotFound(RpcError):
    """The daemon has no such method: dgnctl and dgnd may be of different versions."""

    kind = "method_not_found"
    code = -32601


class InternalError(RpcError):
    """A fault in the daemon while it carried out a request; its log has the details."""

    kind = "internal_error"
    code = -32603


class NoDaemon(DgnError):
    """No daemon: there is no socket at any of the places searched."""

    kind = "no_daemon"
    code = -32050
    exit_code = 3
    retryable = True


class StaleSocket(NoDaemon):
    """There is a socket, but nothing listens: the daemon died."""

    kind = "stale_socket"
    code = -32051


class DaemonSilent(NoDaemon):
    """The daemon is there, but gives no sign of life: it is stopped or hangs."""

    kind = "daemon_silent"
    code = -32054


class SocketDenied(DgnError):
    """The socket may not be used by this user."""

    kind = "permission_denied"
    code = -32052
    exit_code = 4


class AlreadyRunning(DgnError):
    """Another daemon holds the socket or the state directory."""

    kind = "already_running"
    code = -32053
    exit_code = 1


def all_errors() -> dict[str, type[DgnError]]:
    """Every error class by its kind."""
    found: dict[str, type[DgnError]] = {}
    todo: list[type[DgnError]] = [DgnError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.kind, cls)  # a subclass may share its parent's kind
        todo.extend(cls.__subclasses__())
    return found


def one_line(text: str) -> str:
    """`text` without what a terminal or a log would obey: line breaks and other control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def error_from(kind: str, message: str, data: dict[str, DataValue]) -> DgnError:
    """The error that another process named; an unknown kind becomes a plain DgnError."""
    return all_errors().get(kind, DgnError)(one_line(message), **data)


__all__ = [
    "AlreadyRunning", "BackendError", "BackendUnavailable", "BadRequest", "BlocksMissing", "Cancelled",
    "ConfigError", "ContextExceeded", "DaemonSilent", "DataValue", "DgnError", "Draining", "IdentityMismatch",
    "InternalError", "InvalidRequest", "LimitError", "ListenFailed", "ManifestMismatch", "MethodNotFound",
    "ModelError", "NoDaemon", "NoRoomNow", "NonFiniteOutput", "NotFound", "NotReady", "NotYet",
    "ParseError", "PeerError", "PeerGone", "PeerRefused", "PeerSilent", "PositionGap", "ProtocolError",
    "RpcError", "ShuttingDown", "SocketDenied", "StalePrefix", "StaleSocket", "StaleState", "TicketRefused",
    "UnknownMessage", "WorkerDied", "all_errors", "error_from", "one_line",
]  # fmt: skip
