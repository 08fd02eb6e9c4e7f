"""Spans and raw tensors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgn_backends.span import (
    Span,
    SpanSyntaxError,
    format_spans,
    format_units,
    parse_spans,
    parse_units,
    span_of_units,
    spans_of_units,
)
from dgn_backends.tensor import Tensor, bf16_to_f32, f32_to_bf16, tensor_bytes

N = 28


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("embed,0-13,head", (Span(0, 14, embed=True), Span(28, 28, head=True))),
        ("14-27", (Span(14, 28),)),
        ("embed,0,3-5", (Span(0, 1, embed=True), Span(3, 6))),
        ("embed", (Span(0, 0, embed=True),)),
        ("head", (Span(28, 28, head=True),)),
        ("embed,head", (Span(0, 0, embed=True), Span(28, 28, head=True))),
        ("head, 0-27 ,embed", (Span(0, 28, embed=True, head=True),)),
        ("5,4,3", (Span(3, 6),)),
        ("0-0", (Span(0, 1),)),
        ("27,head", (Span(27, 28, head=True),)),
    ],
)
def test_parsing(text: str, spans: tuple[Span, ...]) -> None:
    assert parse_spans(text, N) == spans


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", '"" in span "" is none of: embed, head, a block number, a range'),
        ("0,,1", '"" in span "0,,1" is none of'),
        ("embde", '"embde" in span "embde" is none of'),
        ("-3", '"-3" in span'),
        ("3-", '"3-" in span'),
        ("1-2-3", '"1-2-3" in span'),
        ("1.5", '"1.5" in span'),
        ("١", "is none of"),  # a digit, but not one of ours
        ("1234567", "is none of"),
        ("5-3", 'range "5-3" in span "5-3" runs backwards'),
        ("20-28", 'block 28 in span "20-28" is beyond the model, whose blocks are 0-27'),
        ("28", "block 28"),
        ("0-5,3", '"3" in span "0-5,3" names something twice'),
        ("embed,embed", '"embed" in span "embed,embed" names something twice'),
    ],
)
def test_unreadable_spans_are_quoted(text: str, message: str) -> None:
    with pytest.raises(SpanSyntaxError) as caught:
        parse_units(text, N)
    assert message in str(caught.value)


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n + 1), min_size=1)))
)
def test_units_survive_their_notation(case: tuple[int, set[int]]) -> None:
    n_blocks, units = case
    text = format_units(units, n_blocks)
    assert parse_units(text, n_blocks) == units
    spans = parse_spans(text, n_blocks)
    assert spans == spans_of_units(units, n_blocks)
    assert sorted(unit for span in spans for unit in span.units()) == sorted(units)
    for a, b in itertools.pairwise(spans):
        assert a.units()[-1] + 1 < b.units()[0]  # maximal: never two that touch
    for span in spans:
        assert span_of_units(span.units(), n_blocks) == span
        assert parse_spans(str(span), n_blocks) == (span,)
        assert 0 <= span.start <= span.stop <= n_blocks


@given(st.data())
def test_containing_is_containing_the_units(data: st.DataObject) -> None:
    n_blocks = data.draw(st.integers(1, 8))

    def a_span() -> Span:
        first = data.draw(st.integers(0, n_blocks + 1))
        return span_of_units(range(first, data.draw(st.integers(first, n_blocks + 1)) + 1), n_blocks)

    a, b = a_span(), a_span()
    assert a.contains(b) == (set(b.units()) <= set(a.units()))


def test_no_units_have_an_empty_notation() -> None:
    assert format_units([], N) == ""
    assert format_spans([]) == ""
    assert spans_of_units([], N) == ()
    assert list(Span(3, 3).units()) == []


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i32"])
def test_tensor_shares_the_bytes_of_an_array(dtype: str) -> None:
    storage = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16, "i32": np.int32}[dtype]
    array = np.arange(24).astype(storage).reshape(2, 3, 4)
    tensor = Tensor.from_numpy(array, dtype)  # type: ignore[arg-type]
    assert tensor.shape == (2, 3, 4)
    assert len(tensor.data) == array.nbytes == tensor_bytes(tensor.dtype, tensor.shape)
    assert np.shares_memory(tensor.to_numpy(), array)
    assert bytes(tensor.data) == array.tobytes()
    assert (tensor.to_numpy() == array).all()
    assert (tensor.rows(1, 2).to_numpy() == array[1:2]).all()
    assert tensor.rows(1, 1).shape == (0, 3, 4)


def test_tensor_of_odd_layouts() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert (Tensor.from_numpy(array.T, "f32").to_numpy() == array.T).all()
    assert (Tensor.from_f32(array[:, ::2], "bf16").to_f32() == array[:, ::2]).all()
    scalar = Tensor.from_numpy(np.array(5, dtype=np.int32), "i32")
    assert scalar.shape == ()
    assert scalar.to_numpy() == 5
    empty = Tensor.from_f32(np.zeros((0, 4), np.float32), "f16")
    assert empty.to_f32().shape == (0, 4)
    assert Tensor("f32", (0, 4), b"").to_numpy().shape == (0, 4)


def test_tensor_bytes_must_match() -> None:
    for data in (b"", b"\0" * 23, b"\0" * 25):
        with pytest.raises(ValueError, match=r"f32\[2, 3\] does not have"):
            Tensor("f32", (2, 3), data)
    # A view of wider items has fewer items than bytes.
    wide = memoryview(bytearray(24)).cast("f")
    assert Tensor("f32", (2, 3), wide).rows(1, 2).shape == (1, 3)
    with pytest.raises(ValueError, match="does not have"):
        Tensor("f32", (2, 3), memoryview(bytearray(96)).cast("f"))
    with pytest.raises(TypeError, match="C-contiguous"):
        Tensor("f32", (2, 3), wide[::2])
    with pytest.raises(ValueError, match="does not hold"):
        Tensor.from_numpy(np.zeros(3, np.float64), "f32")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bf16_rounds_to_nearest_even(bits: list[int]) -> None:
    """Against the definition: of the two neighbours the nearer, of two equally near the even one."""
    for word in bits:
        value = np.array([word], dtype=np.uint32).view(np.float32)
        rounded = int(f32_to_bf16(value)[0])
        if np.isnan(value[0]):
            assert np.isnan(bf16_to_f32(np.array([rounded], np.uint16))[0])
            continue
        below, rest = word >> 16, word & 0xFFFF
        expected = below + (rest > 0x8000 or (rest == 0x8000 and below & 1))
        assert rounded == expected


def test_bf16_words_widen_and_come_back() -> None:
    words = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    values = bf16_to_f32(words)
    numbers = ~np.isnan(values)
    assert (f32_to_bf16(values)[numbers] == words[numbers]).all()
    assert np.isnan(bf16_to_f32(f32_to_bf16(values))[~numbers]).all()
