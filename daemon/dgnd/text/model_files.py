"""What the small JSON files of a model directory say about its text: templates, special tokens, ends.

Reads `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and
`chat_template.jinja`; all but the tokenizer itself may be absent. Knows nothing of tokenizers or templates.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgn_backends.regular_file import open_regular
from dgnd.errors import ModelError

#: No file read here is larger in a model that exists; a bigger one is refused before it is read.
MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The settings around a tokenizer. `named_tokens`: texts of tokens by role (`bos_token`, …)."""

    named_tokens: dict[str, str]
    chat_template: str | None
    template_file: Path | None  #: where the template was found
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    bos_id: int | None
    hints: str  #: names the model goes by, lower case, for choosing a template


def read_text(path: Path, limit: int) -> str:
    """The file as UTF-8 text; ModelError with one line when it is absent, too large or not UTF-8."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ModelError(f"{path}: {size} bytes, more than the {limit} that such a file may have")
            return file.read(limit).decode("utf-8")
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file; the model directory must hold it") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from None


def parse_object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that `text` of file `path` is."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise ModelError(f"{path}: broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_text_config(model_dir: Path) -> TextConfig:
    """Everything that the small files say; ModelError names the file that can't be used."""
    tokenizer = _optional(model_dir / "tokenizer_config.json")
    special = _optional(model_dir / "special_tokens_map.json")
    generation = _optional(model_dir / "generation_config.json")
    config = _optional(model_dir / "config.json")
    named = {**_named_tokens(special), **_named_tokens(tokenizer)}
    template, template_file = _chat_template(model_dir, tokenizer)
    add_bos = tokenizer.get("add_bos_token")
    bos_ids = _ids(config, "bos_token_id", model_dir / "config.json")
    eos_ids = _ids(generation, "eos_token_id", model_dir / "generation_config.json")
    eos_ids = eos_ids or _ids(config, "eos_token_id", model_dir / "config.json")
    hints = f"{model_dir.resolve().name} {config.get('_name_or_path', '')}".lower()
    return TextConfig(
        named_tokens=named,
        chat_template=template,
        template_file=template_file,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        eos_ids=eos_ids,
        bos_id=bos_ids[0] if bos_ids else None,
        hints=hints,
    )


def _optional(path: Path) -> dict[str, Any]:
    return parse_object(path, read_text(path, MAX_CONFIG_BYTES)) if path.exists() else {}


def _named_tokens(values: dict[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", …}` of a config in which a token is a string or an object with `content`."""
    found = {}
    for name, value in values.items():
        if not name.endswith("_token"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


def _chat_template(model_dir: Path, tokenizer: dict[str, Any]) -> tuple[str | None, Path | None]:
    """The default template: `chat_template.jinja` before `tokenizer_config.json`, as in transformers."""
    jinja = model_dir / "chat_template.jinja"
    if jinja.exists():
        return read_text(jinja, MAX_CONFIG_BYTES), jinja
    path = model_dir / "tokenizer_config.json"
    value = tokenizer.get("chat_template")
    if value is None or isinstance(value, str):
        return value or None, path if value else None
    named: dict[str, str] = {}
    entries = value if isinstance(value, list) else []
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(name, str) and isinstance(text, str)):
            raise ModelError(f"{path}: each entry of the list chat_template needs a name and a template")
        named[name] = text
    if not isinstance(value, list):
        raise ModelError(f"{path}: chat_template must be a string or a list, not {type(value).__name__}")
    if named and "default" not in named:
        raise ModelError(f"{path}: chat_template has no entry named default, only {', '.join(sorted(named))}")
    return (named["default"], path) if named else (None, None)


def _ids(values: dict[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """A token id or a list of them; () when absent."""
    value = values.get(name)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise ModelError(f"{path}: {name} must be a token id or a list of them, not {value!r}")
    return tuple(ids)
