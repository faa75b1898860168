"""A federation written down in a TOML file: `load_config` reads and checks it, `build` makes it."""

from fedveil.config.building import build, open_secret
from fedveil.config.file import Config, load_config

__all__ = ["Config", "build", "load_config", "open_secret"]
