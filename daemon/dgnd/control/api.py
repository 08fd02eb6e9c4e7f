"""The control API as types: the parameters and the result of every method. Shared by dgnd and dgnctl.

Knows nothing of sockets or of how a method is carried out. `docs/control-api.md` is checked against this.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

NodeState = Literal["starting", "loading", "ready", "degraded", "paused", "draining", "drained"]
FinishReason = Literal["stop", "length", "cancelled"]
BackendState = Literal["usable", "broken"]


class RouteHop(msgspec.Struct, frozen=True):
    """One hop of a route; `span` in the config's notation."""

    peer: str
    name: str
    span: str


class Figures(msgspec.Struct, frozen=True):
    """How fast a node computes a span, as it says itself, in ms; null: not measured."""

    span: str  #: in the config's notation
    step_ms: float | None  #: a decode step of one session through the span
    prefill_ms: float | None  #: one position of a prompt through it
    queue: float  #: sessions whose steps are computed or wait there, on average over some seconds
    free_kv: int  #: positions that a new session finds room for


class NodeFigures(msgspec.Struct, frozen=True):
    """What routes to a node are chosen by."""

    model: str
    peer: str
    name: str
    trip_ms: float | None  #: round trip from here; null: not measured, or this node
    figures: list[Figures]


class WorkerStatus(msgspec.Struct, frozen=True):
    """One worker process."""

    model: str
    spans: str
    pid: int | None
    state: str  #: starting, loading, ready, silent, restarting, failed, stopped
    backend: str
    weights_bytes: int
    kv_bytes: int
    kv_budget_bytes: int = 0  #: what kv_bytes may grow to; 0: not known yet
    detail: str = ""  #: progress, or why it is not ready


class WaitStatus(msgspec.Struct, frozen=True):
    """What an answer waits for, and for how long it still will."""

    missing: str  #: blocks that nobody serves, in the config's notation; empty where it is something else
    why: str
    left_s: float


class SessionStatus(msgspec.Struct, frozen=True):
    """One session that this node is the origin of, or a hop of."""

    id: str
    model: str
    origin: str
    position: int
    route_number: int
    route: list[RouteHop]
    waiting: WaitStatus | None = None  #: of an answer that nobody can go on with now
    generated: int = 0  #: tokens, without those of prompts, since it began or its hop here was opened


class ProcessStatus(msgspec.Struct, frozen=True):
    """What dgnd itself takes, without its workers; 0 where the system does not say."""

    resident_bytes: int
    fds: int
    threads: int
    tasks: int  #: of its event loop


class MemoryStatus(msgspec.Struct, frozen=True):
    """The account of this node's memory, in bytes: what is held, of the budget of `[limits] memory`."""

    budget: int = 0
    by: str = ""  #: what the budget is of
    used: int = 0  #: all of the following together
    free: int = 0  #: what more could be loaded; idle sessions' KV gives way to it
    weights: int = 0
    weights_mapped: int = 0  #: of these, what is mapped from files
    kv: int = 0
    kv_limit: int = 0  #: what `kv` may grow to
    journals: int = 0  #: results that were passed on, kept to be sent again
    queues: int = 0  #: what waits to be sent
    programs: int = 0  #: dgnd and its workers, beside the rest


class Status(msgspec.Struct, frozen=True):
    """The result of `status`."""

    version: str
    pid: int
    peer_id: str
    name: str
    state: NodeState
    workers: list[WorkerStatus]
    missing: dict[str, str]
    sessions: list[SessionStatus]
    notes: list[str] = []  #: what the operator should know: unverified models, relayed edges, refusals
    process: ProcessStatus = ProcessStatus(0, 0, 0, 0)
    hops: int = 0  #: open here, of all sessions
    journal_bytes: int = 0  #: kept of results that they passed on
    speeds: list[NodeFigures] = []  #: of everybody whose offers can be used
    why: str = ""  #: what the node serves, or why it doesn't, in one line
    memory: MemoryStatus = MemoryStatus()


class ModelInfo(msgspec.Struct, frozen=True):
    """One configured model. `local` is what this node has loaded, in the config's notation."""

    name: str
    path: str
    backend: str
    device: str
    dtype: str
    n_blocks: int
    context: int
    local: str
    missing: str
    verified: bool
    template: str
    quant: str = "none"
    tools: str = ""  #: how its template has calls of tools written: hermes, llama; empty: it knows none
    digest: str = ""  #: of all weights, config and tokenizer; empty: not known here (yet)


class BackendInfo(msgspec.Struct, frozen=True):
    """One installed backend. `auto`: whether it is what backend = "auto" takes."""

    name: str
    distribution: str
    version: str
    state: BackendState
    devices: list[str]
    reason: str = ""  #: why it is broken, and what to do
    auto: bool = False


