"""A federation written down in a TOML file: `load_config` reads and checks it, `build` makes it."""

from fedveil.config.building import build, build_workplace, open_secret
from fedveil.config.file import Config, load_config
from fedveil.config.saving import save_model

__all__ = ["Config", "build", "build_workplace", "load_config", "open_secret", "save_model"]
