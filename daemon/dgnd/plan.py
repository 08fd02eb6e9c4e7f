"""What `dgnd check` says before anything is loaded: who holds what, how many bytes, which files that takes.

Reads configurations of models, the index of their shards, and the headers of this node's own files. Knows
nothing of peers' real state or of compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgn_backends.errors import ModelError
from dgn_backends.hf_config import read_config
from dgn_backends.manifest import TOKENIZER_FILE
from dgn_backends.model import ModelConfig
from dgn_backends.quant_plan import stored_bytes
from dgn_backends.registry import choose_backend
from dgn_backends.span import Span, format_spans
from dgn_backends.weights import INDEX_FILE, ModelFiles, span_tensors
from dgnd.blocksmap import BlocksMap
from dgnd.config import LoadedConfig
from dgnd.config.check import SELF
from dgnd.config.schema import ModelSection
from dgnd.errors import ConfigError
from dgnd.generation import model_sampling
from dgnd.models import model_path
from dgnd.text.assets import TextAssets

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
    return tuple(
        _plan_model(name, paths[name], section, configs[name], blocks)
        for name, section in loaded.config.models.items()
    )


def _plan_model(
    name: str, path: Path, section: ModelSection, config: ModelConfig, blocks: BlocksMap
) -> ModelPlan:
    quant = section.quant
    if blocks.own_spans(name):
        choose_backend(section.backend, quant, section.device)
    files = _files(path, needed=bool(blocks.own_spans(name)))
    nodes = tuple(
        _plan_node(node, blocks.spans(name, node), quant, config, files) for node in blocks.units[name]
    )
    own = next((node.files for node in nodes if node.node == SELF), ())
    absent = tuple(file for file in own if not (path / file).exists())
    if files is not None and not absent:
        for span in blocks.own_spans(name):
            files.check(config, span)
    speechless = not (path / TOKENIZER_FILE).exists()
    if not speechless:
        TextAssets.load(path, section.chat_template, config.eos_token_ids)
    model_sampling(path)
    return ModelPlan(
        name=name,
        path=path,
        quant=quant,
        n_blocks=config.n_blocks,
        nodes=nodes,
        small_files=tuple(file for file in SMALL_FILES if (path / file).exists()),
        missing=blocks.missing(name),
        absent=absent,
        speechless=speechless,
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
    tensors = {name: shape for span in spans for name, shape in span_tensors(config, span).items()}
    names: dict[str, None] = {}
    if files is not None:
        names = {file: None for span in spans for file in files.span_files(config, span)}
    weights = sum(stored_bytes(quant, name, shape, config.dtype) for name, shape in tensors.items())
    return NodePlan(node, spans, weights, tuple(names))


def format_plan(plans: tuple[ModelPlan, ...]) -> str:
    """The plan as lines for people."""
    lines: list[str] = []
    for plan in plans:
        lines.append(f"{plan.name}: {plan.n_blocks} blocks, in {plan.path}")
        width = max((len(node.node) for node in plan.nodes), default=0)
        for node in plan.nodes:
            spans = format_spans(node.spans)
            weights = format_bytes(node.weights_bytes)
            quantised = "" if plan.quant == "none" else f" in {plan.quant}"
            lines.append(f"  {node.node:{width}}  {spans}: {weights} of weights{quantised}")
            lines.extend(f"  {'':{width}}    {file}" for file in node.files)
        lines.append(f"  every node of this model also needs {' '.join(plan.small_files)}")
        if plan.speechless:
            lines.append(
                f"  warning: {plan.path / TOKENIZER_FILE} is missing: no prompt can be answered here"
            )
        if plan.missing:
            lines.append(f"  warning: no row of this file serves {plan.missing}")
    if not plans:
        lines.append("no models: this node serves nothing and can answer nothing")
    return "\n".join(lines)


def format_bytes(count: int) -> str:
    """`count` with a unit that keeps it short: 5.2 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
