"""A chat's connection to dgnd and the session there, which ends with the connection unless it has a name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import DgnError, NotFound


class Link:
    """Connected as long as dgnd is there; `client` connects anew after it was lost."""

    def __init__(self, connect: Callable[[], ControlClient], name: str | None) -> None:
        self._connect = connect
        self._tied = not name  #: dgnd forgets it with the connection, however this program ends
        self.session = name or f"chat-{os.getpid()}-{os.urandom(4).hex()}"
        self._client = self._open()

    def _open(self) -> ControlClient:
        client = self._connect()
        if self._tied:
            client.call("session.tie", api.SessionTieParams(session=self.session))
        return client

    def close(self) -> None:
        """Hangs up for good."""
        self._client.close()

    def lose(self) -> None:
        """dgnd is gone, or says nothing; another one may be there later."""
        self._client.close()

    def hang_up(self) -> None:
        """Ends and frees what dgnd was doing; the session goes over to a new connection first."""
        before = self._client
        try:
            with contextlib.suppress(DgnError):
                self._client = self._open()
        finally:
            before.close()

    def client(self) -> ControlClient:
        """The connection. Raises DgnError where there is no dgnd."""
        if self._client.fileno() < 0:
            self._client = self._open()
        return self._client

    def another(self) -> ControlClient:
        """One more connection, which has nothing to do with the session. Raises DgnError."""
        return self._connect()

    def forgotten(self) -> bool:
        """Whether dgnd has nothing of the session any more: it is another one, or was told to forget it."""
        return not self.token_ids()

    def token_ids(self) -> list[int] | None:
        """Those of the session; None where dgnd has none."""
        try:
            found: api.SessionTokens = self.client().call(
                "session.export", api.SessionParams(session=self.session)
            )
        except NotFound:
            return None
        return list(found.token_ids)

    def put(self, ids: Sequence[int], model: str | None) -> None:
        """The session holds these ids. Raises DgnError where the model can't take them."""
        if ids:
            params = api.SessionImportParams(session=self.session, token_ids=list(ids), model=model)
            self.client().call("session.import", params)
        else:
            with contextlib.suppress(NotFound):
                self.client().call("cache.clear", api.CacheClearParams(session=self.session))
