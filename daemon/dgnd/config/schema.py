"""The configuration as frozen values, with its defaults. Knows nothing of TOML or of files on disk.

Every key here is a key of the file; `docs/config.md` and `dgn.toml.example` are checked against it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

LOG_FORMATS = ("auto", "json")


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The base of every table."""


class NodeConfig(Section, frozen=True):
    """`[node]`"""

    name: str = ""  #: empty: the host name
    state_dir: Path = Path("/var/lib/dgn")
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4001",)
    drain_s: float = 5.0  #: for running sessions to be handed over, or to end, before the node leaves


class ControlConfig(Section, frozen=True):
    """`[control]`"""

    socket: Path | None = None  #: None: the search order of the CLI


class HttpConfig(Section, frozen=True):
    """`[http]`"""

    listen: str = ""  #: empty: there is no HTTP API
    keys_file: Path | None = None  #: API keys, one a line; None: none is asked for
    max_requests: int = 256  #: at once, those that wait among them
    conversations: int = 8  #: whose sessions are kept for their next request


class MetricsConfig(Section, frozen=True):
    """`[metrics]`"""

    listen: str = ""  #: empty: there are none to be read


class LogConfig(Section, frozen=True):
    """`[log]`"""

    level: str = "info"  #: of what dgnd itself says: one of `api.LOG_LEVELS`
    format: str = "auto"  #: one of LOG_FORMATS; auto: lines to read, with priorities for the journal


class ModelSection(Section, frozen=True):
    """`[models.NAME]`"""

    path: Path | None = None  #: None: a model bundled with dgn under that name
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    wire: str = "plain"  #: how sessions of this node send hidden states from node to node
    threads: int | None = None
    map_weights: bool = True  #: use weights where they lie in their files, as far as they are of use so
    kv_bytes: int | None = None  #: None: what `[limits] memory` leaves
    chat_template: str = "auto"


class PeerSection(Section, frozen=True):
    """`[peers.NAME]`"""

    id: str
    addrs: tuple[str, ...] = ()


#: The span of a row that leaves the choice to the node.
AUTO = "auto"


class BlocksRow(Section, frozen=True):
    """`[[blocks]]`: one row of the BlocksMap."""

    model: str
    peer: str  #: "self" or a name of [peers]
    span: str  #: a comma list of units; AUTO: this node chooses contiguous ones itself
    max_bytes: int | None = None  #: of AUTO: for weights; None: most of the memory that is available


class SessionsConfig(Section, frozen=True):
    """`[sessions]`"""

    idle_s: float = 600.0  #: KV of a session idle for longer is freed
    max_sessions: int = 64  #: sessions open at once, of each origin
    recover_s: float = 10.0  #: how long an answer waits for somebody who has the blocks that it lost
    fill_gaps: bool = False  #: whether this node loads such blocks itself where nobody else has them
    journal_bytes: int = 256 << 20  #: what this node keeps of its results, to send them again after a failure


class LimitsConfig(Section, frozen=True):
    """`[limits]`"""

    memory: str = "90%"  #: for all that this node holds: bytes, or a share of what it is allowed
    waiting: int = 64  #: answers that may wait for memory, of each model
    wait_s: float = 120.0  #: for how long


class Config(Section, frozen=True):
    """The whole file."""

    node: NodeConfig = NodeConfig()
    control: ControlConfig = ControlConfig()
    http: HttpConfig = HttpConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
    sessions: SessionsConfig = SessionsConfig()
    limits: LimitsConfig = LimitsConfig()
    models: dict[str, ModelSection] = {}
    peers: dict[str, PeerSection] = {}
    blocks: tuple[BlocksRow, ...] = ()
