"""Frames: any split gives the same messages, any garbage a typed error, within bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgn_backends.errors import DataValue
from dgn_backends.tensor import DType, Tensor
from dgnd.errors import PositionGap, ProtocolError, UnknownMessage
from dgnd.wire import messages as m
from dgnd.wire.checks import LOGPROBS_MAX, validate
from dgnd.wire.codec import PROTOCOL_VERSIONS, encode, encode_bytes, failure_of, negotiate
from dgnd.wire.decoder import PEER, WORKER, FrameDecoder, MessageSet
from dgnd.wire.limits import DEFAULT_LIMITS, LARGE_HEADERS, POSITIONS, U64_FIELDS, Limits, tag_of
from dgnd.wire.messages import Frame

ALL_KINDS: tuple[Any, ...] = tuple(dict.fromkeys((*get_args(m.PeerMessage), *get_args(m.WorkerMessage))))
KEY = m.HopKey("12D3KooWorigin", "session", 3)
HIDDEN_DTYPES: list[DType] = ["f32", "bf16", "f16"]
TEXTS = st.text(max_size=20)


def _values(hint: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of a field by its type, within the limits."""
    if hint == DataValue:
        return (
            st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXTS | st.lists(TEXTS, max_size=3)
        )
    origin, args = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return st.one_of([_values(arg, name) for arg in args])
    if origin is tuple and args[1] is not Ellipsis:
        return st.tuples(*(_values(each, name) for each in args))
    if origin is tuple:
        apart = (lambda offer: offer.model) if args[0] is m.ModelOffer else None
        return st.lists(_values(args[0], name), min_size=1, max_size=3, unique_by=apart).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXTS, _values(args[1], name), max_size=3)
    if hint is types.NoneType:
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is int:
        if name == "logprobs":
            return st.integers(0, LOGPROBS_MAX)
        top = 2**31 - 1 if name in POSITIONS else 2**64 - 1 if name in U64_FIELDS else 2**63 - 1
        return st.integers(1, top)
    if hint is float:
        return st.floats(0.001, 1.0)
    if hint is bytes:
        return st.binary(min_size=64, max_size=64)
    if hint is str:
        return TEXTS
    return _structs(hint)


def _structs(kind: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: _values(hints[name], name) for name in kind.__struct_fields__})


def _ids(n: int) -> Tensor:
    return Tensor.from_numpy(np.arange(n, dtype="<i4"), "i32")


@st.composite
def _steps(draw: st.DrawFn) -> Frame:
    count = draw(st.integers(1, 9))
    start = draw(st.integers(0, 2**31 - 1 - count))
    base = draw(_structs(m.StepFrame))
    truncate_to = draw(st.none() | st.integers(0, start))
    step = msgspec.structs.replace(base, start=start, count=count, truncate_to=truncate_to)
    if step.sample is None:
        step = msgspec.structs.replace(step, allowed=None)
    if draw(st.booleans()):
        return Frame(step, _ids(count))
    dtype: DType = draw(st.sampled_from(HIDDEN_DTYPES))
    width = draw(st.integers(1, 5))
    size = count * width * (4 if dtype == "f32" else 2)
    return Frame(step, Tensor(dtype, (count, width), draw(st.binary(min_size=size, max_size=size))))


@st.composite
def _histories(draw: st.DrawFn) -> Frame:
    n = draw(st.integers(0, 9))
    return Frame(
        msgspec.structs.replace(draw(_structs(m.History)), start=draw(st.integers(0, 1000))), _ids(n)
    )


def _frames_of(kind: Any) -> st.SearchStrategy[Frame]:
    if kind is m.StepFrame:
        return _steps()
    if kind is m.History:
        return _histories()
    if kind is m.Replay:
        return st.integers(0, 1000).flatmap(
            lambda start: st.builds(
                lambda base, n: Frame(msgspec.structs.replace(base, start=start, stop=start + n)),
                _structs(m.Replay),
                st.integers(1, 4096),
            )
        )
    return _structs(kind).map(Frame)


