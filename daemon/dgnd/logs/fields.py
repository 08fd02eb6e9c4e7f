"""What a line of the log is about: the fields that it carries beside its words, for whoever collects logs.

Never a word of a prompt or an answer. Knows nothing of where logs go.
"""

from __future__ import annotations

import logging
from typing import Final

#: In the order in which they are told. `generation`: one answer, the same at all nodes; `session`: what it is
#: a turn of; `peer`: the other node.
FIELDS: Final = ("generation", "session", "peer")


def about(generation: str = "", session: str = "", peer: str = "") -> dict[str, str]:
    """For `extra` of a call of a logger."""
    return {"generation": generation, "session": session, "peer": peer}


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Those that it has."""
    found = {name: str(getattr(record, name, "") or "") for name in FIELDS}
    return {name: value for name, value in found.items() if value}
