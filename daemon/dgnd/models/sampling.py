"""Logits to one token id: penalties, filters, and a counter-based draw. NumPy only.

Every random bit is a function of (seed, position, token id): Philox4x32-10 is asked for the two words that
belong to a token id, whatever other candidates there are, on whichever hop. So the same logits give the same
token on every node, alone or in a batch, and also when a replaced hop draws again. Knows nothing of who asks
or how text is made.

Sources: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011) for Philox; the
Gumbel-max identity (the argmax of logit + Gumbel noise is a softmax draw); Keskar et al., "CTRL" (2019) for
the repetition penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dgnd.errors import BadRequest, NonFiniteOutput
from dgnd.wire.messages import Sampling

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

#: Accepted settings: name, lowest, whether the lowest itself is allowed, highest.
RANGES: tuple[tuple[str, float, bool, float], ...] = (
    ("temperature", 0.0, True, 100.0),
    ("top_k", 0, True, 2**31 - 1),
    ("top_p", 0.0, False, 1.0),
    ("min_p", 0.0, True, 1.0),
    ("repetition_penalty", 0.0, False, 100.0),
    ("presence_penalty", -100.0, True, 100.0),
    ("frequency_penalty", -100.0, True, 100.0),
    ("seed", 0, True, 2**64 - 1),
)

_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
#: Uniforms lie in [2^-54, 1 - 2^-54], so noise lies in [-3.7, 37.5]: a candidate further below the best can't
#: win.
_NOISE_SPAN = 41.5
#: How many candidates top-p sorts at first; sixteen times as many whenever they don't hold enough
#: probability.
_FIRST_SORTED = 1024
#: Counters that are worked on at a time, so that they stay in the cache.
_CACHED = 8192


def check_sampling(sampling: Sampling) -> None:
    """Raises BadRequest, naming the setting and its range, when a setting can't be used."""
    for name, low, closed, high in RANGES:
        value = getattr(sampling, name)
        good = low <= value <= high if closed else low < value <= high  # false for NaN
        if not good:
            interval = (
                f"{'[' if closed else '('}{low:g}, {high:g}]"
                if isinstance(low, float)
                else f"[{low}, {high}]"
            )
            raise BadRequest(f"{name} is {value}; it must lie in {interval}", setting=name)


