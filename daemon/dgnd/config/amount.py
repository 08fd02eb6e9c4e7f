"""An amount of memory as people write it: "6GiB", "1.5 GB", or a share of what there is, "60%". Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {
    "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_FORM = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(%|B|[KMGT]i?B)", re.IGNORECASE)


class AmountError(ValueError):
    """What is no amount; the message quotes it and shows one."""


@dataclass(frozen=True, slots=True)
class Amount:
    """So many bytes, or a share of what there is; one of the two is None."""

    n_bytes: int | None
    share: float | None

    def of(self, total: int) -> int:
        """Bytes, where there are `total`: never more."""
        if self.n_bytes is not None:
            return min(self.n_bytes, total)
        assert self.share is not None
        return int(total * self.share)


def parse_amount(text: str) -> Amount:
    """Reads an amount. Raises AmountError for what is none, or nothing."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise AmountError(f'"{text}" is no amount of memory; write it as "6GiB" or "60%"')
    number, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if not 0 < number <= 100:
            raise AmountError(f'"{text}" is no share of memory; more than 0 and up to 100%')
        return Amount(None, number / 100)
    size = int(number * _UNITS[unit.removesuffix("B") + "B" if unit != "B" else ""])
    if size < 1:
        raise AmountError(f'"{text}" is no memory at all')
    return Amount(size, None)
