"""What another configuration changes for a running node, and what of that needs a restart. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from dgnd.config.build import key_name
from dgnd.config.schema import Config, ModelSection

#: What is taken once, at the start: who this node is, and where it is found.
_FIXED = (
    ("node", "name"),
    ("node", "state_dir"),
    ("node", "listen"),
    ("control", "socket"),
    ("http", "listen"),
    ("http", "keys_file"),
    ("http", "max_requests"),
    ("http", "conversations"),
    ("metrics", "listen"),
    ("log", "level"),
    ("log", "format"),
)
#: Keys of a model that its worker need not know.
_NOT_THE_WORKERS = ("path", "chat_template", "wire")


@dataclass(frozen=True, slots=True)
class Changes:
    """From one configuration to another. Models and peers by name."""

    config: Config  #: the new one, with the old values of what needs a restart
    restart: tuple[str, ...]  #: keys whose new values count after a restart
    models_added: tuple[str, ...]
    models_removed: tuple[str, ...]
    worker_keys: frozenset[str]  #: models of both whose worker has other settings
    peers_added: tuple[str, ...]
    peers_removed: tuple[str, ...]
    settings: tuple[str, ...]  #: other keys with new values, and tables that differ


def changes(old: Config, new: Config) -> Changes:
    """What is to be done, and said."""
    restart = [key for key in _FIXED if _at(old, key) != _at(new, key)]
    config = new
    for section, key in restart:
        table = msgspec.structs.replace(getattr(config, section), **{key: _at(old, (section, key))})
        config = msgspec.structs.replace(config, **{section: table})
    both = [name for name in new.models if name in old.models]
    moved = [name for name in both if old.models[name].path != new.models[name].path]
    models = dict(new.models)
    for name in moved:
        models[name] = msgspec.structs.replace(models[name], path=old.models[name].path)
    config = msgspec.structs.replace(config, models=models)
    old_ids, new_ids = ({peer.id for peer in each.peers.values()} for each in (old, new))
    return Changes(
        config=config,
        restart=tuple([key_name(key) for key in restart] + [f"models.{name}.path" for name in moved]),
        models_added=tuple(name for name in new.models if name not in old.models),
        models_removed=tuple(name for name in old.models if name not in new.models),
        worker_keys=frozenset(
            name for name in both if _for_worker(old.models[name]) != _for_worker(new.models[name])
        ),
        peers_added=tuple(name for name, peer in new.peers.items() if peer.id not in old_ids),
        peers_removed=tuple(name for name, peer in old.peers.items() if peer.id not in new_ids),
        settings=tuple(_settings(old, config)),
    )


def _at(config: Config, key: tuple[str, str]) -> object:
    section, name = key
    return getattr(getattr(config, section), name)


def _for_worker(section: ModelSection) -> Mapping[str, object]:
    values = msgspec.structs.asdict(section)
    return {key: value for key, value in values.items() if key not in _NOT_THE_WORKERS}


def _settings(old: Config, new: Config) -> Iterator[str]:
    for section in ("node", "sessions", "limits"):
        before, after = (msgspec.structs.asdict(getattr(each, section)) for each in (old, new))
        yield from (f"{section}.{key}" for key in after if after[key] != before[key])
    for table in ("models", "peers"):
        before, after = getattr(old, table), getattr(new, table)
        yield from (f"{table}.{name}" for name in after if name in before and after[name] != before[name])
    if old.blocks != new.blocks:
        yield "blocks"
