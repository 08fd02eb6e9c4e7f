"""Every message of `/dgn/1`, between peers and between dgnd and its workers. Frozen values, nothing else.

A frame is one of these and at most one raw tensor (see `dgnd.wire.codec`). Unknown optional fields are
ignored, so a field may be added with a default; the tag names are the protocol and never change.
"""

from __future__ import annotations

import msgspec

from dgn_backends.errors import DataValue
from dgn_backends.tensor import Tensor


class HopKey(msgspec.Struct, frozen=True, array_like=True):
    """Names one session's KV on one hop. `origin` is a peer id; it gives each `hop` once."""

    origin: str
    session: str
    hop: int


class Message(msgspec.Struct, frozen=True, tag=True, tag_field="t", kw_only=True):
    """The base of every message."""


# --- who is there, and with what


class SpanOffer(msgspec.Struct, frozen=True, kw_only=True):
    """One loaded span that a node computes for allowed origins."""

    span: str  #: in the config's notation
    numerics: str
    dtype: str
    row_invariant: bool = False
    quant: str = "none"
    free_kv_positions: int = 0
    step_ms: float | None = None  #: a decode step of one session through the span; None: not measured
    prefill_ms: float | None = None  #: one position of a prompt through it
    queue: float = 0.0  #: sessions whose steps are computed or wait there, on average over some seconds
    leaving: bool = False  #: hops that are open go on for a while, new ones are refused


class ModelOffer(msgspec.Struct, frozen=True, kw_only=True):
    """What a node offers of one model, and which model that is."""

    model: str  #: the name in the config, the same on all nodes
    n_blocks: int
    config_digest: str
    tokenizer_digest: str | None = None
    #: of the whole model, where the node has or was told all tensors' digests
    manifest_digest: str | None = None
    spans: tuple[SpanOffer, ...] = ()
    planned: str | None = None  #: what it has loaded or is loading, in the config's notation; None: `spans`
    auto: bool = False  #: whether it chooses these itself; then "" is not chosen yet


class Hello(Message, tag="hello", frozen=True):
    """First message in both directions on a new connection."""

    versions: tuple[int, ...]
    software: str
    name: str
    offers: tuple[ModelOffer, ...] = ()
    peers: tuple[str, ...] = ()  #: peer ids with a live, mutually accepted connection
    ports: tuple[int, ...] = ()  #: of TCP, that the sender listens on
    trips: dict[str, float] = {}  #: round trips in ms to some of `peers`
    away: str = ""  #: why it offers nothing for now, in words

    @property
    def update(self) -> Offers:
        """What of it may change, as the message that says so."""
        return Offers(offers=self.offers, peers=self.peers, trips=self.trips, away=self.away)


class Offers(Message, tag="offers", frozen=True):
    """Replaces what Hello said, whenever it changes; figures in it age, so it is also said again."""

    offers: tuple[ModelOffer, ...] = ()
    peers: tuple[str, ...] = ()
    trips: dict[str, float] = {}
    away: str = ""


class Manifest(Message, tag="manifest", frozen=True):
    """Digests of a model's tensors, by name. `complete` when every tensor of the model is there."""

    model: str
    config_digest: str
    tokenizer_digest: str | None
    tensors: dict[str, str]
    complete: bool


class Ping(Message, tag="ping", frozen=True):
    """Answered at once, also while computing."""

    nonce: int


class Pong(Message, tag="pong", frozen=True):
    """The answer to a Ping."""

    nonce: int


class Goodbye(Message, tag="bye", frozen=True):
    """The sender closes the connection on purpose."""

    reason: str


# --- a hop's life


#: How hidden states may travel: in the numbers in which they were computed, or as `dgnd.wire.q8`.
WIRES = ("plain", "q8")


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What an origin grants and a recipient is asked for; signed by the origin's ed25519 identity."""

    key: HopKey
    recipient: str
    previous: str  #: the peer that data comes from (the origin for hop 0 and for a relayed edge)
    next: str  #: the peer that results go to (the origin for the last hop and for a relayed edge)
    next_hop: int | None  #: hop id that results are addressed to; None: they are the session's results
    model: str
    config_digest: str
    manifest_digest: str | None
    span: str
    route: int
    branch: int
    max_positions: int
    max_chunk: int  #: most positions of one step
    nonce: bytes
    lease_s: float  #: counted by the receiver from receipt
    #: what is computed of the ticket's own branch fills KV and journal and goes no further: `next` has it
    catch_up: bool = False
    wire: str = "plain"  #: how hidden states go to `next`, for as long as the hop is open: one of WIRES
    generation: str = ""  #: what logs call the answer that it is opened for; "": as the session


