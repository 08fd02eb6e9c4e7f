"""A node's numbers as Prometheus wants them: read when somebody asks, with labels that are bounded.

A peer is called as in the configuration; all others are one. Nothing of it is text that was said. The only
module that knows prometheus_client.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from dgnd.control.api import NodeState
from dgnd.exposition.watched import Watched
from dgnd.metrics.catalogue import CATALOGUE
from dgnd.metrics.counts import MOST_APART, OTHERS, ModelCounts, PeerCounts
from dgnd.metrics.histogram import Histogram
from dgnd.workers.handle import WorkerHandle

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Exposition:
    """What a scrape gets of one node."""

    def __init__(self, watched: Watched) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_NodeCollector(watched))
        ProcessCollector(registry=self._registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics as they are now, and the content type; `accept`: what the client takes."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Page:
    """Samples by metric; those whose labels are the same are added up."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in CATALOGUE}
        self._spreads: dict[str, dict[tuple[str, ...], Histogram]] = {name: {} for name in CATALOGUE}

    def add(self, name: str, value: float, *labels: str) -> None:
        """A number."""
        samples = self._numbers[name]
        samples[labels] = samples.get(labels, 0) + value

    def spread(self, name: str, histogram: Histogram, *labels: str) -> None:
        """A histogram."""
        samples = self._spreads[name]
        if labels in samples:
            both = histogram.copy()
            both.merge(samples[labels].total, samples[labels].counts)
            histogram = both
        samples[labels] = histogram

    def families(self) -> Iterator[Metric]:
        """All metrics that have samples, in the order of the catalogue."""
        for name, metric in CATALOGUE.items():
            family: Metric
            if metric.kind == "histogram":
                spreads = self._spreads[name]
                family = histograms = HistogramMetricFamily(name, metric.text, labels=metric.labels)
                for labels, spread in spreads.items():
                    histograms.add_metric(labels, buckets=list(spread.cumulative()), sum_value=spread.total)
            else:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = numbers = kind(name, metric.text, labels=metric.labels)
                for labels, value in self._numbers[name].items():
                    numbers.add_metric(labels, value)
            if family.samples:
                yield family


class _NodeCollector(Collector):
    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterable[Metric]:
        page = _Page()
        self._node(page)
        self._models(page)
        self._workers(page)
        self._memory(page)
        self._peers(page)
        return page.families()

    def _node(self, page: _Page) -> None:
        node = self._watched
        page.add("dgn_build_info", 1, node.version, platform.python_version())
        page.add("dgn_ready", node.standing.serves())
        now = node.standing.state()
        for state in get_args(NodeState):
            page.add("dgn_state", state == now, state)
        for kind, count in node.counts.refusals.items():
            page.add("dgn_refusals_total", count, kind)
        page.add("dgn_http_requests", node.counts.http.requests)
        page.add("dgn_http_waiting", node.counts.http.waiting)
        page.add("dgn_http_refused_total", node.counts.http.refused)
        page.add("dgn_strangers_refused_total", node.network.refused())
        page.add("dgn_send_queue_frames", node.office.frames)
        page.add("dgn_send_queue_bytes", node.office.bytes)

    def _models(self, page: _Page) -> None:
        node = self._watched
        for name in node.models:
            node.counts.model(name)  # so that all are there from the start
        for name, count in node.counts.models.items():
            _model(page, name, count)
        for conversation in node.engine.conversations:
            page.add("dgn_sessions", 1, self._model_label(conversation.model.name))
            page.add("dgn_answers_running", conversation.busy, self._model_label(conversation.model.name))
        for hop in node.hops.hops.values():
            page.add("dgn_hops", 1, self._model_label(hop.ticket.model))

    def _model_label(self, name: str) -> str:
        return name if name in self._watched.counts.models else OTHERS

    def _workers(self, page: _Page) -> None:
        for model in self._watched.models.values():
            label = self._model_label(model.name)
            workers: list[WorkerHandle] = [filling.worker for filling in model.fillings]
            if model.worker is not None:
                workers.append(model.worker)
            for worker in workers:
                page.add("dgn_workers_ready", worker.ready, label)
                page.add("dgn_worker_memory_bytes", worker.private_bytes, label)
                page.add("dgn_waiting_steps", worker.stats.waiting, label)
                page.add("dgn_kv_bytes", worker.stats.kv_bytes, label)
                page.add("dgn_kv_busy_bytes", worker.stats.kv_busy, label)
                page.add("dgn_kv_limit_bytes", worker.stats.kv_budget, label)

    def _memory(self, page: _Page) -> None:
        account = self._watched.ledger.account()
        for what in ("weights", "kv", "journals", "queues", "programs"):
            page.add("dgn_memory_bytes", getattr(account, what), what)
        page.add("dgn_memory_mapped_bytes", account.mapped)
        page.add("dgn_memory_budget_bytes", account.budget)
        page.add("dgn_memory_free_bytes", account.free)

    def _peers(self, page: _Page) -> None:
        node = self._watched
        configured = list(node.names.peers.items())[:MOST_APART]
        names = {section.id: name for name, section in configured}
        up = {state.id for state in node.network.peers() if state.state == "connected"}
        for peer in names.keys() | up:
            page.add("dgn_peer_up", peer in up, names.get(peer, OTHERS))
        for peer, name in names.items():
            trip_s = node.network.trip_s(peer)
            if trip_s is not None:
                page.add("dgn_peer_round_trip_seconds", trip_s, name)
            _peer(page, name, node.counts.peer(peer))
        for peer, count in node.counts.peers.items():
            if peer not in names:
                _peer(page, OTHERS, count)


def _model(page: _Page, name: str, count: ModelCounts) -> None:
    for outcome in dict.fromkeys(("stop", "length", "cancelled", *count.answers)):
        page.add("dgn_answers_total", count.answers[outcome], name, outcome)
    page.add("dgn_answers_running", 0, name)
    page.add("dgn_sessions", 0, name)
    page.add("dgn_hops", 0, name)
    page.add("dgn_tokens_total", count.tokens, name)
    page.add("dgn_prompt_tokens_total", count.prompt_tokens, name)
    page.add("dgn_mends_total", count.mends, name)
    page.add("dgn_decode_steps_total", count.decode_steps, name)
    page.add("dgn_prompt_positions_total", count.prompt_positions, name)
    page.add("dgn_replays_total", count.replays, name)
    page.add("dgn_replayed_positions_total", count.replayed_positions, name)
    page.add("dgn_worker_ends_total", count.worker_ends, name)
    page.spread("dgn_first_token_seconds", count.first_token, name)
    page.spread("dgn_next_token_seconds", count.next_token, name)
    page.spread("dgn_batch_steps", count.batch, name)
    page.spread("dgn_hop_seconds", count.queue, name, "queue")
    page.spread("dgn_hop_seconds", count.compute, name, "compute")


def _peer(page: _Page, name: str, count: PeerCounts) -> None:
    page.add("dgn_peer_connections_total", count.connections, name)
    page.add("dgn_peer_reconnects_total", count.reconnects, name)
    page.add("dgn_peer_losses_total", count.losses, name)
    page.spread("dgn_edge_seconds", count.serialise, name, "serialise")
    page.spread("dgn_edge_seconds", count.wire, name, "wire")
