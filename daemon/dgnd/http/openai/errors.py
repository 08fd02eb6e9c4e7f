"""Errors in OpenAI's form, and requests that are not of their types."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from dgnd.errors import BadRequest, ContextExceeded, DgnError, NotFound
from dgnd.http.openai.answers import ErrorAnswer, ErrorBody
from dgnd.http.status import NoSuchPath, status_of

T = TypeVar("T")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PLACE = re.compile(r"(?s)(.*) - at `\$\.?(.*)`")
_MISSING = re.compile(r"Object missing required field `(\w+)`.*", re.S)


def answer_of(error: DgnError) -> ErrorAnswer:
    """The body of a response that tells of an error."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    match error:
        case ContextExceeded():
            code: str = "context_length_exceeded"
        case NotFound() if not isinstance(error, NoSuchPath):
            code = "model_not_found"
        case _:
            code = error.kind
    setting = error.data.get("setting")
    param = setting if isinstance(setting, str) else None
    return ErrorAnswer(ErrorBody(error.message, kind, param, code))


def read_request(body: bytes, kind: type[T]) -> T:
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
