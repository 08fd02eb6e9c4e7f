"""What the control server asks of the daemon: one coroutine for each method of the API.

The server knows only this; who implements it knows nothing of JSON-RPC. `cancel` and `session.tie` are
missing on purpose: they concern one connection, so the server answers them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

from dgnd.control import api

if TYPE_CHECKING:
    import trio

#: Takes the text and token ids of one piece of an answer, and the probabilities that were asked for. Never
#: waits for the client: a client that does not read is dropped, which sets `cancelled` of its generations.
DeltaSink = Callable[[str, list[int], list[api.TokenLogprobs]], Awaitable[None]]

#: Told in words what an answer waits for. Never waits.
WaitSink = Callable[[str], None]


class ControlService(Protocol):
    """The daemon as its operator sees it. Every method raises DgnError for what the caller should know.

    Any other exception is answered as an internal error and logged. All may be called concurrently.
    """

    async def status(self) -> api.Status:
        """The node, its workers, sessions, and what is missing."""
        ...

    async def models_list(self) -> list[api.ModelInfo]:
        """The configured models."""
        ...

    async def backends_list(self) -> list[api.BackendInfo]:
        """The installed backends, each looked at in a child of its own."""
        ...

    async def map_show(self) -> api.MapView:
        """The BlocksMap, configured and live."""
        ...

    async def peers_list(self) -> api.PeerList:
        """Peers and the last refusals."""
        ...

    async def peers_connect(self, params: api.ConnectParams) -> api.PeerInfo:
        """Dials a multiaddress and lets that peer be used and served.

        Cancelled by the trio scope it runs in.
        """
        ...

    async def peers_disconnect(self, params: api.PeerParams) -> api.Done:
        """Closes the connection to a peer and does not dial it again."""
        ...

    async def generate(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        cancelled: trio.Event,
        on_wait: WaitSink | None = None,
    ) -> api.GenerateResult:
        """Generates, giving each piece to `on_delta` before returning the whole. `on_wait` is told what it
        waits for, in words.

        `cancelled` is set by `cancel` and by a hang-up. Then it should stop within one token, free what the
        session uses elsewhere, and return what it has with finish_reason `cancelled` (or raise Cancelled when
        it has nothing). If it does not return within `server.CANCEL_GRACE_S`, or when the daemon ends, the
        trio scope it runs in is cancelled.
        """
        ...

    async def tokenize(self, params: api.TokenizeParams) -> api.TokenizeResult:
        """Text to token ids."""
        ...

    async def session_export(self, params: api.SessionParams) -> api.SessionTokens:
        """The token ids of a session."""
        ...

    async def session_import(self, params: api.SessionImportParams) -> api.Done:
        """Gives a session its token ids."""
        ...

    async def cache_list(self) -> list[api.CacheEntry]:
        """Sessions with KV on this node."""
        ...

    async def cache_clear(self, params: api.CacheClearParams) -> api.CacheClearResult:
        """Forgets one session, or all of this node's own."""
        ...

    async def logs(self, params: api.LogsParams) -> api.LogPage:
        """Of the last lines that were logged, those asked for."""
        ...

    async def drain(self, params: api.DrainParams) -> api.Drained:
        """Has sessions handed over, beginning nothing new, and returns when that is done; or undoes it."""
        ...

    async def pause(self, params: api.PauseParams) -> api.Paused:
        """Ends all computing, and returns when it has ended."""
        ...

    async def resume(self) -> api.Resumed:
        """Ends a pause."""
        ...

    async def reload(self) -> api.Reloaded:
        """Takes the configuration as it is now in its file."""
        ...

    async def shutdown(self) -> api.Done:
        """Begins to stop the daemon; returns before it ends, so that the caller gets its answer."""
        ...


#: The attribute of ControlService for each method of the API.
SERVICE_METHODS: Final[dict[str, str]] = {
    method: method.replace(".", "_") for method in api.METHODS if method not in ("cancel", "session.tie")
}


async def call(service: ControlService, method: str, params: api.Params) -> object:
    """Carries out any method but those and `generate`."""
    function = getattr(service, SERVICE_METHODS[method])
    if isinstance(params, api.NoParams):
        return await function()
    return await function(params)
