"""The models of this node's configuration, and how far each has come: read, verified, loaded.

Knows nothing of sessions or peers' offers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from dgn_backends.bundled import bundled_model
from dgn_backends.hf_config import read_config
from dgn_backends.manifest import TOKENIZER_FILE, Manifest, config_digest, tokenizer_digest
from dgn_backends.model import ModelConfig
from dgn_backends.span import Span, parse_spans
from dgnd.children import module_command
from dgnd.config.schema import ModelSection
from dgnd.errors import ConfigError, ModelError
from dgnd.memory.system_memory import available_bytes
from dgnd.models.generation_config import model_sampling
from dgnd.text.assets import TextAssets
from dgnd.wire.checks import FIGURE_MS_MAX, QUEUE_MAX
from dgnd.wire.messages import LoadedSpan, LoadSpans, Sampling, SpanOffer, WorkerStats
from dgnd.workers.handle import WorkerHandle
from dgnd.workers.seal import Seal

log = logging.getLogger("dgnd.models")


def model_path(name: str, section: ModelSection) -> Path:
    """Where a model is: its `path`, or the model bundled under its name. Raises ConfigError."""
    if section.path is not None:
        try:
            (section.path / "config.json").stat()
        except OSError as error:
            raise ConfigError(
                f'model "{name}": {section.path / "config.json"}: {error.strerror or error}; '
                "a model is a directory in Hugging Face's layout"
            ) from None
        return section.path
    bundled = bundled_model(name)
    if bundled is None:
        raise ConfigError(f"[models.{name}] has no path, and no model of that name comes with dgn")
    return bundled


@dataclass(slots=True)
class Filling:
    """Blocks that are loaded beside those of the configuration, for answers of this node that lost them."""

    worker: WorkerHandle
    leaving: bool = False  #: others serve them again: nothing new begins here


@dataclass(slots=True)
class LocalModel:
    """One model of the configuration on this node."""

    name: str
    section: ModelSection
    path: Path
    seal: Seal  #: of the files in `path`
    config: ModelConfig
    spans: tuple[Span, ...] = ()  #: what this node is to load
    coming: tuple[Span, ...] | None = None  #: what takes their place, while that is loaded
    auto: bool = False  #: whether this node chooses them itself
    why: str = ""  #: where it does: what it chose and why, or why nothing yet
    manifest: Manifest | None = None  #: None until the digests are made
    problem: str = ""  #: why there is no manifest
    worker: WorkerHandle | None = None
    fillings: list[Filling] = field(default_factory=list)
    _text: TextAssets | None = None
    _text_problem: str = ""
    _sampling: Sampling | None = None

    @property
    def text(self) -> TextAssets:
        """Tokenizer and templates, read when first needed; raises ModelError."""
        if self._text is None:
            try:
                self._refuse_other_text()
                config = self.config
                self._text = TextAssets.load(
                    self.path, self.section.chat_template, config.eos_token_ids, config.max_positions
                )
            except ModelError as error:
                self._text_problem = error.message
                raise
            self._text_problem = ""
        return self._text

    @property
    def sampling(self) -> Sampling:
        """The sampling that the model's own files ask for; raises ModelError."""
        if self._sampling is None:
            self._sampling = model_sampling(self.path)
        return self._sampling

    @property
    def text_problem(self) -> str:
        """Why this node can't answer prompts to the model, as far as that is known."""
        if self._text is None and not self._text_problem:
            return "" if (self.path / TOKENIZER_FILE).is_file() else f"{self.path} has no {TOKENIZER_FILE}"
        return self._text_problem

    async def check_text(self) -> None:
        """Finds out whether `text` can be read, for `text_problem`: nobody may ask for it for a long time."""
        if self._text is not None or not (self.path / TOKENIZER_FILE).is_file():
            return
        section = self.section
        command = module_command("dgnd.text.check", str(self.path), section.chat_template)
        result = await trio.run_process(command, capture_stderr=True, check=False)
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        if result.returncode == 1 and lines and self._text is None and self.section is section:
            self._text_problem = lines[-1]
            log.warning("model %s can't answer prompts given here: %s", self.name, self._text_problem)

    def _refuse_other_text(self) -> None:
        """The text's files are read late: they must still be those of the weights."""
        if self.manifest is None or self.seal.holds():
            return
        tokenizer, config = tokenizer_digest(self.path), config_digest(read_config(self.path))
        if (tokenizer, config) != (self.manifest.tokenizer_digest, self.manifest.config_digest):
            raise ModelError(
                f"{self.path}: tokenizer.json or config.json changed since dgnd started; restart dgnd"
            )

    def new_text(self, section: ModelSection) -> None:
        """Takes settings that concern the text alone; it is read again when next needed."""
        self.section, self._text, self._text_problem = section, None, ""

    def load_request(
        self, section: ModelSection, spans: Sequence[Span], backend: str, cache: Path
    ) -> LoadSpans:
        """The first message to a worker of it, which may keep quantised weights in `cache`."""
        return LoadSpans(
            model=self.name,
            path=str(self.path),
            spans=tuple(str(span) for span in spans),
            backend=backend,
            device=section.device,
            dtype=section.dtype,
            threads=section.threads,
            quant=section.quant,
            cache_dir=str(cache),
            kv_bytes=section.kv_bytes or 0,
            map_weights=section.map_weights,
        )

    def loaded(self) -> tuple[LoadedSpan, ...]:
        """Spans that compute now and whose weights are known by digest."""
        if self.worker is None or not self.worker.ready or self.manifest is None:
            return ()
        return self.worker.spans

    def loaded_spans(self) -> tuple[Span, ...]:
        """`loaded` as spans."""
        return self._spans(self.loaded())

    def filled(self) -> tuple[LoadedSpan, ...]:
        """Spans that compute now for answers that lost them."""
        here = [filling for filling in self.fillings if filling.worker.ready and self.manifest is not None]
        return tuple(span for filling in here for span in filling.worker.spans)

    def filled_spans(self) -> tuple[Span, ...]:
        """`filled` as spans."""
        return self._spans(self.filled())

    def worker_for(self, span: Span) -> WorkerHandle | None:
        """The worker in which a hop of `span` is opened."""
        for filling in self.fillings:
            here = self._spans(filling.worker.spans)
            if filling.worker.ready and any(each.contains(span) for each in here):
                return filling.worker
        return self.worker

    def _spans(self, said: Iterable[LoadedSpan]) -> tuple[Span, ...]:
        return tuple(span for item in said for span in parse_spans(item.span, self.config.n_blocks))

    def planned_spans(self) -> tuple[Span, ...]:
        """What this node computes or is about to, as far as it knows."""
        if self.problem:
            return ()
        if self.coming is not None:
            return self.coming
        lost = self.worker is None or self.worker.state in ("restarting", "failed", "stopped")
        return () if lost else self.spans

    def span_offers(self, *, leaving: bool = False) -> tuple[SpanOffer, ...]:
        """`loaded` as said to peers."""
        stats = WorkerStats() if self.worker is None else self.worker.stats
        return self._offers(self.loaded(), stats, leaving=leaving)

    def filled_offers(self) -> tuple[SpanOffer, ...]:
        """`filled` in the same form; said to nobody else."""
        return tuple(
            offer
            for filling in self.fillings
            if filling.worker.ready and self.manifest is not None
            for offer in self._offers(filling.worker.spans, filling.worker.stats, leaving=filling.leaving)
        )

    def _offers(
        self, spans: Sequence[LoadedSpan], stats: WorkerStats, *, leaving: bool
    ) -> tuple[SpanOffer, ...]:
        available = available_bytes()
        if stats.kv_budget:
            available = min(available, max(stats.kv_budget - stats.kv_busy, 0))
        return tuple(
            SpanOffer(
                span=item.span,
                numerics=item.numerics,
                dtype=item.dtype,
                row_invariant=item.row_invariant,
                quant=self.section.quant,
                free_kv_positions=available // max(item.kv_bytes_per_position, 1),
                step_ms=_figure(stats.step_ms, sum(self.config.unit_weights[u] for u in span.units())),
                prefill_ms=_figure(stats.prompt_ms, span.stop - span.start),
                queue=min(round(stats.queue, 2), QUEUE_MAX),
                leaving=leaving,
            )
            for item in spans
            for span in parse_spans(item.span, self.config.n_blocks)
        )


def _figure(ms: float | None, times: float) -> float | None:
    """A figure as said to peers."""
    return None if ms is None else min(round(ms * times, 4), FIGURE_MS_MAX)


def read_model(
    name: str, section: ModelSection, cache: Path, seal_of: Callable[[Path, Path], Seal] = Seal
) -> LocalModel:
    """Reads a model's configuration; raises ModelError or ConfigError. `cache`: where digests are kept;
    `seal_of`: makes the seal of a directory with that cache."""
    path = model_path(name, section)
    seal = seal_of(path, cache)
    return LocalModel(name=name, section=section, path=path, seal=seal, config=read_config(path))


async def make_manifest(model: LocalModel, done: Callable[[], None]) -> None:
    """Has the digests of the model's files made; `done` is called when `manifest` or `problem` is set. Looks
    into the text's files then."""
    try:
        model.manifest = await model.seal.make()
    except ModelError as error:
        model.problem = error.message
        log.error("model %s is not served: %s", model.name, model.problem)
    done()
    await model.check_text()