class MapRow(msgspec.Struct, frozen=True):
    """Who serves what: a configured row and what the peer really offers now."""

    model: str
    peer: str
    name: str
    span: str  #: of my config, "auto" where this node chooses; empty where only the offer says so
    offered: str  #: live; empty when unknown or not connected
    state: str
    why: str = ""  #: where the node chooses its blocks itself
    figures: list[Figures] = []  #: of what is offered


class MapView(msgspec.Struct, frozen=True):
    """The result of `map.show`."""

    rows: list[MapRow]
    missing: dict[str, str]


class PeerOffer(msgspec.Struct, frozen=True):
    """What a peer offers of one model."""

    model: str
    spans: str
    numerics: str
    figures: list[Figures] = []


class PeerInfo(msgspec.Struct, frozen=True):
    """One peer. state: connected, connecting, refused, unreachable."""

    id: str
    name: str
    state: str
    addrs: list[str]
    rtt_ms: float | None
    offers: list[PeerOffer]
    detail: str = ""
    trips: dict[str, float] = {}  #: round trips in ms that it measured to others, by their names


class Refusal(msgspec.Struct, frozen=True):
    """A connection that this node refused, with the lines to paste if it should be let in."""

    id: str
    addr: str
    when: str  #: ISO 8601, UTC
    reason: str
    paste: str


class PeerList(msgspec.Struct, frozen=True):
    """The result of `peers.list`."""

    peers: list[PeerInfo]
    refused: list[Refusal]
    self_addrs: list[str]


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool that the model called."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[ToolCall] = []  #: what an assistant's message called
    tool_call_id: str = ""  #: of a tool's message: which call it answers
    name: str = ""  #: of a tool's message: the tool


