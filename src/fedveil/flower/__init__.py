"""Federations over machines, on Flower: proxies travel as raw bytes, one for each client.

Flower's telemetry and update checks are off unless they are asked for.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns

from fedveil.errors import ConfigurationError

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ConfigurationError(
        "Federations over machines need Flower",
        expected="the package flwr",
        found="none",
        fix="pip install 'fedveil[flower]'",
    ) from error

from fedveil.engine.patience import Patience
from fedveil.flower.client import Partner, client_app
from fedveil.flower.crew import FlowerCrew
from fedveil.flower.directory import ByAnswer, ByKey, ByNode, Directory
from fedveil.flower.mod import proxy_mod
from fedveil.flower.simulation import simulate
from fedveil.flower.strategy import ModelPrivacy

__all__ = [
    "ByAnswer",
    "ByKey",
    "ByNode",
    "Directory",
    "FlowerCrew",
    "ModelPrivacy",
    "Partner",
    "Patience",
    "client_app",
    "proxy_mod",
    "simulate",
]