def pick(
    logits: F32,
    sampling: Sampling,
    position: int,
    history: Sequence[int] | NDArray[np.integer] = (),
    answer_start: int = 0,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The token id for `position`.

    logits: f32 [vocab]; not changed. history: the token ids of positions [0, position), needed only where
    `sampling.needs_history`; `answer_start` is the index in it at which the answer begins. allowed: bool
    [vocab], the ids that may be picked, at least one; None for all. Order: repetition, presence and frequency
    penalties, what is allowed, temperature, top-k, top-p, min-p, draw. Candidates are ordered by (logit
    descending, id ascending) and ties go to the lowest id everywhere. Raises NonFiniteOutput on NaN or
    infinity, BadRequest when an id of the history is not of the vocabulary.
    """
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits must be [vocab], not {logits.shape}")
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise NonFiniteOutput(f"the logit of token {bad} at position {position} is {logits[bad]}")
    if sampling.needs_history:
        logits = _penalised(logits, sampling, np.asarray(history, dtype=np.int64), answer_start)
    if allowed is not None:
        logits = np.where(allowed, logits, np.float32(-np.inf))
    if sampling.temperature == 0.0:
        return int(np.argmax(logits))  # the first of equals, so the lowest id
    ids = _candidates(logits, sampling)
    scaled = _scaled(logits[ids], sampling.temperature)
    near = scaled >= scaled.max() - _NOISE_SPAN
    ids, scaled = ids[near], scaled[near]
    noise = gumbel(sampling.seed, position, ids, logits.size)
    return int(ids[np.argmax(scaled + noise)])


def logprobs(logits: F32, token: int, likeliest: int) -> tuple[tuple[int, float], ...]:
    """Logarithms of probabilities as the model has them, before all settings: of `token`, then of the
    `likeliest` ones, best first. logits: finite f32 [vocab]."""
    wide = logits.astype(np.float64)
    best = float(wide.max())
    total = best + math.log(float(np.exp(wide - best).sum()))
    keys = _order_keys(logits)
    likeliest = min(likeliest, keys.size)
    top = np.sort(np.partition(keys, likeliest - 1)[:likeliest]) if likeliest else keys[:0]
    return tuple((each, float(wide[each]) - total) for each in (token, *(int(key & _LOW32) for key in top)))


def gumbel(seed: int, position: int, ids: I64, vocab: int) -> F64:
    """Standard Gumbel noise [len(ids)] of these token ids; bits depend on (seed, position, id) alone."""
    if 2 * ids.size > vocab:  # cheaper: every block once, both halves used
        return _uniform_to_gumbel(_all_bits(seed, position, vocab)[ids])
    words = philox4x32(ids.astype(np.uint64) >> np.uint64(1), position, seed)
    odd = (ids & 1).astype(bool)
    return _uniform_to_gumbel(np.where(odd, words[2] << _SHIFT32 | words[3], words[0] << _SHIFT32 | words[1]))


def _all_bits(seed: int, position: int, vocab: int) -> U64:
    """The 64 bits of every id below `vocab` (or one more)."""
    bits: U64 = np.empty((vocab + 1) // 2 * 2, dtype=np.uint64)
    for begin in range(0, bits.size, 2 * _CACHED):
        part = bits[begin : begin + 2 * _CACHED]
        words = philox4x32(np.arange(begin // 2, (begin + part.size) // 2, dtype=np.uint64), position, seed)
        part[0::2] = words[0] << _SHIFT32 | words[1]
        part[1::2] = words[2] << _SHIFT32 | words[3]
    return bits


def _uniform_to_gumbel(bits: U64) -> F64:
    """Noise from the upper 53 of 64 random bits."""
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    np.minimum(uniform, 1.0 - 2.0**-53, out=uniform)  # the last one would round to 1
    noise: F64 = -np.log(-np.log(uniform))
    return noise


def philox4x32(counter: U64, position: int, seed: int) -> tuple[U64, U64, U64, U64]:
    """Philox4x32-10 of the counters (counter, position) under the key `seed`; four words [n], each below
    2^32.

    counter: 64-bit values, the low half of the 128-bit counter; position is its high half.
    """
    mask = 0xFFFFFFFF
    high = position & (2**64 - 1)
    x0, x1 = counter & _LOW32, counter >> _SHIFT32
    x2: U64 = np.full_like(counter, high & mask)
    x3: U64 = np.full_like(counter, high >> 32)
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _SHIFT32) ^ x1 ^ np.uint64(k0), p1 & _LOW32
        x2, x3 = (p0 >> _SHIFT32) ^ x3 ^ np.uint64(k1), p0 & _LOW32
        k0, k1 = (k0 + _WEYL[0]) & mask, (k1 + _WEYL[1]) & mask
    return x0, x1, x2, x3


def _penalised(logits: F32, sampling: Sampling, history: I64, answer_start: int) -> F32:
    """A copy of the logits with the penalties applied, f32 [vocab]."""
    vocab = logits.size
    if history.size and (int(history.min()) < 0 or int(history.max()) >= vocab):
        raise BadRequest(f"the history holds a token id outside the vocabulary of {vocab}")
    out = logits.copy()
    limit = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        if sampling.repetition_penalty != 1.0:
            seen = np.flatnonzero(np.bincount(history, minlength=vocab))
            # A double that float32 rounds to 0 would make NaN of 0/0.
            penalty = max(np.float32(sampling.repetition_penalty), np.finfo(np.float32).tiny)
            out[seen] = np.where(out[seen] < 0, out[seen] * penalty, out[seen] / penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = np.bincount(history[answer_start:], minlength=vocab)
            said = np.flatnonzero(counts)
            out[said] -= counts[said].astype(np.float32) * np.float32(sampling.frequency_penalty)
            out[said] -= np.float32(sampling.presence_penalty)
    clipped: F32 = np.clip(out, -limit, limit)
    return clipped


def _scaled(logits: F32, temperature: float) -> F64:
    """Logits over temperature with the largest at 0, f64."""
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scaled: F64 = (wide - wide.max()) / temperature
    return scaled


def _candidates(logits: F32, sampling: Sampling) -> I64:
    """Ids that top-k, top-p and min-p leave, ascending."""
    vocab = logits.size
    top_k = sampling.top_k if 0 < sampling.top_k < vocab else vocab
    ids: I64 = np.arange(vocab, dtype=np.int64)
    if top_k < vocab or sampling.top_p < 1.0:
        keys = _order_keys(logits)
        if top_k < vocab:
            keys = np.partition(keys, top_k - 1)[:top_k]
        if sampling.top_p < 1.0:
            keys = _top_p(keys, logits, sampling.temperature, sampling.top_p)
        ids = np.sort((keys & _LOW32).astype(np.int64))
    if sampling.min_p > 0.0:
        ids = ids[_scaled(logits[ids], sampling.temperature) >= math.log(sampling.min_p)]
    return ids


def _order_keys(logits: F32) -> U64:
    """One u64 for each id that sorts as (logit descending, id ascending) does; its low half is the id."""
    bits: U32 = (logits + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0, so that they are a tie
    negative = (bits >> np.uint32(31)).astype(bool)
    descending = np.where(negative, bits, ~(bits | np.uint32(0x80000000))).astype(np.uint64)
    return descending << _SHIFT32 | np.arange(logits.size, dtype=np.uint64)


def _top_p(keys: U64, logits: F32, temperature: float, top_p: float) -> U64:
    """The shortest run of the best candidates whose probability reaches `top_p`; at least one."""
    scaled = _scaled(logits[(keys & _LOW32).astype(np.int64)], temperature)
    need = top_p * float(np.exp(scaled).sum())
    best = float(logits[(keys & _LOW32).astype(np.int64)].max())
    sorted_n = min(_FIRST_SORTED, keys.size)
    while True:
        head = np.sort(keys if sorted_n == keys.size else np.partition(keys, sorted_n - 1)[:sorted_n])
        wide = logits[(head & _LOW32).astype(np.int64)].astype(np.float64)
        with np.errstate(over="ignore"):
            mass = np.cumsum(np.exp((wide - best) / temperature))
        if mass[-1] >= need or sorted_n == keys.size:
            return head[: int(np.searchsorted(mass, need)) + 1]
        sorted_n = min(sorted_n * 16, keys.size)