class Usage(msgspec.Struct, frozen=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """Seconds. ttft from receipt by dgnd; decode from the first to the last token."""

    prefill_s: float
    decode_s: float
    ttft_s: float


class Logprob(msgspec.Struct, frozen=True):
    """How likely a token was, as the model has it, before all settings of sampling."""

    token_id: int
    token: str  #: its text
    logprob: float  #: natural logarithm of the probability


class TokenLogprobs(msgspec.Struct, frozen=True):
    """A token of the answer, and the likeliest ones in its place."""

    picked: Logprob
    likeliest: list[Logprob]


class GenerateResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of `generate`; what `dgnctl run --json` prints."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    exact: bool
    usage: Usage
    timings: Timings
    route: list[RouteHop]
    logprobs: list[TokenLogprobs] = []  #: where they were asked for, of all tokens but an eos
    generation: str = ""  #: what the logs of all nodes on the route call it


class GenerateDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The params of the notification `generate.delta`. `request_id` is the id of the JSON-RPC request."""

    request_id: int | str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    waiting: str = ""  #: what the answer waits for, in words; then it is no piece of it


class LogLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the log."""

    number: int  #: counted since dgnd began
    time: float  #: seconds since 1970, UTC
    level: str  #: debug, info, warning, error, critical
    logger: str
    message: str
    generation: str = ""  #: the answer that it is about


class LogPage(msgspec.Struct, frozen=True):
    """The result of `logs`."""

    lines: list[LogLine]
    after: int  #: what to ask with for the lines that follow
    lost: int = 0  #: lines after the one asked for that are not kept any more


class CacheEntry(msgspec.Struct, frozen=True):
    """One session with KV on this node. role: origin, hop."""

    session: str
    model: str
    origin: str
    role: str
    positions: int
    kv_bytes: int
    idle_s: float


# --- parameters


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The base of every method's parameters; unknown ones are errors."""


class NoParams(Params, frozen=True):
    """For methods without parameters."""


class GenerateParams(Params, frozen=True):
    """`generate`. Exactly one of prompt, messages, token_ids, or `resume` with a session.

    prompt: one user turn (with `raw`, the bare text). messages: a whole conversation. token_ids: the bare
    ids. With `session` the context is kept under that name: a prompt continues it, and only new tokens are
    computed.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    token_ids: list[int] | None = None
    raw: bool = False
    system: str | None = None
    session: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None  #: tell how likely each token was, and so many of the likeliest
    stop: list[str] = []
    stop_ids: list[list[int]] = []
    wait: float = 0.0  #: seconds to wait for the node to be ready
    exact: bool = False  #: rather no answer than one that is not `exact`
    resume: bool = False  #: instead of a prompt: go on with the session's answer that nodes were lacking for
    json_schema: dict[str, Any] | None = None  #: the answer is JSON of this schema
    tools: list[dict[str, Any]] = []  #: that the model may call; with `messages`, given to its template
    tool_choice: Literal["auto", "required"] = "auto"  #: required: the answer is calls of tools
    tool_name: str | None = None  #: with required: of this one alone
    parallel_tool_calls: bool = True  #: with required: whether there may be several calls


class CancelParams(Params, frozen=True):
    """`cancel`: ends the request of this connection with that id, as closing the connection does for all."""

    request_id: int | str


class ConnectParams(Params, frozen=True):
    """`peers.connect`: a multiaddress that ends in /p2p/ID."""

    addr: str


class PeerParams(Params, frozen=True):
    """`peers.disconnect`: a peer's name or id."""

    peer: str


class TokenizeParams(Params, frozen=True):
    """`tokenize`."""

    text: str
    model: str | None = None
    raw: bool = True


class TokenizeResult(msgspec.Struct, frozen=True):
    """The result of `tokenize`."""

    token_ids: list[int]
    tokens: list[str]


class CacheClearParams(Params, frozen=True):
    """`cache.clear`: one session, or all that this node is the origin of."""

    session: str | None = None


class CacheClearResult(msgspec.Struct, frozen=True):
    """How many sessions were forgotten."""

    cleared: int
    busy: int = 0  #: sessions that were left, since they are answering


class SessionParams(Params, frozen=True):
    """`session.export`."""

    session: str


class SessionTieParams(Params, frozen=True):
    """`session.tie`: ends the session with this connection, unless a later one ties it again."""

    session: str


class SessionImportParams(Params, frozen=True):
    """`session.import`: `session` then holds these token ids, as if said; computed when next needed."""

    session: str
    token_ids: list[int]
    model: str | None = None


class SessionTokens(msgspec.Struct, frozen=True):
    """The token ids of a session, prompt and answers."""

    session: str
    model: str
    token_ids: list[int]


#: Of lines of the log, the least first.
LOG_LEVELS = ("debug", "info", "warning", "error")


class LogsParams(Params, frozen=True):
    """`logs`."""

    after: int | None = None  #: lines after this one, oldest first; null: the last ones
    most: int = 100  #: lines
    level: str = "debug"  #: and above
    generation: str | None = None  #: only lines about this answer


class DrainParams(Params, frozen=True):
    """`drain`: or, with `undo`, takes sessions again."""

    undo: bool = False


class Drained(msgspec.Struct, frozen=True):
    """What came of `drain`. Nothing was drained where `state` is another than `drained`."""

    state: NodeState
    left: int  #: sessions that ended by themselves or were handed over
    ended: int  #: sessions that were cut off when `drain_s` was over


class PauseParams(Params, frozen=True):
    """`pause`."""

    seconds: float | None = None  #: null: until `resume`


class Paused(msgspec.Struct, frozen=True):
    """What came of `pause`: sessions with blocks here."""

    state: NodeState
    why: str  #: as in Status
    left: int  #: answers that ended, or went on elsewhere, in the moment that they were given
    closed: int  #: sessions that were closed here, which their origins know and keep
    idle: int = 0  #: sessions between two answers that were let go; they are computed again when they go on


class Resumed(msgspec.Struct, frozen=True):
    """What came of `resume`; what is to be served is loaded from now on."""

    state: NodeState
    was_paused: bool


class Reloaded(msgspec.Struct, frozen=True):
    """What `reload` found to change. What is loaded or given up takes longer; `status` tells of it."""

    changed: list[str]  #: in a few words each
    restart: list[str]  #: keys whose new values count only after a restart


class Done(msgspec.Struct, frozen=True):
    """For methods that only do something."""

    ok: bool = True


#: Every method: its parameters and its result.
METHODS: dict[str, tuple[type[Params], object]] = {
    "status": (NoParams, Status),
    "models.list": (NoParams, list[ModelInfo]),
    "backends.list": (NoParams, list[BackendInfo]),
    "map.show": (NoParams, MapView),
    "peers.list": (NoParams, PeerList),
    "peers.connect": (ConnectParams, PeerInfo),
    "peers.disconnect": (PeerParams, Done),
    "generate": (GenerateParams, GenerateResult),
    "cancel": (CancelParams, Done),
    "tokenize": (TokenizeParams, TokenizeResult),
    "session.export": (SessionParams, SessionTokens),
    "session.tie": (SessionTieParams, Done),
    "session.import": (SessionImportParams, Done),
    "cache.list": (NoParams, list[CacheEntry]),
    "cache.clear": (CacheClearParams, CacheClearResult),
    "logs": (LogsParams, LogPage),
    "drain": (DrainParams, Drained),
    "pause": (PauseParams, Paused),
    "resume": (NoParams, Resumed),
    "reload": (NoParams, Reloaded),
    "shutdown": (NoParams, Done),
}