PEER_FRAMES = st.one_of([_frames_of(kind) for kind in get_args(m.PeerMessage)])


def _same(a: Frame, b: Frame) -> bool:
    if a.message != b.message or (a.payload is None) != (b.payload is None):
        return False
    if a.payload is None or b.payload is None:
        return True
    return (a.payload.dtype, a.payload.shape, bytes(a.payload.data)) == (
        b.payload.dtype,
        b.payload.shape,
        bytes(b.payload.data),
    )


def _drain(decoder: FrameDecoder) -> Iterator[Frame]:
    while (frame := decoder.next_frame()) is not None:
        yield frame


def _set_of(kind: Any) -> MessageSet:
    return PEER if kind in get_args(m.PeerMessage) else WORKER


def _raw(message: Any, tensor: Any = None, payload: bytes = b"", extra: tuple[Any, ...] = ()) -> bytes:
    """A frame's bytes without any check."""
    header = msgspec.msgpack.encode((message, tensor, *extra))
    return struct.pack("<3sBII", b"dgn", 1, len(header), len(payload)) + header + payload


def _step(**changes: Any) -> m.StepFrame:
    values: dict[str, Any] = {
        "key": KEY, "branch": 0, "route": 0, "start": 0, "count": 2, "digest_start": 1, "digest_end": 2
    }  # fmt: skip
    return m.StepFrame(**{**values, **changes})


def _refusal(data: bytes, messages: MessageSet = PEER, limits: Limits | None = DEFAULT_LIMITS) -> str:
    """The one line of the ProtocolError that `data` gives; the decoder stays failed."""
    decoder = FrameDecoder(limits, messages)
    decoder.receive_data(data)
    with pytest.raises(ProtocolError) as caught:
        decoder.next_frame()
    assert not isinstance(caught.value, UnknownMessage)
    decoder.receive_data(encode_bytes(Frame(m.Ping(nonce=1))))
    with pytest.raises(ProtocolError) as again:
        decoder.next_frame()
    assert again.value.message == caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: str(kind.__struct_config__.tag))
def test_every_message_comes_back_as_it_was_sent(kind: Any) -> None:
    @settings(max_examples=40, deadline=None)
    @given(_frames_of(kind))
    def round_trip(frame: Frame) -> None:
        decoder = FrameDecoder(DEFAULT_LIMITS, _set_of(kind))
        decoder.receive_data(encode_bytes(frame))
        [back] = _drain(decoder)
        assert _same(frame, back)
        assert decoder.buffered == 0

    round_trip()


