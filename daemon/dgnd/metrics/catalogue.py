"""Every metric of a node: its name, its type, its labels and what it says.

`docs/metrics.md` is checked against it. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "counter", labels, text)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "gauge", labels, text)


def _histogram(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "histogram", labels, text)


_ALL = (
    _gauge("dgn_build_info", "1, with what runs here", "version", "python"),
    _gauge("dgn_ready", "1 while the node serves what it should"),
    _gauge("dgn_state", "1 for the state that the node is in, as in dgnctl status", "state"),
    # answers that this node is the origin of
    _counter("dgn_answers_total", "answers that ended: why, or the kind of error", "model", "outcome"),
    _gauge("dgn_answers_running", "answers under way", "model"),
    _counter("dgn_tokens_total", "tokens of answers", "model"),
    _counter("dgn_prompt_tokens_total", "tokens of prompts that were answered", "model"),
    _histogram("dgn_first_token_seconds", "from a request to the first token of its answer", "model"),
    _histogram("dgn_next_token_seconds", "from a token to the next one of the answer", "model"),
    _counter("dgn_mends_total", "times that answers went on after something was lost", "model"),
    _gauge("dgn_sessions", "sessions of this node that hold token ids", "model"),
    _gauge("dgn_http_requests", "requests to the HTTP API that are answered or wait"),
    _gauge("dgn_http_waiting", "answers of the HTTP API that wait for a place"),
    _counter("dgn_http_refused_total", "requests to the HTTP API that were too many"),
    # blocks that this node computes, for whomever
    _gauge("dgn_hops", "hops of sessions that are open here", "model"),
    _counter("dgn_decode_steps_total", "steps of one position that were computed here", "model"),
    _counter("dgn_prompt_positions_total", "positions of prompts that were computed here", "model"),
    _histogram("dgn_batch_steps", "steps that were computed together", "model"),
    _histogram("dgn_hop_seconds", "a step in this node: it waits, it is computed", "model", "part"),
    _histogram("dgn_edge_seconds", "a step or token that leaves: made bytes, under way", "peer", "part"),
    _gauge("dgn_waiting_steps", "steps that wait for their turn in a worker", "model"),
    _counter("dgn_replays_total", "times that results were sent again", "model"),
    _counter("dgn_replayed_positions_total", "positions whose results were sent again", "model"),
    _counter("dgn_refusals_total", "what peers asked of this node and were refused", "kind"),
    # workers and memory
    _gauge("dgn_workers_ready", "workers that compute", "model"),
    _counter("dgn_worker_ends_total", "times that a worker ended that should run", "model"),
    _gauge("dgn_worker_memory_bytes", "what workers have to themselves", "model"),
    _gauge("dgn_kv_bytes", "KV caches of all sessions here", "model"),
    _gauge("dgn_kv_busy_bytes", "KV caches of sessions that are answering", "model"),
    _gauge("dgn_kv_limit_bytes", "what KV caches may grow to", "model"),
    _gauge("dgn_memory_bytes", "what the node holds, by what for", "what"),
    _gauge("dgn_memory_mapped_bytes", "of the weights, what is mapped from files"),
    _gauge("dgn_memory_budget_bytes", "what it may hold"),
    _gauge("dgn_memory_free_bytes", "what another worker could have"),
    # peers
    _gauge("dgn_peer_up", "1 for a peer that is connected", "peer"),
    _gauge("dgn_peer_round_trip_seconds", "the last round trip to a connected peer", "peer"),
    _counter("dgn_peer_connections_total", "connections that came up", "peer"),
    _counter("dgn_peer_reconnects_total", "of these, all but the first", "peer"),
    _counter("dgn_peer_losses_total", "connections that ended", "peer"),
    _counter("dgn_strangers_refused_total", "connections that were not let in"),
    _gauge("dgn_send_queue_frames", "frames that wait to be sent"),
    _gauge("dgn_send_queue_bytes", "bytes of their tensors"),
)  # fmt: skip

#: By name.
CATALOGUE = {metric.name: metric for metric in _ALL}
