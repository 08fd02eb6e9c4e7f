"""A small daemon for tests of the control plane: the real server, and a service that answers from its prompt.

Words of the prompt come back as tokens; the first word may ask for trouble (see `EchoService.generate`). As a
program (`python echo_service.py SOCKET`) it serves until it is killed; `EchoDaemon` serves from a thread.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import trio

from dgnd.control import api
from dgnd.control.server import serve_control
from dgnd.control.service import DeltaSink, WaitSink
from dgnd.errors import BlocksMissing, NotFound, PeerRefused, WorkerDied

PEER = "12D3KooWA1b2c3d4e5f6g7h8i9jAkBmCnDoEpFqGrHsJtKuLvMwX"
ROUTE = [api.RouteHop(PEER, "desk", "embed,0-3"), api.RouteHop(PEER[:-1] + "Y", "attic", "4-7,head")]
FIGURES = api.Figures("embed,0-3", 12.34, 0.123, 1.5, 4096)
TIMINGS = api.Timings(0.1, 0.2, 0.15)
TOKEN_S = 0.02
LONG = 500
#: Of a kilobyte each: more than a client that does not read is given.
FLOOD_WORDS = 10_000


class EchoService:
    """Implements ControlService; what happened is in its public attributes."""

    def __init__(self) -> None:
        self.sessions: dict[str, list[int]] = {}
        self.seen: list[api.GenerateParams] = []
        self.words = 0  #: given by all generations
        self.cancelled: list[int] = []  #: tokens given by each generation that was cancelled
        self.connecting = False  #: an address is being dialled that never answers
        self.cut: list[str] = []  #: methods whose scope was cancelled
        self.stop = trio.Event()

    async def status(self) -> api.Status:
        worker = api.WorkerStatus("tiny", "embed,0-3", 4711, "ready", "reference", 123456789, 4096)
        session = api.SessionStatus("s1", "tiny", PEER, 42, 0, ROUTE)
        missing = {"tiny": "4-7,head"}
        speeds = [api.NodeFigures("tiny", PEER, "desk", 1.25, [FIGURES])]
        return api.Status(
            "0.1.0",
            4710,
            PEER,
            "desk",
            "degraded",
            [worker],
            missing,
            [session],
            ["tiny: unverified"],
            speeds=speeds,
        )

    async def models_list(self) -> list[api.ModelInfo]:
        return [
            api.ModelInfo(
                "tiny", "/m/tiny", "reference", "cpu", "f32", 8, 512, "embed,0-3", "4-7", False, "chatml"
            )
        ]

    async def backends_list(self) -> list[api.BackendInfo]:
        reason = (
            "importing it raised OSError: no libgpu.so in /usr/lib or /usr/local/lib; reinstall or update it"
        )
        return [
            api.BackendInfo("gpu", "their-plugin", "1.5", "broken", [], reason),
            api.BackendInfo("onnx", "distributed-gpt-node", "0.1.0", "usable", ["cpu"], "", True),
        ]

    async def map_show(self) -> api.MapView:
        rows = [api.MapRow("tiny", PEER, "desk", "embed,0-3", "embed,0-3", "ready", figures=[FIGURES])]
        return api.MapView(
            [*rows, api.MapRow("tiny", PEER, "attic", "4-7,head", "", "unreachable")], {"tiny": "4-7"}
        )

    async def peers_list(self) -> api.PeerList:
        offer = api.PeerOffer("tiny", "4-7,head", "f32/reference", [FIGURES])
        addrs, trips = ["/ip4/10.0.0.2/tcp/4001"], {"desk": 1.25, "hall": 130.2}
        peer = api.PeerInfo(PEER, "attic", "connected", addrs, 1.25, [offer], trips=trips)
        refused = api.Refusal(
            PEER, "/ip4/10.0.0.9/tcp/5", "2025-01-02T03:04:05Z", "not in [peers]", "[peers.x]\nid = 1"
        )
        return api.PeerList([peer], [refused], ["/ip4/10.0.0.1/tcp/4001/p2p/" + PEER])

    async def peers_connect(self, params: api.ConnectParams) -> api.PeerInfo:
        if "10.0.0.99" in params.addr:
            raise PeerRefused("attic closed the connection: it probably doesn't list this node")
        if "10.0.0.98" in params.addr:
            self.connecting = True
            try:
                await trio.sleep_forever()
            finally:
                self.cut.append("peers.connect")
        offer = api.PeerOffer("tiny", "4-7,head", "f32/reference")
        return api.PeerInfo(PEER, "attic", "connected", [params.addr], 2.5, [offer])

    async def peers_disconnect(self, params: api.PeerParams) -> api.Done:
        if params.peer != "attic":
            raise NotFound(f"no peer {params.peer!r}", peer=params.peer)
        return api.Done()

    async def generate(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        cancelled: trio.Event,
        on_wait: WaitSink | None = None,
    ) -> api.GenerateResult:
        """The words of the prompt; `slow` is many tokens, one each 20 ms; others see below."""
        self.seen.append(params)
        words = (params.prompt or "").split()
        context = self.sessions.setdefault(params.session, []) if params.session else []
        prompt_ids = [*context, *range(100, 100 + len(words))]
        context[:] = prompt_ids
        reason: api.FinishReason = "stop"
        match words[:1]:
            case ["slow"]:
                words = [f"w{i}" for i in range(LONG)]
            case ["missing"]:
                raise BlocksMissing("tiny: nobody serves blocks 4-7", missing="4-7")
            case ["died"]:
                await on_delta("half ", [1], [])
                raise WorkerDied("the worker of tiny died (signal 9); it is restarted")
            case ["lost"]:
                await on_delta("half ", [1], [])
                raise BlocksMissing("tiny: nobody serves blocks 4-7 within 10 s", missing="4-7")
            case ["crash"]:
                raise ValueError("secret detail")
            case ["group"]:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._fail)
                    await trio.sleep_forever()
            case ["silent"]:
                await cancelled.wait()
                self.cancelled.append(0)
            case ["flood"]:
                words = ["x" * 1024] * FLOOD_WORDS
            case ["waits"]:
                assert on_wait is not None
                for ahead in (1, 1, 0):
                    on_wait(f"waiting for memory: {ahead} ahead")
            case ["full"]:
                reason = "length"
            case ["escape"]:
                words = ["a\x1b[31mred\x07"]
        ids: list[int] = []
        said = ""
        pause = TOKEN_S if len(words) == LONG else 0.0
        for number, word in enumerate(words):
            if cancelled.is_set():
                reason = "cancelled"
                self.cancelled.append(len(ids))
                break
            ids.append(1000 + number)
            said += word + " "
            self.words += 1
            await on_delta(word + " ", [1000 + number], [])
            with trio.move_on_after(pause):
                await cancelled.wait()
        context.extend(ids)
        usage = api.Usage(len(prompt_ids), len(ids))
        return api.GenerateResult(said, ids, prompt_ids, reason, True, usage, TIMINGS, ROUTE)

    async def _fail(self) -> None:
        raise BlocksMissing("tiny: nobody serves blocks 4-7", missing="4-7")

    async def tokenize(self, params: api.TokenizeParams) -> api.TokenizeResult:
        return api.TokenizeResult([ord(char) for char in params.text], list(params.text))

    async def session_export(self, params: api.SessionParams) -> api.SessionTokens:
        if params.session not in self.sessions:
            raise NotFound(f"no session {params.session!r}")
        return api.SessionTokens(params.session, "tiny", self.sessions[params.session])

    async def session_import(self, params: api.SessionImportParams) -> api.Done:
        self.sessions[params.session] = list(params.token_ids)
        return api.Done()

    async def cache_list(self) -> list[api.CacheEntry]:
        return [
            api.CacheEntry(name, "tiny", PEER, "origin", len(ids), 64, 1.5)
            for name, ids in self.sessions.items()
        ]

    async def cache_clear(self, params: api.CacheClearParams) -> api.CacheClearResult:
        if params.session is None:
            cleared = len(self.sessions)
            self.sessions.clear()
            return api.CacheClearResult(cleared)
        if self.sessions.pop(params.session, None) is None:
            raise NotFound(f"no session {params.session!r}")
        return api.CacheClearResult(1)

    async def logs(self, params: api.LogsParams) -> api.LogPage:
        line = api.LogLine(1, 0.0, "info", "dgnd", "something", generation="g")
        return api.LogPage([line] if params.generation in (None, "g") else [], after=1)

    async def drain(self, params: api.DrainParams) -> api.Drained:
        return api.Drained("ready", 0, 0) if params.undo else api.Drained("drained", 2, 1)

    async def pause(self, params: api.PauseParams) -> api.Paused:
        end = "" if params.seconds is None else f" for {params.seconds:g} s"
        return api.Paused("paused", f"it is paused by its user{end}", left=1, closed=0)

    async def resume(self) -> api.Resumed:
        return api.Resumed("loading", was_paused=True)

    async def reload(self) -> api.Reloaded:
        return api.Reloaded(["new peer attic"], ["node.listen"])

    async def shutdown(self) -> api.Done:
        self.stop.set()
        return api.Done()


async def _serve(path: Path, service: EchoService, ready: threading.Event, scope: trio.CancelScope) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, path, service)
            ready.set()
            await service.stop.wait()
            nursery.cancel_scope.cancel()


class EchoDaemon:
    """An EchoService on a socket, served from a thread while the context lasts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.service = EchoService()
        self._ready = threading.Event()
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._main)
        self._token: trio.lowlevel.TrioToken | None = None
        self.error: BaseException | None = None

    def _main(self) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            await _serve(self.path, self.service, self._ready, self._scope)

        try:
            trio.run(main)
        except BaseException as error:  # noqa: BLE001 - shown by the thread that uses it
            self.error = error
        finally:
            self._ready.set()

    def __enter__(self) -> EchoDaemon:
        self._thread.start()
        assert self._ready.wait(10)
        assert self.error is None, self.error
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive() and self._token is not None:
            try:
                self._token.run_sync_soon(self._scope.cancel)
            except trio.RunFinishedError:
                pass
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert self.error is None, self.error


if __name__ == "__main__":
    trio.run(_serve, Path(sys.argv[1]), EchoService(), threading.Event(), trio.CancelScope())
