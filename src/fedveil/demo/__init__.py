"""Demos on real models and data that install from packages."""

from fedveil.demo.classification import (
    OF_PUBLIC,
    RELEASED_ONCE,
    SCHEMES,
    Scene,
    Setting,
    build_federation,
    own_data_alone,
    prepare,
    run_demo,
)
from fedveil.demo.generation import run_generation_demo
from fedveil.demo.setting import fast_matmul

__all__ = [
    "OF_PUBLIC",
    "RELEASED_ONCE",
    "SCHEMES",
    "Scene",
    "Setting",
    "build_federation",
    "fast_matmul",
    "own_data_alone",
    "prepare",
    "run_demo",
    "run_generation_demo",
]
