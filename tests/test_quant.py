"""Weights in groups of 4 or 8 bits: the layout bit by bit, how near they stay, and what they refuse."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dgn_backends.quant import Scheme, dequantise, empty, quantise, quantise_into, regrouped
from dgn_backends.quant_plan import SCHEMES
from dgn_backends.tensor import Tensor

F32 = npt.NDArray[np.float32]
ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
IN_GROUPS = pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES.values() if scheme.group is not None], ids=str
)
ROWS = Scheme(8, None)


def _random(out: int, in_features: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((out, in_features)).astype(np.float32) * np.float32(
        0.02
    )


def _error(weight: F32, scheme: Scheme) -> float:
    """Root-mean-square error as a share of the weights' size."""
    apart = dequantise(quantise(weight, scheme), weight.shape[1]) - weight
    return float(np.sqrt(np.square(apart).sum() / np.square(weight).sum()))


@ALL
@settings(max_examples=60, deadline=None)
@given(
    weight=arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=300),
        elements=st.floats(-1e4, 1e4, width=32),
        fill=st.floats(-1, 1, width=32),
    )
)
def test_no_weight_is_further_off_than_its_group_allows(scheme: Scheme, weight: F32) -> None:
    kept = quantise(weight, scheme)
    again = dequantise(kept, weight.shape[1])
    size = scheme.size(weight.shape[1])
    for group in range(scheme.groups(weight.shape[1])):
        inside = slice(group * size, (group + 1) * size)
        part = weight[:, inside].astype(np.float64)
        apart = np.square(again[:, inside] - part).sum(axis=1)
        # Never worse than the plain way: the range divided among the codes, rounded.
        step = (part.max(axis=1, initial=0) - part.min(axis=1, initial=0)) / scheme.top
        assert (apart <= part.shape[1] * (step / 2 * 1.01) ** 2 + part.shape[1] * 2.0**-48).all()


