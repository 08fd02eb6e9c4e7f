"""What the types can't say of the parameters of `generate`.

Which exclude each other, and ranges. Knows no model.
"""

from __future__ import annotations

import math
from typing import Any, Final

from dgnd.control import api
from dgnd.errors import BadRequest

_BIG: Final = 2**63 - 1
MAX_SESSION_NAME: Final = 128
_RANGES: Final[tuple[tuple[str, float, float], ...]] = (
    ("max_tokens", 1, _BIG),
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 2**31 - 1),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-6, 1e6),
    ("presence_penalty", -1e6, 1e6),
    ("frequency_penalty", -1e6, 1e6),
    ("seed", 0, 2**64 - 1),
    ("logprobs", 0, 20),
    ("wait", 0.0, 86400.0),
)


def check_generate(params: api.GenerateParams) -> None:
    """What the types can't say of `generate`'s parameters, model-independent.

    Raises:
        BadRequest: naming the parameter and its range.
    """
    given = [name for name in ("prompt", "messages", "token_ids") if getattr(params, name) is not None]
    if params.resume and (given or params.session is None):
        raise BadRequest("resume goes on with an answer of a session: it takes a session, and nothing to say")
    if len(given) != 1 and not params.resume:
        raise BadRequest(
            f"generate takes exactly one of prompt, messages, token_ids; got {', '.join(given) or 'none'}"
        )
    for name, low, high in _RANGES:
        value: Any = getattr(params, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            between = f"between {_shown(low)} and {_shown(high)}"
            raise BadRequest(f"{name} is {_shown(value)}; it must be {between}")
    check_session(params.session)
    if params.tools and params.messages is None:
        raise BadRequest("tools are for a conversation in messages", setting="tools")
    if params.tools and params.json_schema is not None:
        raise BadRequest("tools and json_schema exclude each other", setting="tools")
    if any(not text for text in params.stop) or any(not ids for ids in params.stop_ids):
        raise BadRequest("stop and stop_ids must not hold an empty sequence")


def check_session(name: str | None) -> None:
    """Raises BadRequest for a session name that no ticket can carry."""
    if name is not None and not 1 <= len(name) <= MAX_SESSION_NAME:
        raise BadRequest(f"session has {len(name)} characters; its name must have 1 to {MAX_SESSION_NAME}")


def _shown(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
