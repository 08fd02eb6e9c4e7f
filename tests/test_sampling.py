"""Picking a token: generator, filters, penalties, bounds."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgnd.errors import BadRequest, NonFiniteOutput
from dgnd.models.sampling import check_sampling, gumbel, logprobs, philox4x32, pick
from dgnd.wire.messages import Sampling

FULL = 2**64 - 1


@pytest.mark.parametrize(
    ("counter", "position", "seed", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (FULL, FULL, FULL, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x85A308D3243F6A88,
            0x0370734413198A2E,
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: int, position: int, seed: int, words: tuple[int, ...]
) -> None:
    got = philox4x32(np.array([counter], dtype=np.uint64), position, seed)
    assert tuple(int(word[0]) for word in got) == words


def test_noise_of_an_id_does_not_depend_on_the_other_ids() -> None:
    vocab = 20_001  # more than is worked on at a time
    everything = gumbel(7, 3, np.arange(vocab), vocab)
    few = np.array([0, 1, 2, 500, 9999, 16_384, 19_999, 20_000])
    assert np.array_equal(gumbel(7, 3, few, vocab), everything[few])
    assert np.array_equal(gumbel(7, 3, few, 10**6), everything[few])
    assert not np.array_equal(gumbel(7, 4, few, vocab), everything[few])
    assert not np.array_equal(gumbel(8, 3, few, vocab), everything[few])
    assert len(np.unique(everything)) == vocab


def test_greedy_takes_the_best_and_the_lowest_id_of_equals() -> None:
    assert pick(np.array([0, 3, 1, 3], dtype=np.float32), Sampling(), 0) == 1
    assert pick(np.array([-0.0, 0.0], dtype=np.float32), Sampling(), 0) == 0


def draws(logits: list[float], n: int = 4000, **settings: float) -> np.ndarray:
    array = np.array(logits, dtype=np.float32)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    return np.bincount([pick(array, sampling, position) for position in range(n)], minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    logits = [2.0, 1.0, 0.5, 0.0, -1.0, 1.0]
    probabilities = np.exp(np.array(logits) / temperature)
    probabilities /= probabilities.sum()
    n = 4000
    counts = draws(logits, n, temperature=temperature, seed=11) * n
    chi2 = float((((counts - n * probabilities) ** 2) / (n * probabilities)).sum())
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001; the seed is fixed


def test_frequencies_match_over_seeds_too() -> None:
    logits = np.array([1.0, 0.0, 0.0, -0.5], dtype=np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    picks = [pick(logits, Sampling(temperature=1.0, seed=seed), 5) for seed in range(4000)]
    assert np.allclose(np.bincount(picks, minlength=4) / 4000, probabilities, atol=0.03)


def test_filters_leave_exactly_the_candidates_they_name() -> None:
    logits = [1.0, 2.0, 2.0, 0.0, 2.0]
    assert np.flatnonzero(draws(logits, 300, temperature=5.0, top_k=2)).tolist() == [1, 2]  # ties: lowest ids
    assert np.flatnonzero(draws(logits, 600, temperature=5.0, top_k=4)).tolist() == [0, 1, 2, 4]
    assert np.flatnonzero(
        draws([np.log(p) for p in (0.5, 0.3, 0.15, 0.05)], 400, temperature=1.0, top_p=0.8)
    ).tolist() in ([0, 1], [0, 1, 2])
    assert np.flatnonzero(
        draws([np.log(p) for p in (0.5, 0.3, 0.15, 0.05)], 400, temperature=1.0, top_p=0.79)
    ).tolist() == [0, 1]
    assert np.flatnonzero(
        draws([np.log(p) for p in (0.5, 0.3, 0.15, 0.05)], 400, temperature=1.0, min_p=0.25)
    ).tolist() == [0, 1, 2]
    assert draws(logits, 50, temperature=1.0, top_p=1e-9)[1] == 1.0
    assert draws(logits, 50, temperature=1.0, top_k=1)[1] == 1.0


def naive_candidates(logits: np.ndarray, sampling: Sampling) -> list[int]:
    """The filters one after the other, by full sorting."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    wide = np.array([float(logits[i]) for i in order])
    weights = np.exp((wide - wide[0]) / sampling.temperature)
    if sampling.top_p < 1.0:
        total, need, kept = 0.0, sampling.top_p * weights.sum(), 0
        while kept < len(order) and total < need:
            total += weights[kept]
            kept += 1
        order, weights = order[:kept], weights[:kept]
    return sorted(i for i, w in zip(order, weights, strict=True) if w >= sampling.min_p)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12), min_size=1, max_size=60),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([1.0, 0.97, 0.5, 0.123]),
    min_p=st.sampled_from([0.0, 0.033, 0.41]),
    position=st.integers(0, 2**40),
)
def test_a_draw_is_the_best_noisy_one_of_the_naive_candidates(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float, position: int
) -> None:
    array = np.array(logits, dtype=np.float32) / 3
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=99)
    ids = np.array(naive_candidates(array, sampling))
    scores = array[ids].astype(np.float64) / temperature + gumbel(99, position, ids, len(logits))
    assert pick(array, sampling, position) == ids[np.argmax(scores)]


