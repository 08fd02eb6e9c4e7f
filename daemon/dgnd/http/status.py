"""The HTTP status of an error. Knows nothing of either API's form of it."""

from __future__ import annotations

from dgnd.errors import (
    BadRequest,
    Cancelled,
    DgnError,
    Inexact,
    LimitError,
    NoRoomNow,
    NotFound,
    NotReady,
    PeerError,
    WorkerDied,
)
from dgnd.http.bodies import BodyTooLarge


class Unauthorized(BadRequest):
    """No API key, or none that is known."""

    kind = "unauthorized"


class Forbidden(BadRequest):
    """A page of another site, or a name that is not this machine's."""

    kind = "forbidden"


class NoSuchPath(NotFound):
    """A path that there is not."""

    kind = "no_such_path"


#: The first class that an error is of decides.
_STATUS: tuple[tuple[type[DgnError], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (BodyTooLarge, 413),
    (NoRoomNow, 429),
    (NotFound, 404),
    (BadRequest, 400),
    (LimitError, 400),
    (Inexact, 409),
    (NotReady, 503),
    (Cancelled, 503),
    (WorkerDied, 503),
    (PeerError, 503),
)
RETRY_AFTER_S = 2
MAX_MESSAGE = 2000  #: characters of an error that are told: what was asked for may be in it, of any length


def status_of(error: DgnError) -> int:
    """Its HTTP status: 500 for a fault of dgnd, of a backend, of a model's files."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def headers_of(status: int) -> dict[str, str]:
    """What a response of that status has beside its body."""
    if status in (429, 503):
        return {"retry-after": str(RETRY_AFTER_S)}
    return {"www-authenticate": "Bearer"} if status == 401 else {}