def test_memory_that_was_read_may_be_used_again() -> None:
    frames = [Frame(_step(start=2 * i), Tensor("f32", (2, 3), bytes(range(i, i + 24)))) for i in range(3)]
    stream = b"".join(map(encode_bytes, frames))
    memory = bytearray(len(stream) // 2)  # as a socket is read: into the same place each time
    decoder, found = FrameDecoder(DEFAULT_LIMITS, PEER), []
    for at in range(0, len(stream), len(memory)):
        size = len(stream[at : at + len(memory)])
        memory[:size] = stream[at : at + size]
        decoder.receive_data(memoryview(memory)[:size])
        found += _drain(decoder)
        memory[:] = bytes(len(memory))
    assert all(map(_same, frames, found))
    assert (len(found), decoder.buffered) == (3, 0)


def test_without_limits_only_the_form_is_checked() -> None:
    beyond = _step(start=DEFAULT_LIMITS.position + 1)
    data = _raw(beyond, ("i32", (2,)), bytes(8))
    assert "step.start" in _refusal(data, WORKER)
    decoder = FrameDecoder(None, WORKER)
    decoder.receive_data(data)
    [back] = _drain(decoder)
    assert back.message == beyond
    assert b"".join(encode(back, limits=None)) == data
    assert "not a frame" in _refusal(b"GET / HTTP/1.1", WORKER, None)
    assert "without dtype and shape" in _refusal(_raw(m.Ping(nonce=1), payload=data), WORKER, None)
    assert "the payload has 7" in _refusal(_raw(_step(), ("i32", (2,)), bytes(7)), WORKER, None)
    assert "unknown dtype" in _refusal(_raw(_step(), ("i64", (1,)), bytes(8)), WORKER, None)


@settings(max_examples=150, deadline=None)
@given(st.lists(PEER_FRAMES, min_size=1, max_size=5), st.data())
def test_any_split_of_the_bytes_gives_the_same_frames(frames: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(encode_bytes(frame) for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    found: list[Frame] = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.receive_data(stream[start:stop])
        if data.draw(st.booleans()):  # getting may also wait for more
            found += _drain(decoder)
    found += _drain(decoder)
    assert len(found) == len(frames)
    assert all(_same(a, b) for a, b in zip(frames, found, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(PEER_FRAMES, min_size=1, max_size=3))
def test_one_byte_at_a_time_gives_the_same_frames(frames: list[Frame]) -> None:
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    found: list[Frame] = []
    for byte in b"".join(encode_bytes(frame) for frame in frames):
        decoder.receive_data(bytes([byte]))
        found += _drain(decoder)
    assert all(_same(a, b) for a, b in zip(frames, found, strict=True))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=400), st.sampled_from(["raw", "framed", "message"]), st.sampled_from([PEER, WORKER])
)
def test_garbage_gives_a_protocol_error_or_nothing(data: bytes, how: str, messages: MessageSet) -> None:
    if how == "framed":
        data = struct.pack("<3sBII", b"dgn", 1, len(data), 0) + data
    elif how == "message":
        data = struct.pack("<3sBII", b"dgn", 1, len(data) + 1, 0) + b"\x92" + data
    _feed_anything(data, messages)


@settings(max_examples=500, deadline=None)
@given(PEER_FRAMES, st.data())
def test_a_mutated_frame_gives_a_valid_frame_or_a_protocol_error(frame: Frame, data: st.DataObject) -> None:
    stream = bytearray(encode_bytes(frame))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(stream) - 1))
        match data.draw(st.sampled_from(["flip", "drop", "repeat"])):
            case "flip":
                stream[at] = data.draw(st.integers(0, 255))
            case "drop" if len(stream) > 1:
                del stream[at]
            case _:
                stream[at:at] = stream[: data.draw(st.integers(0, 20))]
    _feed_anything(bytes(stream), PEER)


def _feed_anything(data: bytes, messages: MessageSet) -> None:
    """Whatever comes out was checked; whatever is refused is refused with the one type."""
    decoder = FrameDecoder(DEFAULT_LIMITS, messages)
    decoder.receive_data(data)
    refusals: list[ProtocolError] = []
    for _ in range(len(data) + 1):
        try:
            frame = decoder.next_frame()
        except ProtocolError as error:
            refusals.append(error)
            if isinstance(error, UnknownMessage):
                continue
            break
        if frame is None:
            break
        validate(frame)
    else:
        pytest.fail("more frames than bytes")
    assert all(error.message and "\n" not in error.message for error in refusals)
    assert all("tag" in error.data for error in refusals if isinstance(error, UnknownMessage))
    assert decoder.buffered <= len(data)


HOSTILE_HEADERS = {
    "a million-fold tuple that is not there": b"\x92\x82\xa1t\xa5hello\xa8versions\xdd\xff\xff\xff\xff",
    "a dict that is not there": b"\x92\x82\xa1t\xa8manifest\xa7tensors\xdf\xff\xff\xff\xff",
    "a text that is not there": b"\x92\x82\xa1t\xa3bye\xa6reason\xdb\xff\xff\xff\xff",
    "no UTF-8 in a text": b"\x92\x82\xa1t\xa3bye\xa6reason\xa2\xff\xff\xc0",
    "no UTF-8 in a tag": b"\x92\x81\xa1t\xa2\xff\xff\xc0",
    "deep nesting in an unknown field": b"\x92\x83\xa1t\xa4ping\xa5nonce\x01\xa1z"
    + b"\x91" * 60000
    + b"\xc0\xc0",
    "deep nesting before the message": b"\x91" * 60000 + b"\xc0",
    "no tag": b"\x92\x81\xa5nonce\x01\xc0",
    "a tag that is a number": b"\x92\x81\xa1t\x05\xc0",
    "bytes after the header": b"\x92\x82\xa1t\xa4ping\xa5nonce\x01\xc0\x00",
    "an extension type": b"\x92\x82\xa1t\xa4ping\xa5nonce\xd6\xff\x00\x00\x00\x00\xc0",
    "a header that is a number": b"\x01",
    "an empty array": b"\x90",
}