@IN_GROUPS
def test_codes_and_scales_lie_as_documented(scheme: Scheme) -> None:
    assert scheme.group is not None
    weight = _random(3, scheme.group * 2 + 5)
    weight[1, scheme.group :] += 0.03  # so that zero is not in the middle
    kept = quantise(weight, scheme)
    assert kept.packed.shape == (3, 3, scheme.group * scheme.bits // 8)
    assert kept.scales.shape == (3, 3)
    assert kept.packed.dtype == np.uint8
    assert kept.scales.dtype == np.float32
    assert kept.zeros.shape == (3, 3 if scheme.bits == 8 else 2)
    row, group, place = 1, 1, 3
    byte = int(kept.packed[row, group, place * scheme.bits // 8])
    code = byte if scheme.bits == 8 else byte >> 4
    point = int(kept.zeros[row, group * scheme.bits // 8])  # 4 bits: the upper half of the first byte
    zero = point if scheme.bits == 8 else point >> 4
    assert 0 < zero < 2 ** (scheme.bits - 1) - 1
    value = (code - zero) * kept.scales[row, group]
    assert value == dequantise(kept, weight.shape[1])[row, scheme.group + place]
    assert abs(value - weight[row, scheme.group + place]) <= abs(kept.scales[row, group]) * 0.51


@pytest.mark.parametrize("in_features", [5, 64, 300])
def test_a_row_may_be_one_group(in_features: int) -> None:
    weight = _random(3, in_features)
    weight[1] += 0.03  # so that zero is not in the middle
    kept = quantise(weight, ROWS)
    assert (kept.packed.shape, kept.scales.shape, kept.zeros.shape) == ((3, 1, in_features), (3, 1), (3, 1))
    values = (kept.packed[:, 0].astype(np.float32) - kept.zeros) * kept.scales
    assert np.array_equal(values, dequantise(kept, in_features))
    assert (np.abs(values - weight) <= np.abs(kept.scales) * 0.51).all()


@pytest.mark.parametrize("in_features", [5, 128, 300])
def test_rows_in_groups_are_the_same_weights(in_features: int) -> None:
    kept = quantise(_random(7, in_features), ROWS)
    again = regrouped(kept, in_features, 128)
    assert again.packed.shape == (7, -(-in_features // 128), 128)
    assert np.array_equal(dequantise(again, in_features), dequantise(kept, in_features))
    assert not dequantise(again, again.packed.shape[1] * 128)[:, in_features:].any()


@IN_GROUPS
def test_what_fills_up_a_row_is_zero(scheme: Scheme) -> None:
    assert scheme.group is not None
    weight = _random(4, scheme.group + 1)
    wide = dequantise(quantise(weight, scheme), 2 * scheme.group)
    assert not wide[:, scheme.group + 1 :].any()
    padded = np.zeros((4, 2 * scheme.group), np.float32)
    padded[:, : scheme.group + 1] = weight
    for part in ("packed", "scales", "zeros"):
        assert np.array_equal(
            getattr(quantise(padded, scheme), part), getattr(quantise(weight, scheme), part)
        )


@ALL
def test_scales_are_exact_in_half_precision(scheme: Scheme) -> None:
    for size in (1e-12, 1e-7, 1e-3, 1.0, 1e4):
        scales = quantise(_random(8, 256) * np.float32(size), scheme).scales
        assert np.array_equal(scales.astype(np.float16).astype(np.float32), scales)


@ALL
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 2.0**-30])
def test_equal_weights_stay_equal(scheme: Scheme, value: float) -> None:
    again = dequantise(quantise(np.full((2, 130), value, np.float32), scheme), 130)
    assert (again == again[0, 0]).all()
    assert again[0, 0] == pytest.approx(value, rel=1e-3, abs=2.0**-24)


@IN_GROUPS
def test_an_outlier_hurts_its_own_group_only(scheme: Scheme) -> None:
    assert scheme.group is not None
    weight = _random(2, scheme.group * 3)
    spoiled = weight.copy()
    spoiled[0, 0] = 5.0
    before, after = quantise(weight, scheme), quantise(spoiled, scheme)
    assert not np.array_equal(before.packed[0, 0], after.packed[0, 0])
    assert np.array_equal(before.packed[0, 1:], after.packed[0, 1:])
    assert np.array_equal(before.packed[1], after.packed[1])
    assert dequantise(after, weight.shape[1])[0, 0] == pytest.approx(5.0, rel=0.07)


@ALL
def test_the_largest_values_that_are_taken_stay_finite(scheme: Scheme) -> None:
    """The scale of least error may be a little larger than the range asks for."""
    weight = np.linspace(-1, 1, 64, dtype=np.float32)[None] * np.float32(65503.9 * scheme.top / 2)
    weight = np.concatenate([weight, np.sign(weight) * weight.max()])
    held = dequantise(quantise(weight, scheme), 64)
    np.testing.assert_allclose(held, weight, atol=float(weight.max()) / scheme.top * 2)


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(scheme: Scheme, value: float) -> None:
    weight = _random(40, 64)
    weight[39, 63] = value
    with pytest.raises(ValueError, match="has values that are not finite"):
        quantise(weight, scheme, threads=2)


@ALL
def test_values_beyond_a_half_precision_scale_are_refused(scheme: Scheme) -> None:
    with pytest.raises(ValueError, match="has values that are too large to be quantised"):
        quantise(np.full((2, 32), 1e30, np.float32), scheme)


@ALL
def test_chunks_threads_and_the_source_dtype_change_nothing(scheme: Scheme) -> None:
    tensor = Tensor.from_f32(_random(700, 96), "bf16")
    whole = quantise(tensor.to_f32(), scheme)
    apart = empty(700, 96, scheme)
    quantise_into(apart, tensor, threads=3)
    assert np.array_equal(whole.packed, apart.packed)
    assert np.array_equal(whole.scales, apart.scales)
    assert np.array_equal(whole.zeros, apart.zeros)
    one = quantise(tensor.to_f32()[350:351], scheme)
    assert np.array_equal(whole.packed[350:351], one.packed)
    assert whole.n_bytes == scheme.n_bytes(700, 96)
    some = whole.rows(np.array([3, 3, 699]))
    assert np.array_equal(dequantise(some, 96), dequantise(whole, 96)[[3, 3, 699]])


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    weight = _random(64, 512)
    errors = {name: _error(weight, scheme) for name, scheme in SCHEMES.items()}
    assert errors["int8"] < errors["int8-fast"] < 0.01 < errors["int4"] < errors["int4-fast"] < 0.11
