"""A length of time as people write it. Pure."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WHOLE: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?")


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `2h`, `1h30m`, `1d`. Raises ValueError that says so."""
    found = _WHOLE.fullmatch(text.strip().lower())
    total = 0
    if found is not None:
        total = sum(
            int(count) * size for count, size in zip(found.groups(), _UNITS.values(), strict=True) if count
        )
    if not total:
        raise ValueError(f"{text!r} is no length of time; write it as 90s, 30m, 2h or 1h30m")
    return float(total)
