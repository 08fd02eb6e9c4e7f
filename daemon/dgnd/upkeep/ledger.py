"""The one account of this node's memory: what holds how much of the budget, what a worker that is started may
have, and what KV may grow to.

Memory of processes is measured, not believed: what a library takes beside weights and KV is in the account,
too. Weights count whether they are in memory of a worker's own or mapped from files, as both must be there to
compute. KV gets what nothing else holds. Knows nothing of sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import trio

from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.span import parse_spans
from dgnd.config.amount import Amount, parse_amount
from dgnd.config.schema import LimitsConfig, SessionsConfig
from dgnd.hosting.journal import JournalBook
from dgnd.memory.system_memory import Allowed, allowed, available_bytes, private_bytes
from dgnd.models.local import LocalModel
from dgnd.peers.postoffice import PostOffice
from dgnd.wire.messages import Frame, KvLimit
from dgnd.words import format_bytes
from dgnd.workers.handle import WorkerHandle

log = logging.getLogger("dgnd.ledger")

#: How often it looks: while something is held for sessions, and while nothing is.
_LOOK_S, _REST_S = 2.0, 6.0
#: What is left of the budget, at least, for what steps need for a moment.
_LEAST_SPARE, _SPARE_SHARE = 32 << 20, 32
#: Of the budget, what journals may have, and what waits for one peer that does not read.
_JOURNALS_SHARE, _QUEUE_SHARE = 16, 32
#: Of the memory that is available now, whatever the budget says, what KV may take.
_AVAILABLE_SHARE = 0.8
#: Beside its weights, what a worker is taken to need until it has been measured.
PROGRAM_BYTES = 192 << 20
#: Of the memory that is free, what weights may take that nobody told a node to load.
WEIGHTS_SHARE = 0.7
#: A limit of KV that changes by less is not told.
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes. `free` is what another worker could have: idle sessions' KV gives way to it."""

    budget: int
    by: str  #: what the budget is of
    weights: int
    mapped: int  #: of `weights`, what is mapped from files
    kv: int
    kv_limit: int  #: what `kv` may grow to
    journals: int
    queues: int
    programs: int  #: dgnd and its workers, beside the rest
    kv_room: int  #: of the budget, what is left for KV when all else has its own; below 0 where it has more
    free: int

    @property
    def used(self) -> int:
        """All that is held."""
        return self.weights + self.kv + self.journals + self.queues + self.programs


@dataclass(frozen=True, slots=True)
class _Held:
    """What one worker has."""

    weights: int
    mapped: int
    kv: int
    kv_busy: int
    program: int


