"""A federation written down in a TOML file: `load_config` reads and checks it, `build` makes it."""

from fedveil.config.building import answer_test, build, build_workplace, open_secret
from fedveil.config.file import Config, load_config
from fedveil.config.rehearsal import Rehearsal, rehearse
from fedveil.config.saving import save_model

__all__ = [
    "Config",
    "Rehearsal",
    "answer_test",
    "build",
    "build_workplace",
    "load_config",
    "open_secret",
    "rehearse",
    "save_model",
]
