"""What a probe's child tells: one JSON object. Foreign code runs beside its writer, so its reader checks all.

Knows nothing of processes.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

#: What a report may weigh; its reader stops there.
MAX_REPORT_BYTES: Final = 64 * 1024

Device = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[\x21-\x7e]+$")]
Devices = Annotated[list[Device], msgspec.Meta(max_length=64)]


class ProbeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The devices of a backend that can be used, or the reason why it can't be."""

    devices: Devices = []
    reason: Annotated[str, msgspec.Meta(max_length=4096)] = ""


def report_of(devices: object) -> ProbeReport:
    """The report on a backend whose `devices()` returned this."""
    try:
        names = msgspec.convert(devices, Devices)
    except msgspec.ValidationError as error:
        return ProbeReport(reason=f"its devices() returned no list of device names: {error}")
    if not names:
        return ProbeReport(reason="its devices() is empty: it finds nothing here to compute on")
    return ProbeReport(devices=names)


def read_report(raw: bytes) -> ProbeReport | None:
    """The report, or None where these bytes are none."""
    try:
        return msgspec.json.decode(raw, type=ProbeReport)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
