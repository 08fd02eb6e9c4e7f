"""TCP ports that pass bytes on after a fixed time, or no more than so many in a second, so that loopback is a
longer or a narrower way. Knows no protocol."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from types import TracebackType

import trio

_READ_BYTES = 1 << 16
#: What a narrow way holds, in each of its buffers.
_NARROW_BYTES = 1 << 15


class DelayedPorts:
    """A thread that forwards; a context manager. `one_way_s`: how long each byte is on its way;
    `bytes_per_s`: how many go each way, None for any; others wait at the sender, but for _NARROW_BYTES."""

    def __init__(self, one_way_s: float, bytes_per_s: float | None = None) -> None:
        self._one_way_s = one_way_s
        self._bytes_per_s = bytes_per_s
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)

    def __enter__(self) -> DelayedPorts:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._nursery is not None
        assert self._token is not None
        trio.from_thread.run_sync(self._nursery.cancel_scope.cancel, trio_token=self._token)
        self._thread.join()

    def to(self, port: int) -> int:
        """A port of loopback behind which is `port`, further away."""
        assert self._token is not None
        found: int = trio.from_thread.run(self._listen, port, trio_token=self._token)
        return found

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery, self._token = nursery, trio.lowlevel.current_trio_token()
            self._ready.set()
            await trio.sleep_forever()

    async def _listen(self, port: int) -> int:
        assert self._nursery is not None
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self._narrow(listener.socket)

        async def accepted(near: trio.SocketStream) -> None:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                far = await trio.open_tcp_stream("127.0.0.1", port)
                self._narrow(far.socket)
                async with near, far, trio.open_nursery() as ways:
                    ways.start_soon(self._carry, near, far)
                    ways.start_soon(self._carry, far, near)

        await self._nursery.start(trio.serve_listeners, accepted, [listener])
        found: int = listener.socket.getsockname()[1]
        return found

    def _narrow(self, sock: trio.socket.SocketType) -> None:
        if self._bytes_per_s is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NARROW_BYTES)

    async def _carry(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        under_way = deque[tuple[float, bytes]]()
        come, ended = trio.Event(), False

        async def read() -> None:
            nonlocal come, ended
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                most = _READ_BYTES if self._bytes_per_s is None else _NARROW_BYTES
                while data := await source.receive_some(most):
                    under_way.append((trio.current_time() + self._one_way_s, bytes(data)))
                    come.set()
                    if self._bytes_per_s is not None:
                        await trio.sleep(len(data) / self._bytes_per_s)
            ended = True
            come.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while not ended or under_way:
                    if not under_way:
                        come = trio.Event()
                        await come.wait()
                        continue
                    when, data = under_way.popleft()
                    await trio.sleep_until(when)
                    await target.send_all(data)
                await target.send_eof()
            nursery.cancel_scope.cancel()
