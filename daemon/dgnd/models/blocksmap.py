"""The BlocksMap as the configuration writes it: which node serves which units of which model.

Rows of one node add up; several nodes for the same units are replicas; a gap is no error, since a peer's file
may hold only its own rows. Knows nothing of what peers really offer now, nor of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dgn_backends.span import Span, SpanSyntaxError, format_units, parse_units, spans_of_units
from dgnd.config.check import SELF
from dgnd.config.locate import KeyPath
from dgnd.config.schema import AUTO, Config
from dgnd.errors import ConfigError
from dgnd.wire.checks import SPANS_MAX

Units = frozenset[int]


def _plain_error(key_path: KeyPath, message: str) -> ConfigError:
    return ConfigError(f"{'.'.join(map(str, key_path))}: {message}")


@dataclass(frozen=True, slots=True)
class AutoRow:
    """The row that leaves the choice to this node: where it stands in the file, and the bytes of weights that
    it allows; None: what memory allows."""

    index: int
    max_bytes: int | None


@dataclass(frozen=True, slots=True)
class BlocksMap:
    """`units[model][node]`: node is "self" or a name of [peers], in the order of the file. `auto`: models of
    which this node chooses its blocks itself; they are in no `units`."""

    n_blocks: Mapping[str, int]
    units: Mapping[str, Mapping[str, Units]]
    auto: Mapping[str, AutoRow] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        config: Config,
        n_blocks: Mapping[str, int],
        error_at: Callable[[KeyPath, str], ConfigError] = _plain_error,
    ) -> BlocksMap:
        """The map of `config`; `n_blocks` must have every model that has rows.

        Give `LoadedConfig.error_at`, so that an error names a line. Raises ConfigError for a block beyond the
        model, for one that two rows give to the same node, and for a node with more than SPANS_MAX spans.
        """
        units: dict[str, dict[str, Units]] = {name: {} for name in n_blocks}
        auto: dict[str, AutoRow] = {}
        for index, row in enumerate(config.blocks):
            here: KeyPath = ("blocks", index, "span")
            count = n_blocks[row.model]
            if row.span == AUTO:
                auto[row.model] = AutoRow(index, row.max_bytes)
                continue
            try:
                new = parse_units(row.span, count)
            except SpanSyntaxError as error:
                raise error_at(here, f'model "{row.model}": {error}') from None
            known = units[row.model].get(row.peer, frozenset())
            if new & known:
                twice = format_units(new & known, count)
                raise error_at(here, f'an earlier row gives {twice} of "{row.model}" to "{row.peer}" already')
            units[row.model][row.peer] = known | new
            spans = len(spans_of_units(known | new, count))
            if spans > SPANS_MAX:
                raise error_at(
                    here,
                    f'"{row.peer}" has {spans} spans of "{row.model}"; others take {SPANS_MAX} from a node',
                )
        return cls(dict(n_blocks), units, auto)

    def spans(self, model: str, node: str) -> tuple[Span, ...]:
        """The maximal spans of `model` that rows give to `node`, in order; empty where none do."""
        return spans_of_units(self.units[model].get(node, frozenset()), self.n_blocks[model])

    def own_spans(self, model: str) -> tuple[Span, ...]:
        """The spans of `model` that rows give to this node."""
        return self.spans(model, SELF)

    def peers_of(self, model: str) -> tuple[str, ...]:
        """The names of the peers that rows give some of `model`, in the order of the file."""
        return tuple(node for node in self.units[model] if node != SELF)

    def missing(self, model: str) -> str:
        """What no row gives to anybody, in the config's notation: `"embed,3-5"`; empty if nothing."""
        count = self.n_blocks[model]
        served: Units = frozenset().union(*self.units[model].values())
        return format_units(set(range(count + 2)) - served, count)
