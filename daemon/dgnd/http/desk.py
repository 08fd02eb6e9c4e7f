"""Who is answered now and who waits: generations for HTTP clients, asked of the same service as the socket's.

As many run at once as the node has sessions; the others wait in order of arrival, and are gone when their
client is. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import msgspec
import trio

from dgnd.control import api
from dgnd.control.checks import check_generate
from dgnd.control.service import DeltaSink, WaitSink
from dgnd.errors import BadRequest, Cancelled, DgnError, NoRoomNow
from dgnd.http.kept import KeptSessions
from dgnd.metrics.counts import HttpCounts
from dgnd.sessions.memory_line import lacks_memory

#: For an answer that is cancelled to give back what it has, as on the control socket.
CANCEL_GRACE_S = 10.0
#: How long a request waits for its turn before it is told to come again.
TURN_S = 300.0
#: After others' sessions took all places, how long until it is tried again, at first and at most.
_AGAIN_S, _MOST_AGAIN_S = 0.1, 2.0

#: The same of one of several answers, after its number.
Pieces = Callable[[int, str, list[api.TokenLogprobs]], Awaitable[None]]


class Service(Protocol):
    """What the HTTP API asks of the daemon; `dgnd.control.service.ControlService` has more."""

    async def status(self) -> api.Status:
        """The node, and what is missing."""
        ...

    async def models_list(self) -> list[api.ModelInfo]:
        """The configured models."""
        ...

    async def generate(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        cancelled: trio.Event,
        on_wait: WaitSink | None = None,
    ) -> api.GenerateResult:
        """One answer."""
        ...

    async def cache_clear(self, params: api.CacheClearParams) -> api.CacheClearResult:
        """Forgets a session."""
        ...


class Desk:
    """All generations of HTTP clients. `at_once` of them run, `most` requests are taken; of so many
    `conversations` the session is kept for their next request. What is asked is counted in `counts`."""

    def __init__(
        self,
        service: Service,
        at_once: int,
        most: int,
        conversations: int = 0,
        counts: HttpCounts | None = None,
    ) -> None:
        self.service = service
        self._counts = counts or HttpCounts()
        self._kept = KeptSessions(conversations)
        self._places = trio.Semaphore(at_once)
        self._most = most

    @contextmanager
    def request(self) -> Iterator[None]:
        """Takes one request. Raises NoRoomNow when there are too many."""
        counts = self._counts
        if counts.requests >= self._most:
            counts.refused += 1
            raise NoRoomNow(
                f"{counts.requests} requests are answered or wait, of {self._most} at most; ask again later"
            )
        counts.requests += 1
        try:
            yield
        finally:
            counts.requests -= 1

    async def answers(
        self,
        asked: Sequence[api.GenerateParams],
        pieces: Pieces,
        gone: trio.Event,
        on_wait: WaitSink | None = None,
    ) -> list[api.GenerateResult]:
        """The answers to all that is asked, side by side. The first error ends the others and is raised.

        `gone` ends them within a step; then Cancelled is raised.
        """
        for params in asked:
            check_generate(params)
        results: dict[int, api.GenerateResult] = {}
        failed: list[DgnError] = []

        async with trio.open_nursery() as nursery:

            async def one(index: int, params: api.GenerateParams) -> None:
                async def on_delta(text: str, _ids: list[int], logprobs: list[api.TokenLogprobs]) -> None:
                    await pieces(index, text, logprobs)

                try:
                    answer = self._in_session if len(asked) == 1 else self._answer
                    results[index] = await answer(params, on_delta, gone, on_wait)
                except DgnError as error:
                    failed.append(error)
                    nursery.cancel_scope.cancel()

            for index, params in enumerate(asked):
                nursery.start_soon(one, index, params)
        if failed:
            raise failed[0]
        if gone.is_set():
            raise Cancelled("the client hung up")
        return [results[index] for index in range(len(asked))]

    async def _in_session(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        gone: trio.Event,
        on_wait: WaitSink | None,
    ) -> api.GenerateResult:
        """One answer, in the session of its conversation; one that did not end well frees that."""
        name = self._kept.take(params)
        if name is None:
            return await self._answer(params, on_delta, gone, on_wait)
        over = [name]
        try:
            named = msgspec.structs.replace(params, session=name)
            result = await self._answer(named, on_delta, gone, on_wait)
            if not gone.is_set():
                over = self._kept.keep(name, params)
            return result
        finally:
            with trio.CancelScope(shield=True):
                for each in over:
                    with suppress(BadRequest):  # it was never begun, or is gone already
                        await self.service.cache_clear(api.CacheClearParams(session=each))

    async def _answer(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        gone: trio.Event,
        on_wait: WaitSink | None,
    ) -> api.GenerateResult:
        begun = False

        async def noted(text: str, token_ids: list[int], logprobs: list[api.TokenLogprobs]) -> None:
            nonlocal begun
            begun = True
            await on_delta(text, token_ids, logprobs)

        deadline = trio.current_time() + TURN_S
        self._counts.waiting += 1
        try:
            await self._turn(gone, deadline)
        finally:
            self._counts.waiting -= 1
        again_s = _AGAIN_S
        try:
            while True:
                try:
                    return await self._generate(params, noted, gone, on_wait)
                except NoRoomNow as error:
                    if begun or lacks_memory(error) or trio.current_time() >= deadline:
                        raise  # who lacks memory has waited for it already, as [limits] allows
                with trio.move_on_after(again_s):
                    await gone.wait()
                    raise Cancelled("the client hung up")
                again_s = min(again_s * 2, _MOST_AGAIN_S)
        finally:
            self._places.release()

    async def _turn(self, gone: trio.Event, deadline: float) -> None:
        """Waits for a place, and takes it."""
        got = False

        async def take() -> None:
            nonlocal got
            await self._places.acquire()
            got = True
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = deadline
            nursery.start_soon(take)
            await gone.wait()
            nursery.cancel_scope.cancel()
        if got and not gone.is_set():
            return
        if got:
            self._places.release()
        if gone.is_set():
            raise Cancelled("the client hung up")
        raise NoRoomNow(f"no place was free for {TURN_S:.0f} s; ask again later")

    async def _generate(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        gone: trio.Event,
        on_wait: WaitSink | None,
    ) -> api.GenerateResult:
        """One answer of the service, which has a while to end after `gone`."""
        result: api.GenerateResult | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await gone.wait()
                nursery.cancel_scope.deadline = trio.current_time() + CANCEL_GRACE_S

            nursery.start_soon(watch)
            failed: DgnError | None = None
            try:
                result = await self.service.generate(params, on_delta, gone, on_wait)
            except DgnError as error:
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        if result is None:
            raise Cancelled("the client hung up")
        return result