class OpenHop(Message, tag="open", frozen=True):
    """`ticket` is the msgpack of a Ticket, exactly the bytes that were signed.

    For a hop that is open, a ticket with a higher route gives it other neighbours and cancels its branch.
    """

    ticket: bytes
    signature: bytes


class HopOpened(Message, tag="opened", frozen=True):
    """The hop exists, `length` positions are in its KV, and nothing is under way; `credits` chunks may be.

    `kv_positions`: how many of the ticket's positions its node's budget of KV, `kv_budget` bytes, can ever
    hold; None for all.
    """

    key: HopKey
    credits: int
    length: int = 0
    kv_positions: int | None = None
    kv_budget: int = 0
    route: int = 0  #: of the ticket that is answered


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the token after a step's last position is picked. temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None  #: tell the logarithm of the probability of the token, and of so many others

    @property
    def needs_history(self) -> bool:
        """Whether the token ids so far matter (penalties)."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class StepFrame(Message, tag="step", frozen=True):
    """Positions `[start, start + count)`; payload token ids i32 [count], or hidden states [count, hidden].

    From dgnd to a worker, from hop to hop, and from a worker back: always the same message. Hidden states
    may be in q8 from hop to hop alone. `sample` asks the head for the token after the last position.
    `truncate_to` is in the first frame of a new branch.
    """

    key: HopKey
    branch: int
    route: int
    start: int
    count: int
    digest_start: int  #: prefix digest of token ids [0, start)
    digest_end: int  #: of [0, start + count)
    truncate_to: int | None = None
    sample: Sampling | None = None
    alone: bool = False  #: a worker died over it: it is computed in a batch of its own
    #: with `sample`: which token ids may be picked, as `dgnd.wire.allowed` packs them; None: all
    allowed: bytes | None = None

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.count


class History(Message, tag="history", frozen=True):
    """Token ids `[start, start + n)` for penalties, from the origin to the head's hop; payload i32 [n].

    `answer_start` is the border between prompt and answer. A turn with penalties begins with a new branch
    and one of these; steps of that branch that ask for a token wait for it.
    """

    key: HopKey
    branch: int
    start: int
    answer_start: int


class Replay(Message, tag="replay", frozen=True):
    """Origin to hop: send positions `[start, stop)` from the journal to the next hop, as of `branch`."""

    key: HopKey
    branch: int
    route: int
    start: int
    stop: int
    alone: bool = False  #: as in StepFrame


class TokenFrame(Message, tag="token", frozen=True, omit_defaults=True):
    """The token picked for `position`, from the hop with the head to the origin. Returns one credit."""

    key: HopKey
    branch: int
    route: int
    position: int
    token_id: int
    #: Where they were asked for: ids with logarithms of probabilities, the picked one's, then the likeliest.
    logprobs: tuple[tuple[int, float], ...] | None = None


class Credit(Message, tag="credit", frozen=True):
    """A chunk that ended at `stop` went no further than this hop, without a token; returns one credit."""

    key: HopKey
    branch: int
    route: int
    stop: int


class Cancel(Message, tag="cancel", frozen=True):
    """Drop what waits for this session; answered by HopLength. The next frame is of a new branch."""

    key: HopKey
    branch: int


class Probe(Message, tag="probe", frozen=True):
    """The origin waits: is the hop's worker alive, and its connection to the next hop? Answered by Alive at
    once, and by a Failure later, where one is not."""

    key: HopKey
    generation: str = ""  #: what logs call the answer that it waits for; "": as before


class Alive(Message, tag="alive", frozen=True):
    """The hop is here, open or about to be. Answers Probe."""

    key: HopKey


class EndTurn(Message, tag="end_turn", frozen=True):
    """The answer is complete; answered by HopLength, of the hop and not of its worker."""

    key: HopKey
    branch: int


class HopLength(Message, tag="length", frozen=True):
    """How many positions the hop's KV holds."""

    key: HopKey
    branch: int
    length: int


