"""What each kind of message may say, and what its tensor must be for it; see `dgnd.wire.limits`.

Knows nothing of bytes on a wire, of sessions or of who sent what.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import numpy as np

from dgn_backends.tensor import WIRE_DTYPES, WireDType, tensor_bytes
from dgnd.errors import ProtocolError
from dgnd.wire import q8
from dgnd.wire.limits import DEFAULT_LIMITS, Limits, check_fields, tag_of
from dgnd.wire.messages import (
    AnyMessage,
    Frame,
    Hello,
    History,
    ModelOffer,
    Offers,
    OpenHop,
    Replay,
    Sampling,
    StepFrame,
    TokenFrame,
)

SIGNATURE_BYTES = 64
#: Of what nodes say of times, in ms, and of sessions at work; and for how many links they say it.
FIGURE_MS_MAX, QUEUE_MAX, TRIPS_MAX = 3.6e6, 1e4, 64
#: Of what one node offers: spans of a model, spans of all, and characters of a span, which is contiguous. All
#: of it is read, and weighed whenever a route is looked for.
SPANS_MAX, ALL_SPANS_MAX, SPAN_TEXT = 64, 1024, 64
_PENALTY = 100.0
#: Of a token, the likeliest ones whose probabilities are told.
LOGPROBS_MAX = 20


def check_shape(
    message: AnyMessage,
    dtype: str,
    shape: tuple[int, ...],
    payload_len: int,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Refuses a tensor whose dtype is unknown or whose shape does not have `payload_len` bytes.

    Raises ProtocolError.
    """
    if dtype not in WIRE_DTYPES:
        raise _refusal(message, f"unknown dtype {dtype[:16]!r}; known: {', '.join(WIRE_DTYPES)}")
    if len(shape) > limits.rank:
        raise _refusal(message, f"a tensor of rank {len(shape)}; at most {limits.rank}")
    for dim in shape:
        if not 0 <= dim <= limits.dim:
            raise _refusal(message, f"a tensor dimension of {dim}; 0 to {limits.dim}")
    if dtype == "q8" and len(shape) != 2:
        raise _refusal(message, f"q8 is of hidden states [n, h], not of {list(shape)}")
    expected = tensor_bytes(cast(WireDType, dtype), shape)
    if expected != payload_len:
        raise _refusal(message, f"{dtype}{list(shape)} has {expected} bytes, the payload has {payload_len}")


def check_message(
    message: AnyMessage, dtype: str | None, shape: tuple[int, ...], limits: Limits = DEFAULT_LIMITS
) -> None:
    """Refuses what no sender may say: fields out of range, a payload missing, superfluous or of another kind.

    `dtype` and `shape` are the payload's; dtype None: it has none. Raises ProtocolError naming message and
    field.
    """
    tag = tag_of(message)
    if isinstance(message, Hello | Offers):
        _check_offers(message.offers, tag)  # first: it bounds what there is to check
    check_fields(message, tag, limits)
    match message:
        case StepFrame():
            _check_step(message, dtype, shape, limits)
            return
        case History():
            if dtype != "i32" or len(shape) != 1:
                raise ProtocolError(f"history: the payload is i32 [n], not {dtype}{list(shape)}")
            if message.start + shape[0] > limits.position:
                raise ProtocolError(f"history: ends at {message.start + shape[0]}; at most {limits.position}")
            return
        case Replay():
            if not 1 <= message.stop - message.start <= limits.step_positions:
                raise ProtocolError(
                    f"replay: {message.start}-{message.stop} are not 1 to {limits.step_positions} positions"
                )
        case OpenHop():
            if len(message.signature) != SIGNATURE_BYTES:
                raise ProtocolError(
                    f"open: a signature of {len(message.signature)} bytes, not {SIGNATURE_BYTES}"
                )
        case TokenFrame(logprobs=told) if told is not None and not 1 <= len(told) <= LOGPROBS_MAX + 1:
            raise ProtocolError(f"token.logprobs: {len(told)} entries are not 1 to {LOGPROBS_MAX + 1}")
        case Hello() if not message.versions:
            raise ProtocolError("hello: no protocol version")
        case Hello() | Offers():
            _check_figures(message, tag)
        case _:
            pass
    if dtype is not None:
        raise ProtocolError(f"{tag}: has a payload and may not have one")


def check_values(frame: Frame) -> None:
    """Refuses token ids below 0, and scales of q8 that would not give finite numbers. Raises
    ProtocolError."""
    payload = frame.payload
    if payload is not None and payload.dtype == "q8":
        try:
            q8.check(payload)
        except ValueError as error:
            raise ProtocolError(f"{tag_of(frame.message)}: {error}") from None
    if payload is not None and payload.dtype == "i32" and (size := len(payload.data)):
        if size == 4:  # a decode step; numpy takes longer for one number
            lowest = int.from_bytes(payload.data, "little", signed=True)
        else:
            lowest = int(np.frombuffer(payload.data, dtype="<i4").min())
        if lowest < 0:
            raise ProtocolError(f"{tag_of(frame.message)}: a token id of {lowest}")