@dataclass(slots=True)
class Ledger:
    """One node's. `amount` and `journal_bytes` are set by the configuration; `workers` are those that run,
    with what they are of."""

    amount: Amount
    journal_bytes: int
    models: Mapping[str, LocalModel]
    workers: Callable[[], Iterator[WorkerHandle]]
    journals: JournalBook
    office: PostOffice
    _told: dict[WorkerHandle, int] = field(default_factory=dict)
    _short: bool = False

    def configure(self, limits: LimitsConfig, sessions: SessionsConfig) -> None:
        """As configured, from now on."""
        self.amount, self.journal_bytes = parse_amount(limits.memory), sessions.journal_bytes

    # --- what is held

    def account(self, without: WorkerHandle | None = None) -> Account:
        """As it is now; `without` one of the workers."""
        limits = allowed()
        budget = self.amount.of(limits.total)
        held = {worker: self._held(worker) for worker in self.workers() if worker is not without}
        journals, queues = self.journals.bytes, self.office.bytes
        programs = max(private_bytes() - journals - queues, 0) + sum(each.program for each in held.values())
        weights = sum(each.weights for each in held.values())
        kv_room = budget - self._spare(budget) - weights - programs - queues
        kv_room -= max(journals, self._most_journals(budget))
        kv, busy = sum(each.kv for each in held.values()), sum(each.kv_busy for each in held.values())
        free = min(kv_room - busy, available_bytes() + kv)
        return Account(
            budget=budget,
            by=_by(self.amount, limits),
            weights=weights,
            mapped=sum(each.mapped for each in held.values()),
            kv=kv,
            kv_limit=sum(worker.stats.kv_budget for worker in held if worker.stats.kv_budget > 1),
            journals=journals,
            queues=queues,
            programs=programs,
            kv_room=kv_room,
            free=max(free, 0),
        )

    def _held(self, worker: WorkerHandle) -> _Held:
        """Of a worker that has not loaded yet: what it will hold, as far as that is known."""
        private, kv = worker.private_bytes, worker.stats.kv_bytes
        if worker.apart:
            return _Held(0, 0, 0, 0, private)
        if not worker.spans:
            if worker.pid is None or worker.fault is not None:
                return _Held(0, 0, 0, 0, private)
            weights = self._expected(worker)
            return _Held(weights, 0, 0, 0, max(private - weights, PROGRAM_BYTES))
        weights = worker.weights_bytes
        mapped = weights - min(worker.private_weights, weights)
        return _Held(weights, mapped, kv, worker.stats.kv_busy, max(private - (weights - mapped) - kv, 0))

    def _expected(self, worker: WorkerHandle) -> int:
        model = self.models.get(worker.model)
        if model is None:
            return 0
        spans = [span for text in worker.request.spans for span in parse_spans(text, model.config.n_blocks)]
        return loaded_bytes(worker.request.quant, model.config, spans)

    def _spare(self, budget: int) -> int:
        return min(max(budget // _SPARE_SHARE, _LEAST_SPARE), budget)

    def _most_journals(self, budget: int) -> int:
        return min(self.journal_bytes, budget // _JOURNALS_SHARE)

    # --- what may be taken

    def allowance(self, worker: WorkerHandle) -> int:
        """What the process of a worker that is about to load may have in all."""
        return max(self.account(worker).free, 1)

    def room_for_another(self) -> int:
        """What the weights of one more worker may take now."""
        return max(self.account().free - PROGRAM_BYTES, 0)

    def room_for_weights(self, more: int = 0) -> int:
        """What weights may take that nobody told this node to load: the rest is for KV. `more`: weights that
        would make way."""
        return int(WEIGHTS_SHARE * (self.room_for_another() + more))

    async def run(self) -> None:
        """Keeps KV, journals and queues within the budget."""
        while True:
            account = self.share()
            await trio.sleep(_LOOK_S if account.kv or account.journals or account.queues else _REST_S)

    def share(self) -> Account:
        """Tells every worker what its KV may take now."""
        account = self.account()
        self.journals.limit(self._most_journals(account.budget))
        self.office.most_bytes = max(account.budget // _QUEUE_SHARE, 1)
        ready = [worker for worker in self.workers() if worker.spans and not worker.apart]
        self._told = {worker: told for worker, told in self._told.items() if worker in ready}
        room = max(min(account.kv_room, account.kv + int(available_bytes() * _AVAILABLE_SHARE)), 1)
        self._complain(account, room <= 1 and bool(ready))
        for number, worker in enumerate(sorted(ready, key=_wanted)):
            share = max(room // (len(ready) - number), 1)
            most = min(share, worker.request.kv_bytes or share)
            room -= most
            if abs(most - self._told.get(worker, 0)) >= _STEP or worker not in self._told:
                self._told[worker] = most
                worker.post(Frame(KvLimit(n_bytes=most)))
        return account

    def _complain(self, account: Account, short: bool) -> None:
        if short and not self._short:
            log.warning(
                "no memory is left for sessions: %s of %s are held by weights, %s by programs; serve fewer "
                "blocks, or raise memory in [limits]",
                format_bytes(account.weights),
                format_bytes(account.budget),
                format_bytes(account.programs),
            )
        self._short = short


def room_at_start(amount: Amount) -> int:
    """As `room_for_weights` will be once a node with the budget `amount` runs, of which there is none yet."""
    return int(WEIGHTS_SHARE * free_at_start(amount))


def free_at_start(amount: Amount) -> int:
    """What such a node has for the weights and sessions of a worker, about: dgnd and the worker themselves
    are not measured yet."""
    budget = min(amount.of(allowed().total), available_bytes())
    return max(budget - budget // _JOURNALS_SHARE - 2 * PROGRAM_BYTES, 0)


def _wanted(worker: WorkerHandle) -> float:
    """Those that are content with less first, so that the others have the rest."""
    return worker.request.kv_bytes or float("inf")


def _by(amount: Amount, limits: Allowed) -> str:
    if amount.share is None:
        return f"of {format_bytes(limits.total)} of {limits.by}"
    return f"{amount.share:.0%} of {format_bytes(limits.total)} of {limits.by}"