def test_top_p_over_a_flat_vocabulary_goes_beyond_the_first_sorted() -> None:
    logits = np.zeros(50_000, dtype=np.float32)
    picks = [pick(logits, Sampling(temperature=1.0, top_p=0.5, seed=1), position) for position in range(60)]
    assert max(picks) < 25_000
    assert max(picks) > 20_000


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits = rng.standard_normal(50).astype(np.float32)
        history = rng.integers(0, 50, 30)
        want = process(1.3)(torch.tensor(history)[None], torch.tensor(logits)[None])[0].argmax()
        assert pick(logits, Sampling(repetition_penalty=1.3), 30, history, 10) == int(want)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.array([2.0, 1.9, 0.0], dtype=np.float32)
    assert pick(logits, Sampling(presence_penalty=0.5), 2, [0, 0], 2) == 0
    assert pick(logits, Sampling(presence_penalty=0.5), 2, [2, 0], 1) == 1
    assert pick(logits, Sampling(presence_penalty=0.05), 3, [0, 0, 0], 0) == 0
    assert pick(logits, Sampling(frequency_penalty=0.05), 3, [0, 0, 0], 0) == 1
    assert pick(logits, Sampling(frequency_penalty=-1.0), 3, [2, 2, 2], 0) == 2
    assert logits[0] == 2.0  # the caller's array is not changed


def test_penalties_beyond_f32_stay_finite() -> None:
    logits = np.array([-3e38, 3e38, 1.0], dtype=np.float32)
    sampling = Sampling(temperature=1.0, repetition_penalty=100.0, frequency_penalty=-100.0)
    assert pick(logits, sampling, 3, [0, 1, 1], 0) in (0, 1, 2)


def test_a_history_outside_the_vocabulary_is_refused() -> None:
    for bad in ([5], [-1]):
        with pytest.raises(BadRequest, match="vocabulary of 5"):
            pick(np.zeros(5, dtype=np.float32), Sampling(presence_penalty=1.0), 1, bad, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    logits = np.zeros(10, dtype=np.float32)
    logits[7] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteOutput, match="token 7"):
            pick(logits, Sampling(temperature=temperature), 4)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([1.0, 1.0001, -1e30], dtype=np.float32)
    assert pick(logits, Sampling(temperature=1e-300), 0) == 1


@pytest.mark.parametrize(
    ("name", "value", "interval"),
    [
        ("temperature", -0.1, r"\[0, 100\]"),
        ("temperature", float("nan"), r"\[0, 100\]"),
        ("temperature", float("inf"), r"\[0, 100\]"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", 1.1, r"\(0, 1\]"),
        ("min_p", -0.1, r"\[0, 1\]"),
        ("min_p", 2.0, r"\[0, 1\]"),
        ("top_k", -1, r"\[0, 2147483647\]"),
        ("repetition_penalty", 0.0, r"\(0, 100\]"),
        ("presence_penalty", float("nan"), r"\[-100, 100\]"),
        ("frequency_penalty", 101.0, r"\[-100, 100\]"),
        ("seed", -1, r"\[0, 18446744073709551615\]"),
        ("seed", 2**64, r"\[0, 18446744073709551615\]"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_name_and_range(
    name: str, value: float, interval: str
) -> None:
    with pytest.raises(BadRequest, match=f"{name} is .*{interval}") as caught:
        check_sampling(Sampling(**{name: value}))  # type: ignore[arg-type]
    assert caught.value.data["setting"] == name


def test_the_defaults_and_the_borders_are_accepted() -> None:
    check_sampling(Sampling())
    check_sampling(Sampling(temperature=100.0, top_p=1.0, min_p=1.0, repetition_penalty=100.0, seed=FULL))


def test_a_vocabulary_of_128k_takes_milliseconds() -> None:
    logits = (np.random.default_rng(1).standard_normal(128_256) * 3).astype(np.float32)
    for sampling in (
        Sampling(temperature=0.8, top_p=0.95),
        Sampling(temperature=0.8),
        Sampling(temperature=1, top_k=40),
    ):
        times = []
        for position in range(15):
            begin = time.thread_time()
            pick(logits, sampling, position)
            times.append(time.thread_time() - begin)
        assert min(times) < 0.015  # the best of several, without waiting: others share the machine


def test_logprobs_are_those_of_the_softmax() -> None:
    logits = np.random.default_rng(5).normal(0, 6, 500).astype(np.float32)
    logits[7] = logits[300] = logits.max() + 1  # a tie goes to the lowest id
    wide = logits.astype(np.float64)
    wanted = wide - np.log(np.exp(wide).sum())
    told = logprobs(logits, 42, 5)
    order = sorted(range(500), key=lambda each: (-logits[each], each))
    assert [each for each, _ in told] == [42, *order[:5]]
    assert order[:2] == [7, 300]
    assert [value for _, value in told] == pytest.approx([wanted[each] for each, _ in told])
    assert logprobs(logits, 3, 0) == (pytest.approx((3, wanted[3])),)
    assert len(logprobs(logits[:4], 0, 20)) == 5
