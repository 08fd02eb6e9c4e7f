"""A request's body as its type, and what is said of one that is not of it."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from dgnd.errors import BadRequest

T = TypeVar("T")

_PLACE = re.compile(r"(?s)(.*) - at `\$\.?(.*)`")
_MISSING = re.compile(r"Object missing required field `(\w+)`.*", re.S)


def read_body(body: bytes, kind: type[T]) -> T:
    """A request's body as its type. Raises BadRequest that names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        place = _PLACE.fullmatch(str(error))
        what, where = (place[1], place[2]) if place else (str(error), "")
        missing = _MISSING.fullmatch(what)
        if missing is not None:
            where = f"{where}.{missing[1]}" if where else missing[1]
            what = "it is required"
        raise BadRequest(
            f"{where}: {what}" if where else f"the request: {what}", setting=where or None
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request's body is no JSON: {error}") from None
