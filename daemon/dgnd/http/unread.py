"""A request's body that nobody read: thrown away before the response, else the connection ends with it.

Hypercorn closes a connection after a response to a request that has not come whole. A client that was
not told so sends its next request there, and gets nothing (RFC 9112, section 9.3). Knows nothing of what is
asked.
"""

from __future__ import annotations

from typing import Final

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: How much of a body is thrown away so that the connection can be kept, and how long that may take.
MOST_BYTES: Final = 64 << 20
PATIENCE_S: Final = 2.0


class WholeRequests:
    """An application whose responses begin when their requests have come whole, or say that they close."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive)

        async def send_after_it(message: Message) -> None:
            begins = message["type"] == "http.response.start"
            if begins and not await body.whole() and scope["http_version"].startswith("1"):
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, body.receive, send_after_it)


class _Body:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = self._ended or not message.get("more_body", False)  # also where the client has gone
        return message

    async def whole(self) -> bool:
        """Whether it has come whole; what has not been read of it is thrown away."""
        thrown = 0
        with trio.move_on_after(PATIENCE_S):
            while not self._ended and thrown < MOST_BYTES:
                thrown += len((await self.receive()).get("body", b""))
        return self._ended
