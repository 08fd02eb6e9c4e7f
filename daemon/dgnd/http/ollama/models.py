"""`GET /api/tags`, `POST /api/show`, `GET /api/version`: which models there are, and what each is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import trio

from dgn_backends.hf_config import read_config
from dgn_backends.model import ModelConfig
from dgn_backends.weights import span_bytes, span_tensors, whole_model
from dgnd.control import api
from dgnd.errors import BadRequest
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import json_answer
from dgnd.http.ollama import answers
from dgnd.http.ollama.names import known
from dgnd.http.ollama.requests import ShowRequest
from dgnd.http.reading import read_body
from dgnd.models.generation_config import model_sampling
from dgnd.text.model_files import MAX_CONFIG_BYTES, parse_object, read_text


async def tags(exchange: Exchange, desk: Desk) -> None:
    """All models."""
    models = await desk.service.models_list()
    facts = await trio.to_thread.run_sync(lambda: [_read(model) for model in models])
    found = [
        answers.Tag(
            name=model.name,
            model=model.name,
            modified_at=fact.modified_at,
            size=fact.bytes,
            digest=model.digest,
            details=fact.details(model),
        )
        for model, fact in zip(models, facts, strict=True)
    ]
    await json_answer(exchange, answers.Tags(found))


async def show(exchange: Exchange, desk: Desk) -> None:
    """One model."""
    request = read_body(await exchange.body(), ShowRequest)
    name = request.model or request.name
    if not name:
        raise BadRequest("model: it is required")
    model = await known(name, desk)
    fact = await trio.to_thread.run_sync(_read, model)
    block = fact.config.block
    info = {
        "general.architecture": fact.family,
        "general.parameter_count": fact.parameters,
        f"{fact.family}.block_count": model.n_blocks,
        f"{fact.family}.context_length": model.context,
        f"{fact.family}.embedding_length": block.hidden_size,
        f"{fact.family}.feed_forward_length": block.intermediate_size,
        f"{fact.family}.attention.head_count": block.n_heads,
        f"{fact.family}.attention.head_count_kv": block.n_kv_heads,
        f"{fact.family}.vocab_size": fact.config.vocab_size,
    }
    shown = answers.Shown(
        modified_at=fact.modified_at,
        details=fact.details(model),
        model_info=info,
        template=model.template,
        parameters=fact.sampling,
        capabilities=["completion", "tools"] if model.tools else ["completion"],
    )
    await json_answer(exchange, shown)


async def version(exchange: Exchange, desk: Desk) -> None:
    """dgn's version."""
    await json_answer(exchange, answers.Version((await desk.service.status()).version))


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a model's files say."""

    family: str
    modified_at: str
    parameters: int
    bytes: int
    config: ModelConfig
    sampling: str

    def details(self, model: api.ModelInfo) -> answers.Details:
        """As Ollama's clients show it."""
        level = self.config.dtype if model.quant == "none" else model.quant
        return answers.Details(self.family, [self.family], _short(self.parameters), level.upper())


def _read(model: api.ModelInfo) -> _Facts:
    path = Path(model.path)
    file = path / "config.json"
    config = read_config(path)
    family = parse_object(file, read_text(file, MAX_CONFIG_BYTES)).get("model_type")
    whole = whole_model(config)
    sampling = model_sampling(path)
    said = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return _Facts(
        family=family if isinstance(family, str) else "llama",
        modified_at=datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat().replace("+00:00", "Z"),
        parameters=sum(math.prod(shape) for shape in span_tensors(config, whole).values()),
        bytes=span_bytes(config, whole),
        config=config,
        sampling="\n".join(f"{key} {value:g}" for key, value in said.items()),
    )


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)
