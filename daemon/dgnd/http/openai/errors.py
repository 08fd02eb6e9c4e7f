"""Errors in OpenAI's form."""

from __future__ import annotations

from dgnd.errors import ContextExceeded, DgnError, NotFound
from dgnd.http.openai.answers import ErrorAnswer, ErrorBody
from dgnd.http.status import MAX_MESSAGE, NoSuchPath, status_of
from dgnd.words import shortened

#: Settings of the engine that OpenAI calls otherwise.
_PARAMS = {"json_schema": "response_format"}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


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
    param = _PARAMS.get(setting, setting) if isinstance(setting, str) else None
    return ErrorAnswer(ErrorBody(shortened(error.message, MAX_MESSAGE), kind, param, code))
