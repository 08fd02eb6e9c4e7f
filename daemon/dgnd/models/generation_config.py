"""The sampling that a model's authors recommend: its `generation_config.json`. Knows nothing of requests."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dgnd.errors import BadRequest, ModelError
from dgnd.models.sampling import check_sampling
from dgnd.text.model_files import MAX_CONFIG_BYTES, parse_object, read_text
from dgnd.wire.messages import Sampling

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def model_sampling(model_dir: Path) -> Sampling:
    """The sampling that `generation_config.json` asks for; greedy where it says `do_sample: false` or
    nothing.

    Values that can't be used raise ModelError.
    """
    path = model_dir / "generation_config.json"
    try:
        values = parse_object(path, read_text(path, MAX_CONFIG_BYTES)) if path.exists() else {}
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from None
    if values.get("do_sample") is not True:
        return Sampling()
    try:
        known = {"temperature": 1.0} | {k: values[k] for k in _SAMPLING_KEYS if values.get(k) is not None}
        sampling = msgspec.convert(known, Sampling)
        check_sampling(sampling)
    except (msgspec.ValidationError, BadRequest) as error:
        raise ModelError(f"{path}: {error}") from None
    return sampling