class CloseHop(Message, tag="close", frozen=True):
    """Frees the hop: from the origin, or from the hop when its lease ended or its worker went."""

    key: HopKey
    reason: str = ""


class Failure(Message, tag="failure", frozen=True):
    """A typed error. `key` names the hop concerned; without one it concerns the connection."""

    kind: str
    message: str
    data: dict[str, DataValue] = {}
    key: HopKey | None = None
    branch: int = 0
    tag: str = ""  #: of the message that it answers, where it answers one


# --- dgnd and its worker only


class LoadSpans(Message, tag="w.load", frozen=True):
    """First message to a worker."""

    model: str
    path: str
    spans: tuple[str, ...]
    backend: str
    device: str
    dtype: str
    threads: int | None = None
    quant: str = "none"
    cache_dir: str = ""  #: where the worker may keep quantised weights
    kv_bytes: int = 0  #: budget for KV; 0: the worker's choice
    memory_bytes: int = 0  #: what the worker's process may have in all; 0: that is not known
    map_weights: bool = True


class LoadProgress(Message, tag="w.progress", frozen=True):
    """Bytes of weights done; a sign of life."""

    done: int
    total: int


class LoadedSpan(msgspec.Struct, frozen=True, kw_only=True):
    """One span as loaded."""

    span: str
    numerics: str
    dtype: str
    row_invariant: bool
    weights_bytes: int
    kv_bytes_per_position: int


class Loaded(Message, tag="w.loaded", frozen=True):
    """The worker can compute."""

    spans: tuple[LoadedSpan, ...]
    device: str
    private_weights: int = 0  #: bytes of weights that are in memory of its own, not in mapped files
    apart: bool = False  #: weights and KV are in another memory than the machine's: a GPU's


class KvLimit(Message, tag="w.kv_limit", frozen=True):
    """What KV may take from now on; idle sequences give way at once where they hold more."""

    n_bytes: int


class OpenSequence(Message, tag="w.open", frozen=True):
    """Begin a sequence for a hop through `span`, part of a loaded one."""

    key: HopKey
    span: str
    max_positions: int


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How often values lay within which bounds of `dgnd.metrics.histogram`, and their sum."""

    total: float = 0.0
    counts: tuple[int, ...] = ()


class WorkDone(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has done since it began."""

    decode_steps: int = 0
    prompt_positions: int = 0
    batch: Spread = Spread()  #: steps that were computed together
    queue: Spread = Spread()  #: seconds that steps waited for their turn
    compute: Spread = Spread()  #: seconds that steps were computed


class WorkerStats(Message, tag="w.stats", frozen=True):
    """Asked by an empty one, answered at once with the numbers."""

    kv_bytes: int = 0
    sequences: int = 0
    waiting: int = 0
    kv_budget: int = 0  #: bytes that KV may take
    kv_busy: int = 0  #: bytes of it that sessions hold which are answering
    step_ms: float | None = None  #: a decode step of one session through one block; None: not measured
    prompt_ms: float | None = None  #: one position of a prompt through one block
    queue: float = 0.0  #: as in SpanOffer
    done: WorkDone = WorkDone()


PeerMessage = (
    Hello | Offers | Manifest | Ping | Pong | Goodbye | OpenHop | HopOpened | StepFrame | History | Replay
    | TokenFrame | Credit | Cancel | Probe | Alive | EndTurn | HopLength | CloseHop | Failure
)  # fmt: skip
WorkerMessage = (
    LoadSpans | LoadProgress | Loaded | KvLimit | OpenSequence | HopOpened | WorkerStats | Ping | Pong
    | StepFrame | History | TokenFrame | Credit | Cancel | EndTurn | HopLength | CloseHop | Failure
)  # fmt: skip
AnyMessage = PeerMessage | WorkerMessage


class Frame(msgspec.Struct, frozen=True):
    """One message and its tensor, if it has one."""

    message: AnyMessage
    payload: Tensor | None = None