@pytest.mark.parametrize("what", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(what: str) -> None:
    header = HOSTILE_HEADERS[what]
    tracemalloc.start()
    try:
        _refusal(struct.pack("<3sBII", b"dgn", 1, len(header), 0) + header)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_wrong_beginning_is_refused_at_its_first_byte() -> None:
    assert "GET" in _refusal(b"GET / HTTP/1.1\r\n")
    assert _refusal(b"\x00")
    assert _refusal(b"dgn\x02")
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(b"dg")
    assert decoder.next_frame() is None


def test_lengths_beyond_the_limits_are_refused_by_the_prefix() -> None:
    assert "header of 0 bytes" in _refusal(struct.pack("<3sBII", b"dgn", 1, 0, 0))
    assert "4294967295" in _refusal(struct.pack("<3sBII", b"dgn", 1, 2**32 - 1, 0))
    assert "payload of 4294967295" in _refusal(struct.pack("<3sBII", b"dgn", 1, 10, 2**32 - 1))


def test_a_large_header_is_only_for_the_messages_that_need_it() -> None:
    big = b"x" * 100_000
    for kind in ("ping", "failure", "step", "open"):
        assert f"{kind}: a header of" in _refusal(_raw({"t": kind, "nonce": 1, "future": big}))
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(_raw({"t": "offers", "future": big}))
    [frame] = _drain(decoder)
    assert frame.message == m.Offers()
    assert PEER.tags > LARGE_HEADERS


def test_a_manifest_of_a_large_model_fits() -> None:
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": "sha256:" + "0" * 64 for i in range(1000)}
    manifest = m.Manifest(model="m", config_digest="c", tokenizer_digest=None, tensors=tensors, complete=True)
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(encode_bytes(Frame(manifest)))
    [frame] = _drain(decoder)
    assert frame.message == manifest
    many = msgspec.structs.replace(manifest, tensors={str(i): "" for i in range(8193)})
    assert "manifest.tensors: 8193 entries" in _refusal(_raw(many))


@pytest.mark.parametrize("messages", [PEER, WORKER], ids=["peer", "worker"])
@pytest.mark.parametrize("payload_len", [0, 1, 100_000])
def test_an_unknown_kind_is_told_and_the_connection_goes_on(messages: MessageSet, payload_len: int) -> None:
    ping = encode_bytes(Frame(m.Ping(nonce=7)))
    tensor = ["q8", [payload_len]] if payload_len else None
    stream = ping + _raw({"t": "step2", "x": {"y": [1]}}, tensor, bytes(payload_len)) + ping
    for size in (len(stream), 9999):
        decoder = FrameDecoder(DEFAULT_LIMITS, messages)
        seen: list[str] = []
        for at in range(0, len(stream), size):
            decoder.receive_data(stream[at : at + size])
            while True:
                try:
                    frame = decoder.next_frame()
                except UnknownMessage as error:
                    failure = failure_of(error, tag=str(error.data["tag"]))
                    assert (failure.kind, failure.tag) == ("unknown_message", "step2")
                    encode(Frame(failure))
                    seen.append("unknown")
                    continue
                if frame is None:
                    break
                seen.append(tag_of(frame.message))
            assert decoder.buffered <= len(stream)
        assert seen == ["ping", "unknown", "ping"]


def test_a_worker_message_from_a_peer_is_unknown() -> None:
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(encode_bytes(Frame(m.WorkerStats())))
    with pytest.raises(UnknownMessage) as caught:
        decoder.next_frame()
    assert caught.value.data["tag"] == "w.stats"
    assert decoder.next_frame() is None


def test_unknown_optional_fields_are_ignored() -> None:
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(_raw({"t": "ping", "nonce": 1, "colour": {"a": [1, None]}}, None, b"", ("more", 2)))
    [frame] = _drain(decoder)
    assert frame == Frame(m.Ping(nonce=1))


BAD_STEPS: dict[str, tuple[dict[str, Any], Any, int, str]] = {
    "count 0": ({"count": 0}, ["i32", [0]], 0, "0 positions"),
    "count huge": ({"count": 2**31 - 1}, ["i32", [2]], 8, "2147483647 positions"),
    "count not the rows": ({"count": 3}, ["i32", [2]], 8, "3 positions, but a payload of 2 rows"),
    "count negative": ({"count": -1}, ["i32", [2]], 8, "step.count"),
    "start negative": ({"start": -1}, ["i32", [2]], 8, "step.start"),
    "start beyond": ({"start": 2**31 - 2}, ["i32", [2]], 8, "ends at position 2147483648"),
    "start 64 bits": ({"start": 2**64 - 1}, ["i32", [2]], 8, "step.start"),
    "branch negative": ({"branch": -5}, ["i32", [2]], 8, "step.branch"),
    "digest negative": ({"digest_end": -1}, ["i32", [2]], 8, "step.digest_end"),
    "truncate_to beyond start": ({"truncate_to": 1}, ["i32", [2]], 8, "truncate_to 1"),
    "a number as a float": ({"start": 0.5}, ["i32", [2]], 8, "step: "),
    "no payload": ({}, None, 0, "has no payload"),
    "payload without shape": ({}, None, 8, "without dtype and shape"),
    "ids of rank 2": ({}, ["i32", [2, 1]], 8, "not i32[2, 1]"),
    "hidden of rank 1": ({}, ["f32", [2]], 8, "not f32[2]"),
    "hidden of rank 3": ({}, ["f32", [2, 1, 1]], 8, "not f32[2, 1, 1]"),
    "hidden of size 0": ({}, ["f32", [2, 0]], 0, "hidden states of size 0"),
    "too few bytes": ({}, ["i32", [2]], 7, "has 8 bytes, the payload has 7"),
    "too many bytes": ({}, ["bf16", [2, 4]], 17, "has 16 bytes, the payload has 17"),
    "unknown dtype": ({}, ["f64", [2, 1]], 16, "unknown dtype 'f64'"),
    "q8 of rank 1": ({}, ["q8", [2]], 8, "q8 is of hidden states [n, h], not of [2]"),
    "q8 with a byte too few": ({}, ["q8", [2, 65]], 2 * (65 + 8) - 1, "has 146 bytes, the payload has 145"),
    "q8 that overflows": ({}, ["q8", [2**20, 2**20]], 8, "has 1168231104512 bytes"),
    "q8 of size 0": ({}, ["q8", [2, 0]], 0, "hidden states of size 0"),
    "rank 5": ({}, ["f32", [2, 1, 1, 1, 1]], 8, "rank 5"),
    "dimension negative": ({}, ["f32", [-2, -1]], 8, "dimension of -2"),
    "dimensions that overflow": ({}, ["f32", [2**62, 4]], 8, "dimension of"),
    "shape of texts": ({}, ["f32", ["2"]], 8, "header can't be read"),
    "temperature nan": ({"sample": m.Sampling(temperature=float("nan"))}, ["i32", [2]], 8, "temperature"),
    "top_p 2": ({"sample": m.Sampling(top_p=2.0)}, ["i32", [2]], 8, "top_p"),
    "top_p 0": ({"sample": m.Sampling(top_p=0.0)}, ["i32", [2]], 8, "top_p"),
    "penalty inf": (
        {"sample": m.Sampling(presence_penalty=float("-inf"))},
        ["i32", [2]],
        8,
        "presence_penalty",
    ),
    "penalty 0": ({"sample": m.Sampling(repetition_penalty=0.0)}, ["i32", [2]], 8, "repetition_penalty"),
    "allowed of none": ({"allowed": b"x"}, ["i32", [2]], 8, "asks for none"),
    "allowed too much": (
        {"sample": m.Sampling(), "allowed": bytes(40961)},
        ["i32", [2]],
        8,
        "40961 bytes; at most 40960",
    ),
    "logprobs 21": ({"sample": m.Sampling(logprobs=21)}, ["i32", [2]], 8, "logprobs"),
    "top_k negative": ({"sample": m.Sampling(top_k=-1)}, ["i32", [2]], 8, "top_k"),
    "hop negative": ({"key": m.HopKey("o", "s", -1)}, ["i32", [2]], 8, "key.hop"),
    "session too long": ({"key": m.HopKey("o", "s" * 513, 1)}, ["i32", [2]], 8, "key.session"),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_step_that_no_sender_may_send(what: str) -> None:
    changes, tensor, size, expected = BAD_STEPS[what]
    assert expected in _refusal(_raw(_step(**changes), tensor, bytes(size)))


@pytest.mark.parametrize("count", [0, 22, 1000])
def test_a_token_that_tells_too_many_probabilities_or_none_is_refused(count: int) -> None:
    told = tuple((number, -1.0) for number in range(count))
    token = m.TokenFrame(key=KEY, branch=0, route=0, position=1, token_id=1, logprobs=told)
    assert f"token.logprobs: {count} entries are not 1 to 21" in _refusal(_raw(token))


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan"), 3e38])
def test_scales_of_q8_that_give_no_finite_numbers_are_refused(scale: float) -> None:
    payload = bytes(65) + struct.pack("<ff", 1.0, scale)
    assert "q8 with a scale" in _refusal(_raw(_step(), ["q8", [2, 65]], bytes(73) + payload))


def test_a_payload_is_refused_before_it_arrives() -> None:
    whole = _raw(_step(), ["i32", [2]], bytes(1 << 20))
    assert "has 8 bytes, the payload has 1048576" in _refusal(whole[: len(whole) - (1 << 20)])


def test_negative_token_ids_are_refused() -> None:
    payload = np.array([5, -1], "<i4").tobytes()
    assert "token id of -1" in _refusal(_raw(_step(), ["i32", [2]], payload))
    with pytest.raises(ProtocolError, match="token id"):
        encode(Frame(_step(), Tensor("i32", (2,), payload)))


@pytest.mark.parametrize(
    ("message", "tensor", "size", "expected"),
    [
        (m.Ping(nonce=1), ["i32", [1]], 4, "ping: has a payload"),
        (m.Ping(nonce=1), ["i32", [0]], 0, "ping: has a payload"),
        (m.Replay(key=KEY, branch=0, route=1, start=3, stop=3), None, 0, "replay: 3-3 are not"),
        (m.Replay(key=KEY, branch=0, route=1, start=0, stop=4097), None, 0, "are not 1 to 4096 positions"),
        (m.History(key=KEY, branch=0, start=0, answer_start=0), None, 0, "history: the payload is i32"),
        (m.History(key=KEY, branch=0, start=0, answer_start=0), ["f32", [2]], 8, "not f32[2]"),
        (m.History(key=KEY, branch=0, start=2**31 - 1, answer_start=0), ["i32", [2]], 8, "history: ends at"),
        (m.OpenHop(ticket=b"", signature=b"x" * 63), None, 0, "open: a signature of 63 bytes"),
        (m.OpenHop(ticket=b"x" * 20_000, signature=b"x" * 64), None, 0, "open.ticket: 20000 bytes"),
        (m.Hello(versions=(), software="s", name="n"), None, 0, "hello: no protocol version"),
        (m.Hello(versions=(1,) * 1025, software="s", name="n"), None, 0, "hello.versions: 1025 items"),
        (m.Hello(versions=(1,), software="s" * 513, name="n"), None, 0, "hello.software: 513 characters"),
        (m.Failure(kind="k", message="x" * 8193), None, 0, "failure.message: 8193 characters"),
        (m.Failure(kind="k", message="", data={"x": float("nan")}), None, 0, "failure.data"),
        (m.TokenFrame(key=KEY, branch=0, route=0, position=1, token_id=2**31), None, 0, "token.token_id"),
        (m.HopLength(key=KEY, branch=0, length=-1), None, 0, "length.length"),
        ({"t": "ping", "nonce": 2**64 - 1, "more": 2**64 - 1}, ["i32", [0]], 0, "ping: has a payload"),
        ({"t": "ping"}, None, 0, "ping: Object missing required field `nonce`"),
        ({"t": "ping", "nonce": "1"}, None, 0, "ping: Expected `int`, got `str`"),
    ],
)  # fmt: skip
def test_a_message_that_no_sender_may_send(message: Any, tensor: Any, size: int, expected: str) -> None:
    assert expected in _refusal(_raw(message, tensor, bytes(size)))


def test_encode_refuses_what_a_decoder_would() -> None:
    with pytest.raises(ProtocolError, match="has no payload"):
        encode(Frame(_step()))
    with pytest.raises(ProtocolError, match="ping: has a payload"):
        encode(Frame(m.Ping(nonce=1), _ids(1)))
    with pytest.raises(ProtocolError, match="failure: a header of"):
        encode(Frame(m.Failure(kind="k", message="", data={str(i): "x" * 400 for i in range(400)})))


def test_encode_does_not_copy_the_payload() -> None:
    data = bytearray(8 << 20)
    frame = Frame(_step(count=1024), Tensor("f32", (1024, 2048), data))
    parts = encode(frame)
    assert len(parts) == 2
    assert isinstance(parts[1], memoryview)
    assert parts[1].obj is data
    tracemalloc.start()
    try:
        joined = encode_bytes(frame)
        assert tracemalloc.get_traced_memory()[1] < len(data) * 1.1
    finally:
        tracemalloc.stop()
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(joined + encode_bytes(Frame(m.Ping(nonce=1))))
    first, second = _drain(decoder)
    assert _same(first, frame)
    assert second == Frame(m.Ping(nonce=1))


def test_a_declared_payload_takes_no_memory_until_it_comes() -> None:
    header = msgspec.msgpack.encode((_step(count=4096), ["f32", [4096, 4096]]))
    prefix = struct.pack("<3sBII", b"dgn", 1, len(header), 64 << 20)
    tracemalloc.start()
    try:
        decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
        decoder.receive_data(prefix + header + bytes(1000))
        assert decoder.next_frame() is None
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_versions() -> None:
    assert negotiate(PROTOCOL_VERSIONS, PROTOCOL_VERSIONS) == 1
    assert negotiate((1, 2), (2, 3)) == 2
    assert negotiate((3, 2), (1, 2)) == 2
    for theirs in ((), (4,), tuple(range(100, 200))):
        with pytest.raises(ProtocolError, match="no common protocol version"):
            negotiate((1, 2), theirs)


def test_an_error_survives_the_way_to_a_peer() -> None:
    error = PositionGap("x" * 10_000, expected=12)
    decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
    decoder.receive_data(encode_bytes(Frame(failure_of(error, KEY, 3, "step"))))
    [frame] = _drain(decoder)
    assert isinstance(frame.message, m.Failure)
    assert (frame.message.kind, frame.message.data, frame.message.key) == (
        "position_gap",
        {"expected": 12},
        KEY,
    )


def test_the_protocol_document_names_every_message_and_field() -> None:
    text = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
    for kind in ALL_KINDS:
        section = text.split(f"\n| `{kind.__struct_config__.tag}` |", 1)
        assert len(section) == 2, f"docs/protocol.md has no row for {kind.__struct_config__.tag}"
        row = section[1].split("\n", 1)[0]
        for name in kind.__struct_fields__:
            assert f"`{name}`" in row, f"docs/protocol.md: {kind.__struct_config__.tag} without {name}"
