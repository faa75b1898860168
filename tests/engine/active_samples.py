"""Hostile clients; the benchmark's, on a federation of no size."""

import sys
from pathlib import Path

# Behind everything else: benchmarks/ has modules of common names.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from active.crew import MOST, Hostile, Received, norm_of, run, updates_of
from active.damage import DAMAGES, Liar, changed
from active.digits import read_digits, read_within
from active.images import FOUND, read_images
from active.patient import read_patiently
from active.scenes import ATTACKER, toy

__all__ = [
    "ATTACKER",
    "DAMAGES",
    "FOUND",
    "MOST",
    "Hostile",
    "Liar",
    "Received",
    "changed",
    "norm_of",
    "read_digits",
    "read_images",
    "read_patiently",
    "read_within",
    "run",
    "toy",
    "updates_of",
]
