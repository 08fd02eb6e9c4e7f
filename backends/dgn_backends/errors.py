"""The root of every error that a user may see, and those of models and backends.

    DgnError
    ├── ModelError            a model directory that can't be used as it is
    ├── BackendError          the backend plugin failed or broke its contract
    │   ├── BackendUnavailable
    │   └── NonFiniteOutput
    └── LimitError            what was asked does not fit; the message has both numbers
        └── NoRoomNow         it would, if others did not hold the room now

The rest of the tree, in the daemon's own words, is in `dgnd.errors`. Knows nothing of transports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

#: What may stand in an error's `data`: JSON scalars and lists of them, so that it survives every transport.
DataValue = str | int | float | bool | None | list[str | int]


class DgnError(Exception):
    """Something went wrong; the message says what, where, and what to do."""

    kind: ClassVar[str] = "internal"  #: stable word for programs
    code: ClassVar[int] = -32000  #: JSON-RPC error code
    exit_code: ClassVar[int] = 1  #: of dgnctl and dgnd
    retryable: ClassVar[bool] = False  #: whether the same request may succeed later

    def __init__(self, message: str, /, **data: DataValue) -> None:
        super().__init__(message)
        self.message = message
        self.data: Mapping[str, DataValue] = data


class ModelError(DgnError):
    """The model directory can't be used: the message names the file and, where there is one, the tensor."""

    kind = "model"
    code = -32010
    exit_code = 2


class BackendError(DgnError):
    """The backend plugin failed or broke its contract."""

    kind = "backend"
    code = -32011


class BackendUnavailable(BackendError):
    """The backend is not installed, or this machine lacks what it needs."""

    kind = "backend_unavailable"
    exit_code = 2


class NonFiniteOutput(BackendError):
    """The backend returned NaN or infinity; nothing of it is passed on."""

    kind = "non_finite"


class LimitError(DgnError):
    """What was asked does not fit; the message has both numbers."""

    kind = "limit"
    code = -32012
    exit_code = 6


class NoRoomNow(LimitError):
    """What was asked fits, but others hold the room now; it comes back when they end."""

    kind = "no_room_now"
    code = -32015
    retryable = True
