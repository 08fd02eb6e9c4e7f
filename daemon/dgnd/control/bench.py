"""What `dgnctl bench` asks of the process that measures (`python -m dgnd.bench`), and the lines it prints.

The request is one JSON object in its only argument; each line of its stdout is a `BenchLine`. Knows nothing
of how anything is measured.
"""

from __future__ import annotations

from typing import Literal

import msgspec

#: What a model's name was taken for: a directory, a model of the running dgnd, one that comes along.
Source = Literal["directory", "dgnd", "bundled"]


class BenchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. `model` is a directory, or the name of a model that comes along."""

    model: str
    source: Source = "bundled"
    backend: str = "auto"
    quant: str = "none"
    dtype: str = "auto"
    threads: int | None = None  #: None leaves it to the backend
    prompt_tokens: int | None = None  #: None: 512, or what the context has room for
    tokens: int = 64
    sessions: int = 8
    rounds: int = 3


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one model on this machine. Speeds are medians of the rounds."""

    model: str
    path: str
    source: Source
    blocks: int
    parameters: int
    backend: str
    dtype: str  #: of the hidden states
    quant: str
    threads: int | None  #: as asked for; null: the backend's choice
    numerics: str  #: what the backend says shapes its rounding
    prompt_tokens: int
    tokens: int
    sessions: int
    rounds: int
    load_first_s: float  #: from the start of the process; quantised where asked, nothing kept from before
    load_second_s: float  #: the same again, with what the first has kept
    weights_bytes: int
    kv_bytes_per_position: int
    rss_bytes: int  #: of the worker after the second load; pages of mapped files count
    pss_bytes: int
    anonymous_bytes: int
    peak_rss_bytes: int  #: the most during that load
    first_peak_rss_bytes: int  #: the most during the first load
    prefill_tok_s: float
    decode_tok_s: float
    sessions_tok_s: float  #: of all sessions together
    bandwidth_bytes_s: float  #: median of reads between the rounds
    best_bandwidth_bytes_s: float
    read_bytes: int  #: weights that a decode step reads
    ceiling_tok_s: float  #: bandwidth over read_bytes
    decode_share: float  #: of the ceiling
    sessions_share: float  #: of the ceiling; all sessions share one reading of the weights


class BenchProgress(msgspec.Struct, frozen=True):
    """A sign of life: what begins now."""

    what: str


class BenchFailure(msgspec.Struct, frozen=True):
    """Why there is no result: the error's kind and message."""

    kind: str
    message: str


class BenchLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line; one of these."""

    progress: BenchProgress | None = None
    result: BenchResult | None = None
    failure: BenchFailure | None = None
