"""One HTTP request as a handler sees it: the body in, a status and pieces out, whether the client is there.

Knows nothing of what is asked. All waiting for the client is bounded: one that neither sends nor reads is
given up.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio
from starlette.types import Receive, Scope, Send

from dgnd.errors import BadRequest
from dgnd.http.bodies import BodyRoom

BODY_S = 30.0  #: for a client to send its whole request
READ_S = 60.0  #: for a client to read a piece that no buffer takes any more


class Exchange:
    """One request and its response. `gone` is set when the client hung up."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, room: BodyRoom) -> None:
        self._scope, self._receive, self._send, self._room = scope, receive, send, room
        self._one_piece = trio.Lock()
        self.gone = trio.Event()
        self.started = False
        self.ended = False

    @property
    def path(self) -> Mapping[str, str]:
        """What the path's placeholders stand for."""
        found: Mapping[str, str] = self._scope.get("path_params", {})
        return found

    def header(self, name: str) -> str | None:
        """A header of the request, its last value."""
        wanted = name.lower().encode()
        values = [value for key, value in self._scope["headers"] if key == wanted]
        return values[-1].decode("latin-1") if values else None

    async def body(self) -> bytes:
        """The request's body. Raises BadRequest for one too long or too slow, NoRoomNow."""
        data = bytearray()
        with trio.move_on_after(BODY_S) as waiting:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self.gone.set()
                    raise BadRequest("the client hung up before its request was whole")
                piece = message.get("body", b"")
                self._room.take(len(piece), len(data))
                data += piece
                if not message.get("more_body", False):
                    return bytes(data)
        assert waiting.cancelled_caught
        raise BadRequest(f"the request's body did not come within {BODY_S:.0f} s")

    async def watch(self) -> None:
        """Sets `gone` when the client hangs up, and returns. Only after the body was read."""
        while not self.gone.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self.gone.set()

    async def whole(self, status: int, media_type: str, data: bytes, headers: Mapping[str, str]) -> None:
        """The response in one."""
        await self._start(status, {**headers, "content-length": str(len(data))}, media_type)
        await self._put(b"" if self._scope["method"] == "HEAD" else data, last=True)

    async def piece(self, media_type: str, data: bytes) -> None:
        """A piece of a response that comes in pieces; the first one begins it."""
        async with self._one_piece:
            if not self.started:
                await self._start(200, {"cache-control": "no-cache"}, media_type)
            await self._put(data, last=False)

    async def end(self) -> None:
        """Ends a response that came in pieces."""
        async with self._one_piece:
            await self._put(b"", last=True)

    async def _start(self, status: int, headers: Mapping[str, str], media_type: str) -> None:
        self.started = True
        all_headers = {"content-type": media_type, **headers}
        encoded = [(key.encode(), value.encode("latin-1")) for key, value in all_headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _put(self, data: bytes, last: bool) -> None:
        if self.gone.is_set() or self.ended:
            return
        self.ended = last
        with trio.move_on_after(READ_S) as waiting:
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        if waiting.cancelled_caught:
            self.gone.set()
