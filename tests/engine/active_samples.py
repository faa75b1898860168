"""Hostile clients; the benchmark's, on a federation of no size."""

from studies.active.crew import MOST, Hostile, Received, norm_of, run, updates_of
from studies.active.damage import DAMAGES, Liar, changed
from studies.active.digits import read_digits, read_within
from studies.active.images import FOUND, read_images
from studies.active.patient import read_patiently
from studies.active.scenes import ATTACKER, toy

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
