"""One TOML file as frozen values, with errors that name file, line and column."""

from dgnd.config.load import LoadedConfig, load_config
from dgnd.config.schema import Config

__all__ = ["Config", "LoadedConfig", "load_config"]
