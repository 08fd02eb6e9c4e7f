"""One long answer, asked for in a thread, during which a test does harm to the nodes that it runs through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster import TestNode

from dgnd.control import api
from dgnd.control.client import ControlClient

TOKENS = 200
#: Both kinds of answers.
SAMPLINGS = [{}, {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5}]
#: Answers that were looked for, by who gave them, and how.
_LONG: dict[tuple[object, ...], tuple[api.GenerateParams, list[int]]] = {}
#: Longer than any recovery on a busy machine.
END_S = 90.0


@dataclass
class Asked:
    """A request in a thread; `then` is called once, when `after` tokens have come, with the nodes of the
    answer's route at that moment, in its order, as `status` says."""

    node: TestNode
    params: api.GenerateParams
    after: int
    then: Callable[[list[str]], None]
    result: api.GenerateResult | None = None
    error: Exception | None = None
    came: int = 0
    longest_s: float = 0.0  # between two tokens
    _last: float = field(default_factory=time.monotonic)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with ControlClient(self.node.socket) as client:
                self.result = client.generate(self.params, self._delta)
        except Exception as error:  # noqa: BLE001 - shown by `ids`
            self.error = error

    def _delta(self, delta: api.Delta) -> None:
        before, self.came = self.came, self.came + len(delta.token_ids)
        now = time.monotonic()
        self.longest_s, self._last = max(self.longest_s, now - self._last), now
        if before < self.after <= self.came:
            self.then(self._route())

    def _route(self) -> list[str]:
        with ControlClient(self.node.socket) as client:
            (session,) = client.call("status").sessions
        return list(dict.fromkeys(hop.name for hop in session.route))

    def ids(self) -> list[int]:
        """The whole answer's ids."""
        self._thread.join(END_S)
        assert not self._thread.is_alive(), "the answer does not end"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result.token_ids


def asked(**fields: object) -> api.GenerateParams:
    """A request for bare text, of TOKENS tokens unless `fields` say otherwise."""
    values = {"prompt": "hello there", "raw": True, "max_tokens": TOKENS, **fields}
    return api.GenerateParams(**values)  # type: ignore[arg-type]


def long_answer(
    origin: TestNode, sampling: Mapping[str, object], tokens: int = TOKENS, prompt: str = "x"
) -> tuple[api.GenerateParams, list[int]]:
    """A request whose answer has `tokens` ids, and these; a node is asked once for each kind."""
    kind = (origin.config, repr(sampling), tokens, prompt)
    if kind not in _LONG:
        _LONG[kind] = _found(origin, sampling, tokens, prompt)
    return _LONG[kind]


def _found(
    origin: TestNode, sampling: Mapping[str, object], tokens: int, prompt: str
) -> tuple[api.GenerateParams, list[int]]:
    for number in range(100):
        params = asked(prompt=f"{prompt}{number}", max_tokens=tokens, **sampling)
        ids = Asked(origin, params, 0, lambda _: None).ids()
        if len(ids) == tokens:
            return params, ids
    raise AssertionError("every answer ends early")
