"""What both APIs' handlers share: an endpoint around a handler, errors in the API's form, an answer that ends
when its client is gone.

An endpoint is an ASGI application, so that a stream and a watch on the client are two plain tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from dgnd.control import api
from dgnd.errors import DgnError, InternalError
from dgnd.http.bodies import BodyLedger
from dgnd.http.desk import Desk, Pieces
from dgnd.http.exchange import Exchange
from dgnd.http.guards import Guard
from dgnd.http.status import headers_of, status_of

log = logging.getLogger("dgnd.http")

JSON = "application/json"

Handler = Callable[[Exchange, Desk], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Form:
    """How an API tells of an error: the body of a response, and the end of a stream that had begun."""

    body: Callable[[DgnError], object]
    event: Callable[[DgnError], tuple[str, bytes]]  #: media type and piece


@dataclass(frozen=True, slots=True)
class House:
    """What all endpoints share."""

    desk: Desk
    guard: Guard
    bodies: BodyLedger


class Endpoint:
    """A handler as an ASGI application. `free`: whether it is answered without an API key."""

    def __init__(self, handler: Handler, house: House, form: Form, free: bool = False) -> None:
        self._handler, self._house, self._form, self._free = handler, house, form, free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        with self._house.bodies.room() as room:
            exchange = Exchange(scope, receive, send, room)
            try:
                self._house.guard.check(exchange, keyless=self._free)
                if self._free:
                    await self._handler(exchange, self._house.desk)
                else:
                    with self._house.desk.request():
                        await self._handler(exchange, self._house.desk)
            except DgnError as error:
                await self._fail(exchange, error)
            except Exception as error:  # one request must not end the daemon
                log.error("%s failed by a fault of dgnd", scope["path"], exc_info=error)
                what = f"a fault in dgnd ({type(error).__name__}); its log has the details"
                await self._fail(exchange, InternalError(what))

    async def _fail(self, exchange: Exchange, error: DgnError) -> None:
        if exchange.started:
            await exchange.piece(*self._form.event(error))
            await exchange.end()
            return
        status = status_of(error)
        body = msgspec.json.encode(self._form.body(error))
        await exchange.whole(status, JSON, body, headers_of(status))


async def answered(
    exchange: Exchange,
    desk: Desk,
    asked: Sequence[api.GenerateParams],
    pieces: Pieces | None = None,
    waits: Callable[[str], Awaitable[None]] | None = None,
) -> list[api.GenerateResult]:
    """The answers to all that is asked, as long as the client is there. `waits` is given what they wait for,
    in words; of what comes while it is at it only the first. Raises DgnError."""
    failed: DgnError | None = None
    results: list[api.GenerateResult] = []
    news, told = trio.open_memory_channel[str](1)

    def on_wait(words: str) -> None:
        with suppress(trio.WouldBlock):
            news.send_nowait(words)

    async def tell() -> None:
        async for words in told:
            with trio.CancelScope(shield=True):  # never half a piece; a client that does not read is given up
                await (waits or _nobody)(words)

    async with trio.open_nursery() as nursery, news, told:
        nursery.start_soon(exchange.watch)
        nursery.start_soon(tell)
        try:
            results = await desk.answers(asked, pieces or _no_pieces, exchange.gone, on_wait)
        except DgnError as error:
            failed = error
        nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return results


async def json_answer(exchange: Exchange, answer: object, status: int = 200) -> None:
    """A response of one JSON value."""
    await exchange.whole(status, JSON, msgspec.json.encode(answer), headers_of(status))


async def _nobody(_words: str) -> None:
    """For a client that can't be told."""


async def _no_pieces(_index: int, _text: str, _logprobs: list[api.TokenLogprobs]) -> None:
    """For an answer that is wanted in one."""
