"""The JSON-RPC codec: lines, messages, error codes, and that no bytes make it raise."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgnd.control import api, jsonrpc
from dgnd.errors import BadRequest, BlocksMissing, DgnError, LimitError, MethodNotFound, all_errors


def lines_of(data: bytes, cuts: list[int], limit: int = 100) -> list[bytes | jsonrpc.LineTooLong]:
    lines = jsonrpc.Lines(limit)
    found = []
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        lines.receive(data[start:stop])
        while (line := lines.next()) is not None:
            found.append(line)
    return found


@given(st.lists(st.binary(max_size=30)), st.lists(st.integers(0, 10_000)))
def test_any_split_gives_the_same_lines(parts: list[bytes], cuts: list[int]) -> None:
    data = b"\n".join(parts) + b"\n"
    expected = [line for line in data.split(b"\n") if line and not line.isspace()]
    assert lines_of(data, cuts) == expected
    assert lines_of(data, list(range(len(data)))) == expected


@given(st.integers(101, 500), st.lists(st.integers(0, 1000)))
def test_a_line_too_long_is_reported_once_and_the_next_is_read(length: int, cuts: list[int]) -> None:
    data = b"before\n" + b"x" * length + b"\nafter\n"
    assert lines_of(data, cuts) == [b"before", jsonrpc.LineTooLong(100), b"after"]


def test_a_line_of_the_limit_is_not_too_long() -> None:
    assert lines_of(b"x" * 100 + b"\n", []) == [b"x" * 100]


def test_an_endless_line_takes_bounded_memory() -> None:
    lines = jsonrpc.Lines(1000)
    found = []
    for _ in range(10_000):
        lines.receive(b"y" * 100)
        found.append(lines.next())
        assert len(lines._buffer) <= 1100
    assert [line for line in found if line is not None] == [jsonrpc.LineTooLong(1000)]


@pytest.mark.parametrize("identity", [0, -5, 2**63 - 1, "a", "", "ünï"])
def test_a_request_survives_the_line(identity: int | str) -> None:
    line = jsonrpc.encode_request(identity, "status", api.NoParams())
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert jsonrpc.parse(line[:-1]) == jsonrpc.Request(identity, "status", b"{}")


@given(
    st.builds(
        api.GenerateParams,
        model=st.none() | st.text(),
        prompt=st.none() | st.text(),
        temperature=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        seed=st.none() | st.integers(0, 2**64 - 1),
        stop=st.lists(st.text()),
        stop_ids=st.lists(st.lists(st.integers(0, 2**31))),
    )
)
def test_parameters_survive_the_line(params: api.GenerateParams) -> None:
    message = jsonrpc.parse(jsonrpc.encode_request(1, "generate", params))
    assert isinstance(message, jsonrpc.Request)
    assert jsonrpc.read_params(message.params, api.GenerateParams) == params


def test_notifications_and_results_survive_the_line() -> None:
    delta = api.GenerateDelta(3, "é\n", [1, 2])
    message = jsonrpc.parse(jsonrpc.encode_notification("generate.delta", delta)[:-1])
    assert isinstance(message, jsonrpc.Notification)
    assert jsonrpc.read_value(message.params, api.GenerateDelta, "delta") == delta
    answer = jsonrpc.parse(jsonrpc.encode_result("x", [1, 2]))
    assert answer == jsonrpc.Response("x", b"[1,2]")


@pytest.mark.parametrize("kind", sorted(all_errors()))
def test_every_error_survives_the_line(kind: str) -> None:
    error = all_errors()[kind]("what went wrong", where="here", count=3, items=["a", 1])
    sent = jsonrpc.parse(jsonrpc.encode_error(7, error))
    assert isinstance(sent, jsonrpc.ErrorResponse)
    assert sent.error.code == error.code
    assert sent.error.data["retryable"] is error.retryable
    back = jsonrpc.error_of(sent.error)
    assert type(back) is type(error)
    assert back.message == error.message
    assert back.data == error.data


def test_an_error_of_a_newer_daemon_is_still_an_error() -> None:
    sent = jsonrpc.ErrorObject(-32999, "news", {"kind": "not_invented_yet", "message": "x", "self": 1})
    back = jsonrpc.error_of(sent)
    assert type(back) is DgnError
    assert back.message == "news"


def test_an_error_that_json_cannot_hold_is_sent_without_its_data() -> None:
    error = BlocksMissing("no file \udcff", odd="\udcff")
    sent = jsonrpc.parse(jsonrpc.encode_error(1, error))
    assert isinstance(sent, jsonrpc.ErrorResponse)
    assert sent.error.message == "no file ?"
    assert sent.error.data == {"kind": "blocks_missing", "retryable": True}


CODES = [
    (b"nonsense", -32700, None),
    (b"{", -32700, None),
    (b'"\xff"', -32700, None),
    (b"\xef\xbb\xbf{}", -32700, None),
    (b"[" * 100_000, -32700, None),
    (b'{"a":' * 100_000, -32700, None),
    (b"[]", -32600, None),
    (b'[{"jsonrpc":"2.0","id":1,"method":"status"}]', -32600, None),
    (b"5", -32600, None),
    (b"null", -32600, None),
    (b"{}", -32600, None),
    (b'{"id":1,"method":"status"}', -32600, 1),
    (b'{"jsonrpc":"1.0","id":1,"method":"status"}', -32600, 1),
    (b'{"jsonrpc":"2.0","id":1}', -32600, 1),
    (b'{"jsonrpc":"2.0","id":1,"method":5}', -32600, 1),
    (b'{"jsonrpc":"2.0","id":"x","method":"status","params":5}', -32600, "x"),
    (b'{"jsonrpc":"2.0","id":null,"method":"status"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":1.5,"method":"status"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":[],"method":"status"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":99999999999999999999,"method":"status"}', -32600, None),
    (b'{"jsonrpc":"2.0","id":"' + b"x" * 129 + b'","method":"status"}', -32600, None),
]


@pytest.mark.parametrize(("line", "code", "identity"), CODES, ids=range(len(CODES)))
def test_codes_of_what_is_no_request(line: bytes, code: int, identity: object) -> None:
    message = jsonrpc.parse(line)
    assert isinstance(message, jsonrpc.Malformed)
    assert message.error.code == code
    assert message.id == identity
    answer = json.loads(jsonrpc.encode_error(message.id, message.error))
    assert answer["id"] == identity
    assert answer["error"]["code"] == code


def test_a_batch_is_refused_in_words() -> None:
    message = jsonrpc.parse(b" [1]")
    assert isinstance(message, jsonrpc.Malformed)
    assert "batches are not supported" in message.error.message


def test_members_that_json_rpc_does_not_know_are_passed_over() -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"status","extra":{"a":[1,2]}}'
    assert jsonrpc.parse(line) == jsonrpc.Request(1, "status", b"{}")


@pytest.mark.parametrize(
    ("params", "named"),
    [
        (b'{"addr": 5}', "$.addr"),
        (b"{}", "addr"),
        (b'{"addr": "x", "port": 1}', "port"),
        (b'["x"]', "named fields"),
        (b'{"addr": "\xff"}', "params"),
    ],
)
def test_bad_parameters_are_named(params: bytes, named: str) -> None:
    with pytest.raises(BadRequest) as caught:
        jsonrpc.read_params(params, api.ConnectParams)
    assert caught.value.code == -32602
    assert named in caught.value.message


def test_codes_of_the_specification() -> None:
    assert MethodNotFound.code == -32601
    assert all_errors()["internal_error"].code == -32603
    assert jsonrpc.error_object(LimitError("x", limit=1)) == jsonrpc.ErrorObject(
        -32012, "x", {"limit": 1, "kind": "limit", "retryable": False}
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | json_values,
        "id": json_values,
        "method": st.text() | json_values,
        "params": json_values,
        "result": json_values,
        "error": json_values,
    },
)


@given(st.binary() | envelopes.map(lambda value: json.dumps(value).encode()))
def test_whatever_the_line_parse_gives_a_message_that_can_be_answered(line: bytes) -> None:
    message = jsonrpc.parse(line)
    match message:
        case jsonrpc.Malformed(identity, error):
            answer = msgspec.json.decode(jsonrpc.encode_error(identity, error))
            assert answer["error"]["code"] in (-32700, -32600)
        case jsonrpc.ErrorResponse(_, error):
            assert isinstance(jsonrpc.error_of(error), DgnError)
        case jsonrpc.Request(_, _, params) | jsonrpc.Notification(_, params):
            for kind, _ in api.METHODS.values():
                try:
                    jsonrpc.read_params(params, kind)
                except BadRequest as refused:
                    assert refused.message  # noqa: PT017 - either outcome is right, nothing else may be raised
