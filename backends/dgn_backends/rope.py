"""Rotary position embedding: the angles of every supported kind, in NumPy.

Sources: Su et al. 2021 (arXiv 2104.09864); position interpolation, Chen et al. 2023 (arXiv 2306.15595),
"linear"; NTK-aware scaling, "dynamic"; YaRN, Peng et al. 2023 (arXiv 2309.00071); the scaling published with
Llama 3.1, "llama3". Values follow Hugging Face transformers. Knows nothing of sequences or of how backends
rotate.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dgn_backends.model import RopeSpec

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def angles(spec: RopeSpec, head_dim: int, total_positions: int) -> tuple[F32, float]:
    """The inverse frequencies, f32 [head_dim / 2], and the factor on cos and sin.

    `total_positions` is the length that the sequence was opened with; only the kind `dynamic` uses it.
    Computed in f64 and rounded once, so that machines with different vector units agree.
    """
    scaling = 1.0
    match spec.kind:
        case "default":
            inv_freq = _inverse_frequencies(spec.theta, head_dim)
        case "linear":
            inv_freq = _inverse_frequencies(spec.theta, head_dim) / spec.factor
        case "dynamic":
            inv_freq = _inverse_frequencies(_dynamic_theta(spec, head_dim, total_positions), head_dim)
        case "llama3":
            inv_freq = _llama3(spec, head_dim)
        case "yarn":
            inv_freq = _yarn(spec, head_dim)
            scaling = _yarn_scaling(spec)
    return inv_freq.astype(np.float32), scaling


def cos_sin(inv_freq: F32, scaling: float, positions: npt.NDArray[np.integer]) -> tuple[F32, F32]:
    """cos and sin, each f32 [..., head_dim / 2], at `positions` [...]; the angle itself is rounded to f32 as
    in the published models' code."""
    angle = (positions.astype(np.float32)[..., None] * inv_freq).astype(np.float64)
    return (np.cos(angle) * scaling).astype(np.float32), (np.sin(angle) * scaling).astype(np.float32)


def rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotates `x` [..., head_dim], whose halves are the two coordinates of each pair; cos and sin broadcast
    to [..., head_dim / 2]. Returns a new array."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = np.empty_like(x)
    np.subtract(first * cos, second * sin, out=out[..., :half])
    np.add(second * cos, first * sin, out=out[..., half:])
    return out


def _inverse_frequencies(theta: float, head_dim: int) -> F64:
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _dynamic_theta(spec: RopeSpec, head_dim: int, total_positions: int) -> float:
    window = spec.original_positions
    stretch = spec.factor * max(total_positions, window) / window - (spec.factor - 1.0)
    return float(spec.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(spec: RopeSpec, head_dim: int) -> F64:
    """Keeps short wavelengths, divides long ones by the factor, and blends in between."""
    inv_freq = _inverse_frequencies(spec.theta, head_dim)
    turns = spec.original_positions * inv_freq / (2 * math.pi)  # full turns within the original window
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1.0 - blend) * inv_freq / spec.factor + blend * inv_freq


def _yarn(spec: RopeSpec, head_dim: int) -> F64:
    """Interpolates dimensions that turn less than beta_slow times within the original window, keeps those
    that turn more than beta_fast times, and ramps linearly between."""

    def dimension(turns: float) -> float:
        window = spec.original_positions
        return head_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    inv_freq = _inverse_frequencies(spec.theta, head_dim)
    return inv_freq / spec.factor * interpolated + inv_freq * (1.0 - interpolated)


def _yarn_scaling(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    return _mscale(spec.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
