"""A model and its workers as the operator sees them. Only words; decides nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from dgn_backends.span import format_spans
from dgnd.control import api
from dgnd.errors import ModelError
from dgnd.models.local import LocalModel
from dgnd.workers.handle import WorkerHandle


def model_info(model: LocalModel, missing: str, weights_digest: str | None) -> api.ModelInfo:
    """A configured model. `missing`: blocks that nobody serves now; `weights_digest`: None where it is not
    known whether all of its weights agree."""
    return api.ModelInfo(
        name=model.name,
        path=str(model.path),
        backend=model.section.backend if model.worker is None else model.worker.request.backend,
        device=model.section.device,
        dtype=model.section.dtype,
        n_blocks=model.config.n_blocks,
        context=model.config.max_positions,
        local=format_spans(model.loaded_spans()),
        missing=missing,
        verified=weights_digest is not None,
        template=_template_name(model),
        tools=_tool_style(model),
        quant=model.section.quant,
        digest=_whole_digest(model, weights_digest),
    )


def worker_statuses(model: LocalModel) -> Iterator[api.WorkerStatus]:
    """The workers of a model, and what each is to have loaded."""
    if model.worker is not None:
        yield _worker(model.worker, format_spans(model.spans))
    for filling in model.fillings:
        yield _worker(filling.worker, ",".join(filling.worker.request.spans))


def _worker(worker: WorkerHandle, spans: str) -> api.WorkerStatus:
    return api.WorkerStatus(
        model=worker.model,
        spans=spans,
        pid=worker.pid,
        state=worker.state,
        backend=worker.request.backend,
        weights_bytes=worker.weights_bytes,
        kv_bytes=worker.stats.kv_bytes,
        kv_budget_bytes=worker.stats.kv_budget,
        detail=worker.detail,
    )


def _whole_digest(model: LocalModel, weights: str | None) -> str:
    """Equal where the same token ids lead to the same next ones."""
    if weights is None:
        return ""
    tokenizer = "" if model.manifest is None else model.manifest.tokenizer_digest or ""
    return hashlib.blake2b(f"{weights} {tokenizer}".encode(), digest_size=16).hexdigest()


def _template_name(model: LocalModel) -> str:
    """The chat template in use; empty on a node that has no tokenizer, which only an origin needs."""
    try:
        return model.text.template_name
    except ModelError:
        return ""


def _tool_style(model: LocalModel) -> str:
    try:
        return model.text.tool_style or ""
    except ModelError:
        return ""
