"""What `dgnd check` says before anything is loaded: who holds what, how many bytes, which files that takes.

Reads configurations of models, the index of their shards, and the headers of this node's own files. Knows
nothing of peers' real state or of compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.manifest import TOKENIZER_FILE
from dgn_backends.model import ModelConfig
from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.registry import choose_backend
from dgn_backends.span import Span, format_spans, format_units, spans_of_units
from dgn_backends.weights import INDEX_FILE, ModelFiles
from dgnd.config import LoadedConfig
from dgnd.config.amount import parse_amount
from dgnd.config.check import SELF
from dgnd.errors import ConfigError
from dgnd.memory.fitting import least_kv, refusal
from dgnd.models.blocksmap import AutoRow, BlocksMap
from dgnd.models.generation_config import model_sampling
from dgnd.models.local import model_path
from dgnd.models.sizes import Sizes, read_sizes
from dgnd.text.assets import TextAssets
from dgnd.upkeep.ledger import PROGRAM_BYTES, WEIGHTS_SHARE, free_at_start, room_at_start
from dgnd.words import format_bytes

#: Devices whose memory is the machine's, where no GPU is found.
_MACHINE = ("auto", "cpu")
#: Files beside the weights, as far as a model has them.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX_FILE,
)


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What the rows give to one node ("self" or a peer's name). `weights_bytes` as they are once loaded with
    the model's `quant` here, the only one that is known; `files` are those that hold its weights."""

    node: str
    spans: tuple[Span, ...]
    weights_bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AutoPlan:
    """What this node may choose of a model itself. `most_bytes`: of weights; `by_memory`: as it is now."""

    most_bytes: int
    by_memory: bool
    blocks: int  #: how many fit
    present: str  #: what it has the files of, in the config's notation


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model. `small_files`: what every node needs besides; `absent`: files that this node lacks."""

    name: str
    path: Path
    quant: str
    n_blocks: int
    nodes: tuple[NodePlan, ...]
    small_files: tuple[str, ...]
    missing: str
    absent: tuple[str, ...]
    auto: AutoPlan | None  #: where this node chooses itself
    needs: int  #: bytes of its own spans and of one session through them, in memory
    free: int  #: for these, as it is now, beside what comes before it in the file
    lacks: str  #: why they do not fit into that, with what would; empty where they do
    speechless: bool  #: without a tokenizer here, which only a node that answers prompts needs


def make_plan(loaded: LoadedConfig) -> tuple[ModelPlan, ...]:
    """The plan of every model, in the order of the file.

    Raises ConfigError for rows that can't be, and ModelError where a model's configuration or one of this
    node's own weight files can't be used. Files that are not here at all are listed in `absent`.
    """
    paths: dict[str, Path] = {}
    configs: dict[str, ModelConfig] = {}
    for name, section in loaded.config.models.items():
        try:
            paths[name] = model_path(name, section)
        except ConfigError as error:
            raise loaded.error_at(("models", name, "path"), error.message) from None
        configs[name] = read_config(paths[name])
    counts = {name: config.n_blocks for name, config in configs.items()}
    blocks = BlocksMap.build(loaded.config, counts, loaded.error_at)
    free, plans = free_at_start(parse_amount(loaded.config.limits.memory)), []
    for name in loaded.config.models:
        plan = _plan_model(loaded, name, paths[name], configs[name], blocks, free)
        free = max(free - plan.needs - PROGRAM_BYTES, 0) if plan.needs else free
        plans.append(plan)
    return tuple(plans)


def check_auto(loaded: LoadedConfig, row: AutoRow, name: str, path: Path, config: ModelConfig) -> Sizes:
    """What this node may choose among. Raises ModelError, or ConfigError where `max_bytes` is too small for a
    block, or no weights are here."""
    sizes = read_sizes(path, config, loaded.config.models[name].quant)
    if row.max_bytes is not None and row.max_bytes < sizes.of_block:
        raise loaded.error_at(
            ("blocks", row.index, "max_bytes"),
            f'max_bytes is {row.max_bytes:,}, and a block of "{name}" needs {sizes.of_block:,}; raise it',
        )
    if not sizes.present:
        raise loaded.error_at(("blocks", row.index), f"none of the weight files of {path} are here")
    return sizes


def _plan_auto(row: AutoRow, sizes: Sizes, config: ModelConfig, memory: str) -> AutoPlan:
    most = room_at_start(parse_amount(memory)) if row.max_bytes is None else row.max_bytes
    fitting = min(most // sizes.of_block, config.n_blocks)
    present = format_units(sizes.present, config.n_blocks)
    return AutoPlan(most, row.max_bytes is None, fitting, present)


def _plan_model(
    loaded: LoadedConfig, name: str, path: Path, config: ModelConfig, blocks: BlocksMap, free: int
) -> ModelPlan:
    section, row = loaded.config.models[name], blocks.auto.get(name)
    quant = section.quant
    if blocks.own_spans(name) or row is not None:
        choose_backend(section.backend, quant, section.device)
    files = _files(path, needed=bool(blocks.own_spans(name)) or row is not None)
    sizes = check_auto(loaded, row, name, path, config) if row is not None else None
    nodes = tuple(
        _plan_node(node, blocks.spans(name, node), quant, config, files) for node in blocks.units[name]
    )
    own = next((node.files for node in nodes if node.node == SELF), ())
    absent = tuple(file for file in own if not (path / file).exists())
    if files is not None and not absent:
        chosen = spans_of_units(sizes.present, config.n_blocks) if sizes is not None else ()
        for span in [*blocks.own_spans(name), *chosen]:
            files.check(config, span)
    speechless = not (path / TOKENIZER_FILE).exists()
    if not speechless:
        TextAssets.load(path, section.chat_template, config.eos_token_ids)
    model_sampling(path)
    own_spans = [] if section.device not in _MACHINE else list(blocks.own_spans(name))

    def needs(span: Span, quant: str) -> int:
        return loaded_bytes(quant, config, [span]) + least_kv(config, span)

    return ModelPlan(
        name=name,
        path=path,
        quant=quant,
        n_blocks=config.n_blocks,
        nodes=nodes,
        small_files=tuple(file for file in SMALL_FILES if (path / file).exists()),
        missing=blocks.missing(name),
        absent=absent,
        auto=None
        if row is None or sizes is None
        else _plan_auto(row, sizes, config, loaded.config.limits.memory),
        speechless=speechless,
        needs=sum(needs(span, quant) for span in own_spans),
        free=free,
        lacks=refusal(own_spans, quant, config.n_blocks, free, needs) if own_spans else "",
    )


def _files(path: Path, *, needed: bool) -> ModelFiles | None:
    """None where the directory holds no weights at all, which is right for a node that serves none."""
    try:
        return ModelFiles(path)
    except ModelError:
        if needed:
            raise
        return None


def _plan_node(
    node: str, spans: tuple[Span, ...], quant: str, config: ModelConfig, files: ModelFiles | None
) -> NodePlan:
    names: dict[str, None] = {}
    if files is not None:
        names = {file: None for span in spans for file in files.span_files(config, span)}
    return NodePlan(node, spans, loaded_bytes(quant, config, spans), tuple(names))


def format_plan(plans: tuple[ModelPlan, ...]) -> str:
    """The plan as lines for people."""
    lines: list[str] = []
    for plan in plans:
        lines.append(f"{plan.name}: {plan.n_blocks} blocks, in {plan.path}")
        width = max((len(node.node) for node in plan.nodes), default=0)
        quantised = "" if plan.quant == "none" else f" in {plan.quant}"
        lines += _auto_lines(plan, plan.auto, quantised) if plan.auto is not None else []
        for node in plan.nodes:
            spans = format_spans(node.spans)
            weights = format_bytes(node.weights_bytes)
            lines.append(f"  {node.node:{width}}  {spans}: {weights} of weights{quantised}")
            lines.extend(f"  {'':{width}}    {file}" for file in node.files)
        if plan.lacks:
            lines.append(f"  warning: this node {plan.lacks}")
        elif plan.needs:
            lines.append(f"  this node needs {format_bytes(plan.needs)}, {format_bytes(plan.free)} free")
        lines.append(f"  every node of this model also needs {' '.join(plan.small_files)}")
        if plan.speechless:
            lines.append(
                f"  warning: {plan.path / TOKENIZER_FILE} is missing: no prompt can be answered here"
            )
        if plan.missing and plan.auto is not None:
            lines.append(f"  no row of this file serves {plan.missing}: it chooses among that first")
        elif plan.missing:
            lines.append(f"  warning: no row of this file serves {plan.missing}")
    if not plans:
        lines.append("no models: this node serves nothing and can answer nothing")
    return "\n".join(lines)


def _auto_lines(plan: ModelPlan, auto: AutoPlan, quantised: str) -> Iterator[str]:
    why = f", {WEIGHTS_SHARE:.0%} of the memory that is free now" if auto.by_memory else ""
    yield f"  self  auto: up to {format_bytes(auto.most_bytes)} of weights{quantised}{why}"
    yield f"    {auto.blocks} of {plan.n_blocks} blocks fit; it takes those that its peers lack most"
    yield f"    its files here are those of {auto.present}"
