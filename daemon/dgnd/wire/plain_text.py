"""What peers say in words, made fit for logs and terminals where it comes in: one printable line, and not a
long one. Knows nothing of what the words are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from dgn_backends.errors import DataValue
from dgnd.errors import one_line
from dgnd.wire.messages import AnyMessage, CloseHop, Failure, Goodbye, Hello, ModelOffer, Offers

#: Characters of a name, of why a node is away, and of anything else that is said.
NAME, AWAY, TEXT = 64, 100, 1000


def line(text: str, most: int = TEXT) -> str:
    """`text` as one printable line of at most `most` characters."""
    if len(text) > most:
        text = f"{text[: most - 1]}…"
    return text if text.isprintable() else one_line(text)


def in_plain_words(message: AnyMessage) -> AnyMessage:
    """The message, with every text that is to be read by people as `line` makes it."""
    change = _CHANGES.get(type(message))
    return message if change is None else msgspec.structs.replace(message, **change(message))


def _hello(hello: Hello) -> dict[str, Any]:
    words = {"name": line(hello.name, NAME), "software": line(hello.software, NAME)}
    words["away"] = line(hello.away, AWAY)
    return {**words, "offers": _offers(hello.offers)}


def _offers(offers: tuple[ModelOffer, ...]) -> tuple[ModelOffer, ...]:
    """Spans are only made printable: a long one may be good, and is not when it is cut."""
    return tuple(
        msgspec.structs.replace(
            offer,
            model=line(offer.model),
            spans=tuple(
                msgspec.structs.replace(
                    item,
                    span=line(item.span, len(item.span)),
                    numerics=line(item.numerics),
                    dtype=line(item.dtype, NAME),
                    quant=line(item.quant, NAME),
                )
                for item in offer.spans
            ),
        )
        for offer in offers
    )


def _data(value: DataValue) -> DataValue:
    if isinstance(value, list):
        return [line(item) if isinstance(item, str) else item for item in value]
    return line(value) if isinstance(value, str) else value


_CHANGES: dict[type[object], Callable[[Any], dict[str, Any]]] = {
    Hello: _hello,
    Offers: lambda said: {"offers": _offers(said.offers), "away": line(said.away, AWAY)},
    Goodbye: lambda said: {"reason": line(said.reason)},
    CloseHop: lambda said: {"reason": line(said.reason)},
    Failure: lambda said: {
        "message": line(said.message),
        "data": {line(key, NAME): _data(value) for key, value in said.data.items()},
    },
}