def validate(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> None:
    """All checks of a whole frame. Raises ProtocolError."""
    payload = frame.payload
    if payload is None:
        check_message(frame.message, None, (), limits)
        return
    check_shape(frame.message, payload.dtype, payload.shape, len(payload.data), limits)
    check_message(frame.message, payload.dtype, payload.shape, limits)
    check_values(frame)


@lru_cache(maxsize=256)  # the same value comes with every token of an answer
def check_sampling(sampling: Sampling) -> None:
    """Refuses settings outside what the sampler defines. Raises ProtocolError."""
    s = sampling
    ranges = (
        ("temperature", s.temperature, 0.0, _PENALTY),
        ("top_p", s.top_p, 0.0, 1.0),
        ("min_p", s.min_p, 0.0, 1.0),
        ("repetition_penalty", s.repetition_penalty, 0.0, _PENALTY),
        ("presence_penalty", s.presence_penalty, -_PENALTY, _PENALTY),
        ("frequency_penalty", s.frequency_penalty, -_PENALTY, _PENALTY),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise ProtocolError(f"step.sample.{name}: {value} is not within {low:g} to {high:g}")
    if s.logprobs is not None and not 0 <= s.logprobs <= LOGPROBS_MAX:
        raise ProtocolError(f"step.sample.logprobs: {s.logprobs} is not within 0 to {LOGPROBS_MAX}")
    if s.top_p == 0.0 or s.repetition_penalty == 0.0:
        raise ProtocolError("step.sample: top_p and repetition_penalty are above 0")


def _check_offers(offers: tuple[ModelOffer, ...], tag: str) -> None:
    seen: set[str] = set()
    for offer in offers:
        model = repr(offer.model[:64])
        if not offer.n_blocks:
            raise ProtocolError(f"{tag}: model {model} of 0 blocks")
        if offer.model in seen:
            raise ProtocolError(f"{tag}: two offers of model {model}")
        seen.add(offer.model)
        if len(offer.spans) > SPANS_MAX:
            raise ProtocolError(f"{tag}: {len(offer.spans)} spans of model {model}; at most {SPANS_MAX}")
        longest = max((len(item.span) for item in offer.spans), default=0)
        if longest > SPAN_TEXT:
            raise ProtocolError(f"{tag}: a span of {longest} characters; at most {SPAN_TEXT}")
    spans = sum(len(offer.spans) for offer in offers)
    if spans > ALL_SPANS_MAX:
        raise ProtocolError(f"{tag}: {spans} spans; at most {ALL_SPANS_MAX}")


def _check_figures(message: Hello | Offers, tag: str) -> None:
    if len(message.trips) > TRIPS_MAX:
        raise ProtocolError(f"{tag}.trips: {len(message.trips)} entries; at most {TRIPS_MAX}")
    figures = [("trips", ms, FIGURE_MS_MAX) for ms in message.trips.values()]
    for offer in message.offers:
        for span in offer.spans:
            figures.append(("step_ms", span.step_ms or 0.0, FIGURE_MS_MAX))
            figures.append(("prefill_ms", span.prefill_ms or 0.0, FIGURE_MS_MAX))
            figures.append(("queue", span.queue, QUEUE_MAX))
    for name, value, high in figures:
        if not 0.0 <= value <= high:
            raise ProtocolError(f"{tag}: {name} of {value} is not within 0 to {high:g}")


def _check_step(step: StepFrame, dtype: str | None, shape: tuple[int, ...], limits: Limits) -> None:
    if not 1 <= step.count <= limits.step_positions:
        raise ProtocolError(f"step: {step.count} positions; 1 to {limits.step_positions}")
    if step.stop > limits.position:
        raise ProtocolError(f"step: ends at position {step.stop}; at most {limits.position}")
    if step.truncate_to is not None and step.truncate_to > step.start:
        raise ProtocolError(f"step: truncate_to {step.truncate_to} is beyond its start {step.start}")
    if step.sample is not None:
        check_sampling(step.sample)
    elif step.allowed is not None:
        raise ProtocolError("step: it says which tokens are allowed, and asks for none")
    if dtype is None:
        raise ProtocolError("step: has no payload")
    if len(shape) != (1 if dtype == "i32" else 2):
        raise ProtocolError(f"step: the payload is i32 [n] or hidden states [n, h], not {dtype}{list(shape)}")
    if shape[0] != step.count:
        raise ProtocolError(f"step: {step.count} positions, but a payload of {shape[0]} rows")
    if shape[-1] == 0:
        raise ProtocolError("step: hidden states of size 0")


def _refusal(message: AnyMessage, what: str) -> ProtocolError:
    return ProtocolError(f"{tag_of(message)}: {what}")
